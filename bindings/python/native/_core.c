// SPDX-License-Identifier: Apache-2.0
// The native module: its functions and how it is loaded.
#include "core.h"

static PyObject *core_set_thread_count(PyObject *module, PyObject *args) {
  core_state *state = PyModule_GetState(module);
  int count;
  if (!parse_arguments(state, args, "threads", "i:set_thread_count", &count)) return NULL;
  hs_error error;
  if (hs_set_thread_count(count, &error) != HS_OK) {
    return raise_error(state, &error);
  }
  Py_RETURN_NONE;
}

static PyObject *core_thread_count(PyObject *module, PyObject *unused) {
  (void)module;
  (void)unused;
  return PyLong_FromLong(hs_thread_count());
}

static PyObject *core_version(PyObject *module, PyObject *unused) {
  (void)module;
  (void)unused;
  return text_of(hs_version());
}

static PyObject *core_status_name(PyObject *module, PyObject *args) {
  core_state *state = PyModule_GetState(module);
  int status;
  if (!parse_arguments(state, args, "status", "i:status_name", &status)) return NULL;
  return text_of(hs_status_name(status));
}

static PyMethodDef core_methods[] = {
    {"model_open", core_model_open, METH_VARARGS, NULL},
    {"model_open_memory", core_model_open_memory, METH_VARARGS, NULL},
    {"simulation_create", core_simulation_create, METH_VARARGS, NULL},
    {"compressor_create", core_compressor_create, METH_VARARGS, NULL},
    {"fake_quantize", core_fake_quantize, METH_VARARGS, NULL},
    {"fake_quantize_backward", core_fake_quantize_backward, METH_VARARGS, NULL},
    {"encoding_from_range", core_encoding_from_range, METH_VARARGS, NULL},
    {"encoding_to_range", core_encoding_to_range, METH_VARARGS, NULL},
    {"set_thread_count", core_set_thread_count, METH_VARARGS, NULL},
    {"thread_count", core_thread_count, METH_NOARGS, NULL},
    {"version", core_version, METH_NOARGS, NULL},
    {"status_name", core_status_name, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL}};

static PyTypeObject *add_type(PyObject *module, PyType_Spec *spec) {
  PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
  if (type && PyModule_AddType(module, type) < 0) Py_CLEAR(type);
  return type;
}

static int core_exec(PyObject *module) {
  core_state *state = PyModule_GetState(module);
  PyObject *errors = PyImport_ImportModule("halfstep.errors");
  if (!errors) return -1;
  state->make_error = PyObject_GetAttrString(errors, "from_status");
  Py_DECREF(errors);
  if (!state->make_error) return -1;
  state->tensor_type = add_type(module, &tensor_spec);
  state->model_type = add_type(module, &model_spec);
  state->simulation_type = add_type(module, &simulation_spec);
  state->compressor_type = add_type(module, &compressor_spec);
  return state->tensor_type && state->model_type && state->simulation_type && state->compressor_type
             ? 0
             : -1;
}

static int core_traverse(PyObject *module, visitproc visit, void *arg) {
  core_state *state = PyModule_GetState(module);
  Py_VISIT(state->tensor_type);
  Py_VISIT(state->model_type);
  Py_VISIT(state->simulation_type);
  Py_VISIT(state->compressor_type);
  Py_VISIT(state->make_error);
  return 0;
}

static int core_clear(PyObject *module) {
  core_state *state = PyModule_GetState(module);
  Py_CLEAR(state->tensor_type);
  Py_CLEAR(state->model_type);
  Py_CLEAR(state->simulation_type);
  Py_CLEAR(state->compressor_type);
  Py_CLEAR(state->make_error);
  return 0;
}

static PyModuleDef_Slot core_slots[] = {{Py_mod_exec, core_exec}, {0, NULL}};

static struct PyModuleDef core_definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "halfstep._core",
    .m_doc = "Halfstep's C interface as Python objects; see _core.pyi.",
    .m_size = sizeof(core_state),
    .m_methods = core_methods,
    .m_slots = core_slots,
    .m_traverse = core_traverse,
    .m_clear = core_clear,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&core_definition); }
