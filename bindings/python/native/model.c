// SPDX-License-Identifier: Apache-2.0
// The Model type: a handle on hs_model.
#include "model.h"

#include <string.h>

PyObject *model_wrap(core_state *state, hs_model *model) {
  model_object *self = (model_object *)new_object(state->model_type);
  if (!self) {
    hs_model_free(model);
    return NULL;
  }
  self->model = model;
  if (handle_lock_init(&self->lock) < 0) {
    Py_DECREF(self);
    return NULL;
  }
  return (PyObject *)self;
}

hs_model *model_borrow(core_state *state, PyObject *object, handle_lock **out_lock) {
  if (Py_TYPE(object) != state->model_type) {
    PyErr_SetString(PyExc_TypeError, "expected a halfstep._core.Model");
    return NULL;
  }
  *out_lock = &((model_object *)object)->lock;
  return ((model_object *)object)->model;
}

static void model_dealloc(PyObject *object) {
  model_object *self = (model_object *)object;
  hs_model_free(self->model);
  handle_lock_free(&self->lock);
  free_object(object);
}

// ------------------------------------------------------------------------------------------------
// Files

PyObject *core_model_open(PyObject *module, PyObject *args) {
  core_state *state = PyModule_GetState(module);
  PyObject *path;
  if (!PyArg_ParseTuple(args, "O&:model_open", PyUnicode_FSConverter, &path)) return NULL;
  hs_error error;
  hs_model *model = NULL;
  hs_status status;
  Py_BEGIN_ALLOW_THREADS
  status = hs_model_open(PyBytes_AsString(path), NULL, &model, &error);
  Py_END_ALLOW_THREADS
  Py_DECREF(path);
  return status == HS_OK ? model_wrap(state, model) : raise_error(state, &error);
}

PyObject *core_model_open_memory(PyObject *module, PyObject *args) {
  core_state *state = PyModule_GetState(module);
  Py_buffer bytes;
  PyObject *folder = NULL;
  PyObject *folder_argument;
  if (!PyArg_ParseTuple(args, "y*O:model_open_memory", &bytes, &folder_argument)) return NULL;
  if (folder_argument != Py_None && !PyUnicode_FSConverter(folder_argument, &folder)) {
    PyBuffer_Release(&bytes);
    return NULL;
  }
  hs_open_options options;
  hs_open_options_init(&options);
  if (folder) options.external_data_folder = PyBytes_AsString(folder);
  hs_error error;
  hs_model *model = NULL;
  hs_status status;
  Py_BEGIN_ALLOW_THREADS
  status =
      hs_model_open_memory(bytes.buf ? bytes.buf : "", (size_t)bytes.len, &options, &model, &error);
  Py_END_ALLOW_THREADS
  PyBuffer_Release(&bytes);
  Py_XDECREF(folder);
  return status == HS_OK ? model_wrap(state, model) : raise_error(state, &error);
}

static PyObject *model_save(PyObject *object, PyObject *args) {
  model_object *self = (model_object *)object;
  core_state *state = state_of(object);
  PyObject *path;
  int external_data;
  if (!PyArg_ParseTuple(args, "O&p:save", PyUnicode_FSConverter, &path, &external_data)) {
    return NULL;
  }
  if (handle_enter(state, &self->lock) < 0) {
    Py_DECREF(path);
    return NULL;
  }
  hs_save_options options;
  hs_save_options_init(&options);
  options.external_data = external_data;
  hs_error error;
  hs_status status;
  Py_BEGIN_ALLOW_THREADS
  status = hs_model_save(self->model, PyBytes_AsString(path), &options, &error);
  Py_END_ALLOW_THREADS
  handle_leave(&self->lock);
  Py_DECREF(path);
  return none_or_error(state, status, &error);
}

static hs_status serialized_size(void *model, const char *key, size_t *out_size, hs_error *error) {
  (void)key;
  return hs_model_serialized_size(model, out_size, error);
}

static hs_status serialize(void *model, const char *key, void *buffer, size_t capacity,
                           size_t *out_size, hs_error *error) {
  (void)key;
  return hs_model_serialize(model, buffer, capacity, out_size, error);
}

static PyObject *model_serialize(PyObject *object, PyObject *unused) {
  (void)unused;
  model_object *self = (model_object *)object;
  byte_source source = {.handle = self->model, .size = serialized_size, .copy = serialize};
  return bytes_of(state_of(object), &self->lock, &source);
}

static PyObject *model_clone(PyObject *object, PyObject *unused) {
  (void)unused;
  model_object *self = (model_object *)object;
  core_state *state = state_of(object);
  if (handle_enter(state, &self->lock) < 0) return NULL;
  hs_error error;
  hs_model *model = NULL;
  hs_status status;
  Py_BEGIN_ALLOW_THREADS
  status = hs_model_clone(self->model, &model, &error);
  Py_END_ALLOW_THREADS
  handle_leave(&self->lock);
  return status == HS_OK ? model_wrap(state, model) : raise_error(state, &error);
}

// ------------------------------------------------------------------------------------------------
// Tensors

typedef hs_status (*count_fn)(const hs_model *, size_t *, hs_error *);
typedef hs_status (*info_fn)(hs_model *, size_t, hs_value_info *, hs_error *);

static PyObject *info_tuple(const hs_value_info *info) {
  PyObject *name = text_of(info->name);
  PyObject *shape = NULL;
  if (info->rank < 0) {
    shape = Py_None;
    Py_INCREF(shape);
  } else {
    shape = PyTuple_New(info->rank);
    for (int32_t i = 0; shape && i < info->rank; i++) {
      PyObject *extent = PyLong_FromLongLong(info->shape[i]);
      if (!extent || PyTuple_SetItem(shape, i, extent) < 0) Py_CLEAR(shape);
    }
  }
  if (!name || !shape) {
    Py_XDECREF(name);
    Py_XDECREF(shape);
    return NULL;
  }
  return Py_BuildValue("NiN", name, (int)info->dtype, shape);
}

static PyObject *value_infos(PyObject *object, count_fn count_of, info_fn info_of) {
  model_object *self = (model_object *)object;
  core_state *state = state_of(object);
  if (handle_enter(state, &self->lock) < 0) return NULL;
  hs_error error;
  size_t count = 0;
  hs_status status = count_of(self->model, &count, &error);
  PyObject *result = status == HS_OK ? PyList_New(0) : NULL;
  for (size_t i = 0; result && i < count; i++) {
    hs_value_info info;
    status = info_of(self->model, i, &info, &error);
    PyObject *item = status == HS_OK ? info_tuple(&info) : NULL;
    if (!item || PyList_Append(result, item) < 0) Py_CLEAR(result);
    Py_XDECREF(item);
  }
  handle_leave(&self->lock);
  return status == HS_OK ? result : raise_error(state, &error);
}

static PyObject *model_inputs(PyObject *self, PyObject *unused) {
  (void)unused;
  return value_infos(self, hs_model_input_count, hs_model_input);
}

static PyObject *model_outputs(PyObject *self, PyObject *unused) {
  (void)unused;
  return value_infos(self, hs_model_output_count, hs_model_output);
}

static PyObject *model_initializers(PyObject *object, PyObject *unused) {
  (void)unused;
  model_object *self = (model_object *)object;
  core_state *state = state_of(object);
  if (handle_enter(state, &self->lock) < 0) return NULL;
  hs_error error;
  hs_tensors *tensors = NULL;
  hs_status status;
  Py_BEGIN_ALLOW_THREADS
  status = hs_model_initializers(self->model, &tensors, &error);
  Py_END_ALLOW_THREADS
  handle_leave(&self->lock);
  return status == HS_OK ? tensors_to_dict(state, tensors, 0) : raise_error(state, &error);
}

static PyObject *model_set_initializer(PyObject *object, PyObject *args) {
  model_object *self = (model_object *)object;
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
  status = hs_model_set_initializer(self->model, named.name, &named.view, &error);
  Py_END_ALLOW_THREADS
  handle_leave(&self->lock);
  PyBuffer_Release(&named.buffer);
  return none_or_error(state, status, &error);
}

/// Ends a loan of Python's memory; called from any thread, with or without the GIL.
static void release_buffer(void *user_data) {
  // A process that ends takes its memory with it.
  if (!Py_IsInitialized()) return;
  Py_buffer *buffer = user_data;
  PyGILState_STATE gil = PyGILState_Ensure();
  PyBuffer_Release(buffer);
  PyMem_Free(buffer);
  PyGILState_Release(gil);
}

typedef hs_status (*borrow_fn)(hs_model *, const char *, const hs_tensor_view *, hs_release_fn,
                               void *, hs_error *);

static PyObject *set_borrowed(PyObject *object, PyObject *args, borrow_fn borrow, int writes) {
  model_object *self = (model_object *)object;
  core_state *state = state_of(object);
  named_value named;
  if (named_value_acquire(state, args, &named) < 0) return NULL;
  if (writes && named.buffer.readonly) {
    PyBuffer_Release(&named.buffer);
    PyErr_SetString(PyExc_ValueError, "value: expected writable memory");
    return NULL;
  }
  Py_buffer *kept = PyMem_Calloc(1, sizeof *kept);
  if (!kept) PyErr_NoMemory();
  if (!kept || handle_enter(state, &self->lock) < 0) {
    PyMem_Free(kept);
    PyBuffer_Release(&named.buffer);
    return NULL;
  }
  // Whoever lends gets the buffer back by this copy; the view's shape belongs to the exporter.
  *kept = named.buffer;
  hs_error error;
  hs_status status;
  Py_BEGIN_ALLOW_THREADS
  status = borrow(self->model, named.name, &named.view, release_buffer, kept, &error);
  Py_END_ALLOW_THREADS
  handle_leave(&self->lock);
  if (status == HS_OK) Py_RETURN_NONE;
  PyMem_Free(kept);
  PyBuffer_Release(&named.buffer);
  return raise_error(state, &error);
}

static PyObject *model_set_initializer_borrowed(PyObject *object, PyObject *args) {
  return set_borrowed(object, args, hs_model_set_initializer_borrowed, 0);
}

static PyObject *model_set_initializer_lent(PyObject *object, PyObject *args) {
  return set_borrowed(object, args, hs_model_set_initializer_lent, 1);
}

static PyObject *model_take_initializer(PyObject *object, PyObject *args) {
  model_object *self = (model_object *)object;
  core_state *state = state_of(object);
  const char *name;
  if (!PyArg_ParseTuple(args, "s", &name)) return NULL;
  if (handle_enter(state, &self->lock) < 0) return NULL;
  hs_error error;
  hs_tensors *tensors = NULL;
  hs_status status;
  Py_BEGIN_ALLOW_THREADS
  status = hs_model_take_initializer(self->model, name, &tensors, &error);
  Py_END_ALLOW_THREADS
  handle_leave(&self->lock);
  return status == HS_OK ? tensors_to_dict(state, tensors, 0) : raise_error(state, &error);
}

// ------------------------------------------------------------------------------------------------
// Running

static hs_status run(void *model, const inputs *inputs, const hs_run_options *options,
                     hs_tensors **out_outputs, hs_error *error) {
  return hs_model_run(model, inputs->names, inputs->views, inputs->count, options, out_outputs,
                      error);
}

static PyObject *model_run(PyObject *object, PyObject *args) {
  model_object *self = (model_object *)object;
  return run_of(state_of(object), &self->lock, self->model, run, args);
}

// ------------------------------------------------------------------------------------------------
// Inspection and algorithms

static PyObject *floats(const float *values, size_t count) {
  return PyBytes_FromStringAndSize((const char *)values, (Py_ssize_t)(count * sizeof *values));
}

static PyObject *layer_tuple(const hs_layer *layer) {
  PyObject *name = text_of(layer->name);
  PyObject *op_type = text_of(layer->op_type);
  PyObject *weight = text_of(layer->weight);
  PyObject *minimum = floats(layer->channel_minimum, layer->channel_count);
  PyObject *maximum = floats(layer->channel_maximum, layer->channel_count);
  if (name && op_type && weight && minimum && maximum) {
    return Py_BuildValue("NNNNNn", name, op_type, weight, minimum, maximum,
                         (Py_ssize_t)layer->weight_count);
  }
  Py_XDECREF(name);
  Py_XDECREF(op_type);
  Py_XDECREF(weight);
  Py_XDECREF(minimum);
  Py_XDECREF(maximum);
  return NULL;
}

static PyObject *model_inspect(PyObject *object, PyObject *unused) {
  (void)unused;
  model_object *self = (model_object *)object;
  core_state *state = state_of(object);
  if (handle_enter(state, &self->lock) < 0) return NULL;
  hs_error error;
  hs_inspection *inspection = NULL;
  hs_status status;
  Py_BEGIN_ALLOW_THREADS
  status = hs_model_inspect(self->model, &inspection, &error);
  Py_END_ALLOW_THREADS
  handle_leave(&self->lock);
  size_t count = 0;
  if (status == HS_OK) status = hs_inspection_layer_count(inspection, &count, &error);
  PyObject *result = status == HS_OK ? PyList_New(0) : NULL;
  for (size_t i = 0; result && i < count; i++) {
    hs_layer layer;
    status = hs_inspection_layer(inspection, i, &layer, &error);
    PyObject *item = status == HS_OK ? layer_tuple(&layer) : NULL;
    if (!item || PyList_Append(result, item) < 0) Py_CLEAR(result);
    Py_XDECREF(item);
  }
  hs_inspection_free(inspection);
  return status == HS_OK ? result : raise_error(state, &error);
}

static PyObject *model_fold_batch_norms(PyObject *object, PyObject *unused) {
  (void)unused;
  model_object *self = (model_object *)object;
  core_state *state = state_of(object);
  if (handle_enter(state, &self->lock) < 0) return NULL;
  hs_error error;
  hs_fold_report *report = NULL;
  hs_status status;
  Py_BEGIN_ALLOW_THREADS
  status = hs_model_fold_batch_norms(self->model, &report, &error);
  Py_END_ALLOW_THREADS
  handle_leave(&self->lock);
  size_t count = 0;
  if (status == HS_OK) status = hs_fold_report_count(report, &count, &error);
  PyObject *result = status == HS_OK ? PyList_New(0) : NULL;
  for (size_t i = 0; result && i < count; i++) {
    hs_fold fold;
    status = hs_fold_report_get(report, i, &fold, &error);
    PyObject *item = NULL;
    if (status == HS_OK) {
      item = Py_BuildValue("NNN", text_of(fold.layer), text_of(fold.batch_norm),
                           PyBool_FromLong(fold.is_forward));
    }
    if (!item || PyList_Append(result, item) < 0) Py_CLEAR(result);
    Py_XDECREF(item);
  }
  hs_fold_report_free(report);
  return status == HS_OK ? result : raise_error(state, &error);
}

static PyObject *equalized_set_tuple(const hs_equalized_set *set) {
  PyObject *layers = PyTuple_New((Py_ssize_t)set->layer_count);
  for (size_t i = 0; layers && i < set->layer_count; i++) {
    PyObject *layer = text_of(set->layers[i]);
    if (!layer || PyTuple_SetItem(layers, (Py_ssize_t)i, layer) < 0) Py_CLEAR(layers);
  }
  PyObject *factors = PyTuple_New((Py_ssize_t)set->factor_count);
  for (size_t i = 0; factors && i < set->factor_count; i++) {
    PyObject *factor = floats(set->factors[i], set->channel_counts[i]);
    if (!factor || PyTuple_SetItem(factors, (Py_ssize_t)i, factor) < 0) Py_CLEAR(factors);
  }
  if (layers && factors) return Py_BuildValue("NN", layers, factors);
  Py_XDECREF(layers);
  Py_XDECREF(factors);
  return NULL;
}

static PyObject *model_equalize(PyObject *object, PyObject *args) {
  model_object *self = (model_object *)object;
  core_state *state = state_of(object);
  int absorbs_high_biases, maximum_iterations;
  PyObject *callable;
  if (!parse_arguments(state, args, "absorb_high_biases max_iterations progress", "piO:equalize",
                       &absorbs_high_biases, &maximum_iterations, &callable)) {
    return NULL;
  }
  if (handle_enter(state, &self->lock) < 0) return NULL;
  hs_equalization_options options;
  hs_equalization_options_init(&options);
  options.absorbs_high_biases = absorbs_high_biases;
  options.maximum_iterations = maximum_iterations;
  progress_context context = {.callable = callable};
  options.progress = report_progress;
  options.user_data = &context;
  hs_error error;
  hs_equalization_report *report = NULL;
  context.thread = PyEval_SaveThread();
  hs_status status = hs_model_equalize(self->model, &options, &report, &error);
  PyEval_RestoreThread(context.thread);
  handle_leave(&self->lock);
  if (PyErr_Occurred()) {  // what the callback or a signal handler raised
    hs_equalization_report_free(report);
    return NULL;
  }
  size_t count = 0, iterations = 0;
  if (status == HS_OK) status = hs_equalization_report_iterations(report, &iterations, &error);
  if (status == HS_OK) status = hs_equalization_report_count(report, &count, &error);
  PyObject *sets = status == HS_OK ? PyList_New(0) : NULL;
  for (size_t i = 0; sets && i < count; i++) {
    hs_equalized_set set;
    status = hs_equalization_report_get(report, i, &set, &error);
    PyObject *item = status == HS_OK ? equalized_set_tuple(&set) : NULL;
    if (!item || PyList_Append(sets, item) < 0) Py_CLEAR(sets);
    Py_XDECREF(item);
  }
  hs_equalization_report_free(report);
  if (status != HS_OK) return raise_error(state, &error);
  return sets ? Py_BuildValue("nN", (Py_ssize_t)iterations, sets) : NULL;
}

static PyMethodDef model_methods[] = {
    {"save", model_save, METH_VARARGS, NULL},
    {"serialize", model_serialize, METH_NOARGS, NULL},
    {"clone", model_clone, METH_NOARGS, NULL},
    {"inputs", model_inputs, METH_NOARGS, NULL},
    {"outputs", model_outputs, METH_NOARGS, NULL},
    {"initializers", model_initializers, METH_NOARGS, NULL},
    {"set_initializer", model_set_initializer, METH_VARARGS, NULL},
    {"set_initializer_borrowed", model_set_initializer_borrowed, METH_VARARGS, NULL},
    {"set_initializer_lent", model_set_initializer_lent, METH_VARARGS, NULL},
    {"take_initializer", model_take_initializer, METH_VARARGS, NULL},
    {"run", model_run, METH_VARARGS, NULL},
    {"inspect", model_inspect, METH_NOARGS, NULL},
    {"fold_batch_norms", model_fold_batch_norms, METH_NOARGS, NULL},
    {"equalize", model_equalize, METH_VARARGS, NULL},
    {"adaround", model_adaround, METH_VARARGS, NULL},
    {"correct_biases", model_correct_biases, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL}};

static PyType_Slot model_slots[] = {{Py_tp_dealloc, model_dealloc},
                                    {Py_tp_methods, model_methods},
                                    {Py_tp_doc, "A handle on a network."},
                                    {0, NULL}};

PyType_Spec model_spec = {
    .name = "halfstep._core.Model",
    .basicsize = sizeof(model_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = model_slots,
};
