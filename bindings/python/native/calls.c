// SPDX-License-Identifier: Apache-2.0
// What the methods of several types do alike around a call of the library.
#include "core.h"

PyObject *none_or_error(core_state *state, hs_status status, const hs_error *error) {
  if (status != HS_OK) return raise_error(state, error);
  Py_RETURN_NONE;
}

PyObject *bytes_of(core_state *state, handle_lock *lock, const byte_source *source) {
  if (handle_enter(state, lock) < 0) return NULL;
  hs_error error;
  hs_status status;
  size_t size = 0;
  Py_BEGIN_ALLOW_THREADS
  status = source->size(source->handle, source->key, &size, &error);
  Py_END_ALLOW_THREADS
  PyObject *bytes = status == HS_OK ? PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size) : NULL;
  if (bytes) {
    char *buffer = PyBytes_AsString(bytes);
    Py_BEGIN_ALLOW_THREADS
    status = source->copy(source->handle, source->key, buffer, size, &size, &error);
    Py_END_ALLOW_THREADS
    if (status != HS_OK) Py_CLEAR(bytes);
  }
  handle_leave(lock);
  return status == HS_OK ? bytes : raise_error(state, &error);
}

PyObject *run_of(core_state *state, handle_lock *lock, void *handle, run_fn run, PyObject *args) {
  PyObject *values, *extra;
  if (!PyArg_ParseTuple(args, "OO!:run", &values, &PyTuple_Type, &extra)) return NULL;
  names names;
  inputs inputs;
  if (names_acquire(extra, &names) < 0) return NULL;
  if (inputs_acquire(state, values, &inputs) < 0) {
    names_release(&names);
    return NULL;
  }
  hs_run_options options;
  hs_run_options_init(&options);
  options.extra_outputs = names.texts;
  options.extra_output_count = names.count;
  hs_tensors *outputs = NULL;
  hs_error error;
  hs_status status = HS_ERR_INTERNAL;
  int entered = handle_enter(state, lock) == 0;
  if (entered) {
    Py_BEGIN_ALLOW_THREADS
    status = run(handle, &inputs, &options, &outputs, &error);
    Py_END_ALLOW_THREADS
    handle_leave(lock);
  }
  inputs_release(&inputs);
  names_release(&names);
  if (!entered) return NULL;
  return status == HS_OK ? tensors_to_dict(state, outputs, 1) : raise_error(state, &error);
}

int32_t report_progress(size_t completed, size_t total, void *user_data) {
  progress_context *context = user_data;
  PyEval_RestoreThread(context->thread);
  int32_t result = PyErr_CheckSignals() < 0;
  if (!result && context->callable != Py_None) {
    PyObject *answer =
        PyObject_CallFunction(context->callable, "nn", (Py_ssize_t)completed, (Py_ssize_t)total);
    result = !answer || answer == Py_False;
    Py_XDECREF(answer);
  }
  context->thread = PyEval_SaveThread();
  return result;
}
