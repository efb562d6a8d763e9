// SPDX-License-Identifier: Apache-2.0
// The Simulation type: a handle on hs_simulation.
#include "simulation.h"

PyObject *core_simulation_create(PyObject *module, PyObject *args) {
  core_state *state = PyModule_GetState(module);
  PyObject *model_object, *configuration, *excluded;
  int parameter_bits, activation_bits, scheme, block_size;
  double percentile;
  if (!parse_arguments(state, args,
                       "model param_bits activation_bits quant_scheme percentile config "
                       "excluded_layers block_size",
                       "OiiidOO!i:simulation_create", &model_object, &parameter_bits,
                       &activation_bits, &scheme, &percentile, &configuration, &PyTuple_Type,
                       &excluded, &block_size)) {
    return NULL;
  }
  handle_lock *model_lock;
  hs_model *model = model_borrow(state, model_object, &model_lock);
  PyObject *path = NULL;
  names layers;
  if (!model || names_acquire(excluded, &layers) < 0) return NULL;
  if (configuration != Py_None && !PyUnicode_FSConverter(configuration, &path)) {
    names_release(&layers);
    return NULL;
  }
  hs_error error;
  hs_status status = HS_ERR_INTERNAL;
  simulation_object *self = (simulation_object *)new_object(state->simulation_type);
  int entered = self && handle_lock_init(&self->lock) == 0 && handle_enter(state, model_lock) == 0;
  if (entered) {
    hs_simulation_options options;
    hs_simulation_options_init(&options);
    options.parameter_bits = parameter_bits;
    options.activation_bits = activation_bits;
    options.scheme = scheme;
    options.percentile = percentile;
    options.configuration = path ? PyBytes_AsString(path) : NULL;
    options.block_size = block_size;
    options.excluded_layers = layers.texts;
    options.excluded_layer_count = layers.count;
    Py_BEGIN_ALLOW_THREADS
    status = hs_simulation_create(model, &options, &self->simulation, &error);
    Py_END_ALLOW_THREADS
    handle_leave(model_lock);
  }
  Py_XDECREF(path);
  names_release(&layers);
  if (entered && status == HS_OK) return (PyObject *)self;
  Py_XDECREF((PyObject *)self);
  return entered ? raise_error(state, &error) : NULL;
}

static void simulation_dealloc(PyObject *object) {
  simulation_object *self = (simulation_object *)object;
  hs_simulation_free(self->simulation);
  handle_lock_free(&self->lock);
  free_object(object);
}

// ------------------------------------------------------------------------------------------------
// Calibration

static PyObject *simulation_observe(PyObject *object, PyObject *values) {
  simulation_object *self = (simulation_object *)object;
  core_state *state = state_of(object);
  inputs inputs;
  if (inputs_acquire(state, values, &inputs) < 0) return NULL;
  if (handle_enter(state, &self->lock) < 0) {
    inputs_release(&inputs);
    return NULL;
  }
  hs_error error;
  hs_status status;
  Py_BEGIN_ALLOW_THREADS
  status =
      hs_simulation_observe(self->simulation, inputs.names, inputs.views, inputs.count, &error);
  Py_END_ALLOW_THREADS
  handle_leave(&self->lock);
  inputs_release(&inputs);
  return none_or_error(state, status, &error);
}

static PyObject *simulation_observe_value(PyObject *object, PyObject *args) {
  simulation_object *self = (simulation_object *)object;
  core_state *state = state_of(object);
  named_value named;
  if (named_value_acquire(state, args, &named) < 0) return NULL;
  if (handle_enter(state, &self->lock) < 0) {
    PyBuffer_Release(&named.buffer);
    return NULL;
  }
  hs_error error;
  hs_status status;
  Py_BEGIN_ALLOW_THREADS
  status = hs_simulation_observe_value(self->simulation, named.name, &named.view, &error);
  Py_END_ALLOW_THREADS
  handle_leave(&self->lock);
  PyBuffer_Release(&named.buffer);
  return none_or_error(state, status, &error);
}

static PyObject *simulation_reset_statistics(PyObject *object, PyObject *unused) {
  (void)unused;
  simulation_object *self = (simulation_object *)object;
  core_state *state = state_of(object);
  if (handle_enter(state, &self->lock) < 0) return NULL;
  hs_error error;
  hs_status status = hs_simulation_reset_statistics(self->simulation, &error);
  handle_leave(&self->lock);
  return none_or_error(state, status, &error);
}

static PyObject *simulation_compute_encodings(PyObject *object, PyObject *unused) {
  (void)unused;
  simulation_object *self = (simulation_object *)object;
  core_state *state = state_of(object);
  if (handle_enter(state, &self->lock) < 0) return NULL;
  hs_error error;
  hs_status status;
  Py_BEGIN_ALLOW_THREADS
  status = hs_simulation_compute_encodings(self->simulation, &error);
  Py_END_ALLOW_THREADS
  handle_leave(&self->lock);
  return none_or_error(state, status, &error);
}

static PyObject *simulation_calibrate(PyObject *object, PyObject *args) {
  simulation_object *self = (simulation_object *)object;
  core_state *state = state_of(object);
  PyObject *values, *callable;
  Py_ssize_t batch_size;
  if (!parse_arguments(state, args, "inputs batch_size progress", "OnO:calibrate", &values,
                       &batch_size, &callable))
    return NULL;
  if (batch_size < 1) {
    return raise_status(state, HS_ERR_INVALID_ARGUMENT, "batch size: expected 1 or more, got %zd",
                        batch_size);
  }
  inputs inputs;
  if (inputs_acquire(state, values, &inputs) < 0) return NULL;
  if (handle_enter(state, &self->lock) < 0) {
    inputs_release(&inputs);
    return NULL;
  }
  progress_context context = {.callable = callable};
  hs_calibration_options options;
  hs_calibration_options_init(&options);
  options.batch_size = (size_t)batch_size;
  options.progress = report_progress;
  options.user_data = &context;
  hs_error error;
  context.thread = PyEval_SaveThread();
  hs_status status = hs_simulation_calibrate(self->simulation, inputs.names, inputs.views,
                                             inputs.count, &options, &error);
  PyEval_RestoreThread(context.thread);
  handle_leave(&self->lock);
  inputs_release(&inputs);
  if (PyErr_Occurred()) return NULL;  // what the callback or a signal handler raised
  return none_or_error(state, status, &error);
}

static hs_status statistics_size(void *simulation, const char *key, size_t *out_size,
                                 hs_error *error) {
  (void)key;
  return hs_simulation_statistics_size(simulation, out_size, error);
}

static hs_status serialize_statistics(void *simulation, const char *key, void *buffer,
                                      size_t capacity, size_t *out_size, hs_error *error) {
  (void)key;
  return hs_simulation_serialize_statistics(simulation, buffer, capacity, out_size, error);
}

static PyObject *simulation_statistics(PyObject *object, PyObject *unused) {
  (void)unused;
  simulation_object *self = (simulation_object *)object;
  byte_source source = {
      .handle = self->simulation, .size = statistics_size, .copy = serialize_statistics};
  return bytes_of(state_of(object), &self->lock, &source);
}

static PyObject *simulation_merge_statistics(PyObject *object, PyObject *args) {
  simulation_object *self = (simulation_object *)object;
  core_state *state = state_of(object);
  Py_buffer bytes;
  if (!PyArg_ParseTuple(args, "y*:merge_statistics", &bytes)) return NULL;
  if (handle_enter(state, &self->lock) < 0) {
    PyBuffer_Release(&bytes);
    return NULL;
  }
  hs_error error;
  hs_status status;
  Py_BEGIN_ALLOW_THREADS
  status = hs_simulation_merge_statistics(self->simulation, bytes.buf ? bytes.buf : "",
                                          (size_t)bytes.len, &error);
  Py_END_ALLOW_THREADS
  handle_leave(&self->lock);
  PyBuffer_Release(&bytes);
  return none_or_error(state, status, &error);
}

// ------------------------------------------------------------------------------------------------
// Running

static hs_status run(void *simulation, const inputs *inputs, const hs_run_options *options,
                     hs_tensors **out_outputs, hs_error *error) {
  return hs_simulation_run(simulation, inputs->names, inputs->views, inputs->count, options,
                           out_outputs, error);
}

static PyObject *simulation_run(PyObject *object, PyObject *args) {
  simulation_object *self = (simulation_object *)object;
  return run_of(state_of(object), &self->lock, self->simulation, run, args);
}

// ------------------------------------------------------------------------------------------------
// Files

static hs_status encodings_size(void *simulation, const char *version, size_t *out_size,
                                hs_error *error) {
  return hs_simulation_encodings_size(simulation, version, out_size, error);
}

static hs_status encodings_json(void *simulation, const char *version, void *buffer,
                                size_t capacity, size_t *out_size, hs_error *error) {
  return hs_simulation_encodings_json(simulation, version, buffer, capacity, out_size, error);
}

static PyObject *simulation_encodings_json(PyObject *object, PyObject *version_object) {
  simulation_object *self = (simulation_object *)object;
  const char *version = utf8_of(version_object, "version");
  if (!version) return NULL;
  byte_source source = {
      .handle = self->simulation, .key = version, .size = encodings_size, .copy = encodings_json};
  return bytes_of(state_of(object), &self->lock, &source);
}

static PyObject *simulation_export(PyObject *object, PyObject *args) {
  simulation_object *self = (simulation_object *)object;
  core_state *state = state_of(object);
  PyObject *folder, *prefix_object, *version_object;
  if (!PyArg_ParseTuple(args, "O&OO:export", PyUnicode_FSConverter, &folder, &prefix_object,
                        &version_object)) {
    return NULL;
  }
  const char *prefix = utf8_of(prefix_object, "prefix");
  const char *version = prefix ? utf8_of(version_object, "version") : NULL;
  if (!version || handle_enter(state, &self->lock) < 0) {
    Py_DECREF(folder);
    return NULL;
  }
  hs_error error;
  hs_status status;
  Py_BEGIN_ALLOW_THREADS
  status =
      hs_simulation_export(self->simulation, PyBytes_AsString(folder), prefix, version, &error);
  Py_END_ALLOW_THREADS
  handle_leave(&self->lock);
  Py_DECREF(folder);
  return none_or_error(state, status, &error);
}

static PyObject *simulation_export_qdq(PyObject *object, PyObject *args) {
  simulation_object *self = (simulation_object *)object;
  core_state *state = state_of(object);
  PyObject *path;
  int prequantizes_constants, exports_int32_bias;
  if (!PyArg_ParseTuple(args, "O&pp:export_qdq", PyUnicode_FSConverter, &path,
                        &prequantizes_constants, &exports_int32_bias)) {
    return NULL;
  }
  if (handle_enter(state, &self->lock) < 0) {
    Py_DECREF(path);
    return NULL;
  }
  hs_qdq_options options;
  hs_qdq_options_init(&options);
  options.prequantizes_constants = prequantizes_constants;
  options.exports_int32_bias = exports_int32_bias;
  hs_error error;
  hs_status status;
  Py_BEGIN_ALLOW_THREADS
  status = hs_simulation_export_qdq(self->simulation, PyBytes_AsString(path), &options, &error);
  Py_END_ALLOW_THREADS
  handle_leave(&self->lock);
  Py_DECREF(path);
  return none_or_error(state, status, &error);
}

static PyObject *mismatches(core_state *state, const hs_load_report *report,
                            hs_load_mismatch kind) {
  hs_error error;
  size_t count = 0;
  if (hs_load_report_count(report, kind, &count, &error) != HS_OK) {
    return raise_error(state, &error);
  }
  PyObject *result = PyTuple_New((Py_ssize_t)count);
  for (size_t i = 0; result && i < count; i++) {
    const char *text;
    if (hs_load_report_get(report, kind, i, &text, &error) != HS_OK) {
      Py_DECREF(result);
      return raise_error(state, &error);
    }
    PyObject *item = text_of(text);
    if (!item || PyTuple_SetItem(result, (Py_ssize_t)i, item) < 0) Py_CLEAR(result);
  }
  return result;
}

static PyObject *simulation_load_encodings(PyObject *object, PyObject *args) {
  simulation_object *self = (simulation_object *)object;
  core_state *state = state_of(object);
  Py_buffer bytes;
  int strict;
  if (!PyArg_ParseTuple(args, "y*p:load_encodings", &bytes, &strict)) return NULL;
  if (handle_enter(state, &self->lock) < 0) {
    PyBuffer_Release(&bytes);
    return NULL;
  }
  hs_error error;
  hs_status status;
  hs_load_report *report = NULL;
  Py_BEGIN_ALLOW_THREADS
  status = hs_simulation_load_encodings(self->simulation, bytes.buf ? bytes.buf : "",
                                        (size_t)bytes.len, strict, &report, &error);
  Py_END_ALLOW_THREADS
  handle_leave(&self->lock);
  PyBuffer_Release(&bytes);
  if (status != HS_OK) return raise_error(state, &error);
  PyObject *unknown = mismatches(state, report, HS_LOAD_MISMATCH_UNKNOWN);
  PyObject *missing = unknown ? mismatches(state, report, HS_LOAD_MISMATCH_MISSING) : NULL;
  PyObject *different = missing ? mismatches(state, report, HS_LOAD_MISMATCH_DIFFERENT) : NULL;
  hs_load_report_free(report);
  if (different) return Py_BuildValue("NNN", unknown, missing, different);
  Py_XDECREF(unknown);
  Py_XDECREF(missing);
  return NULL;
}

static PyMethodDef simulation_methods[] = {
    {"observe", simulation_observe, METH_O, NULL},
    {"observe_value", simulation_observe_value, METH_VARARGS, NULL},
    {"reset_statistics", simulation_reset_statistics, METH_NOARGS, NULL},
    {"compute_encodings", simulation_compute_encodings, METH_NOARGS, NULL},
    {"calibrate", simulation_calibrate, METH_VARARGS, NULL},
    {"statistics", simulation_statistics, METH_NOARGS, NULL},
    {"merge_statistics", simulation_merge_statistics, METH_VARARGS, NULL},
    {"run", simulation_run, METH_VARARGS, NULL},
    {"quantizers", simulation_quantizers, METH_NOARGS, NULL},
    {"encoding", simulation_encoding, METH_O, NULL},
    {"parameter_encoding", simulation_parameter_encoding, METH_VARARGS, NULL},
    {"set_encoding", simulation_set_encoding, METH_VARARGS, NULL},
    {"set_enabled", simulation_set_enabled, METH_VARARGS, NULL},
    {"set_frozen", simulation_set_frozen, METH_VARARGS, NULL},
    {"set_precision", simulation_set_precision, METH_VARARGS, NULL},
    {"set_range", simulation_set_range, METH_VARARGS, NULL},
    {"encodings_json", simulation_encodings_json, METH_O, NULL},
    {"export", simulation_export, METH_VARARGS, NULL},
    {"export_qdq", simulation_export_qdq, METH_VARARGS, NULL},
    {"load_encodings", simulation_load_encodings, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL}};

static PyType_Slot simulation_slots[] = {{Py_tp_dealloc, simulation_dealloc},
                                         {Py_tp_methods, simulation_methods},
                                         {Py_tp_doc, "A handle on a simulated network."},
                                         {0, NULL}};

PyType_Spec simulation_spec = {
    .name = "halfstep._core.Simulation",
    .basicsize = sizeof(simulation_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = simulation_slots,
};
