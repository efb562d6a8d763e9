// SPDX-License-Identifier: Apache-2.0
// The Compressor type: a handle on hs_compressor.
#include "core.h"

typedef struct compressor_object {
  PyObject_HEAD hs_compressor *compressor;
  handle_lock lock;
} compressor_object;

static void compressor_dealloc(PyObject *object) {
  compressor_object *self = (compressor_object *)object;
  hs_compressor_free(self->compressor);
  handle_lock_free(&self->lock);
  free_object(object);
}

static PyObject *compressor_wrap(core_state *state, hs_compressor *compressor) {
  compressor_object *self = (compressor_object *)new_object(state->compressor_type);
  if (!self) {
    hs_compressor_free(compressor);
    return NULL;
  }
  self->compressor = compressor;
  if (handle_lock_init(&self->lock) < 0) {
    Py_DECREF(self);
    return NULL;
  }
  return (PyObject *)self;
}

// Shapes of inputs as the library takes them.
typedef struct shapes {
  const int64_t **extents;
  int32_t *ranks;
  size_t count;
} shapes;

static void shapes_release(shapes *shapes) {
  for (size_t i = 0; shapes->extents && i < shapes->count; i++)
    PyMem_Free((void *)shapes->extents[i]);
  PyMem_Free((void *)shapes->extents);
  PyMem_Free(shapes->ranks);
}

static int shapes_acquire(core_state *state, PyObject *tuple, size_t count, shapes *out) {
  out->count = count;
  out->extents = PyMem_Calloc(count + 1, sizeof *out->extents);
  out->ranks = PyMem_Calloc(count + 1, sizeof *out->ranks);
  if (!out->extents || !out->ranks || (size_t)PyTuple_Size(tuple) != count) {
    shapes_release(out);
    if (!PyErr_Occurred()) PyErr_NoMemory();
    return -1;
  }
  for (size_t i = 0; i < count; i++) {
    PyObject *shape = PyTuple_GetItem(tuple, (Py_ssize_t)i);
    Py_ssize_t rank = shape ? PyTuple_Size(shape) : -1;
    int64_t *extents = rank < 0 ? NULL : PyMem_Calloc((size_t)rank + 1, sizeof *extents);
    if (!extents && !PyErr_Occurred()) PyErr_NoMemory();
    out->extents[i] = extents;
    out->ranks[i] = (int32_t)rank;
    for (Py_ssize_t axis = 0; extents && axis < rank; axis++) {
      if (integer_of(state, PyTuple_GetItem(shape, axis), "input_shapes", &extents[axis]) < 0)
        break;
    }
    if (PyErr_Occurred()) {
      shapes_release(out);
      return -1;
    }
  }
  return 0;
}

PyObject *core_compressor_create(PyObject *module, PyObject *args) {
  core_state *state = PyModule_GetState(module);
  PyObject *model_object, *ignored, *input_names, *input_shapes, *input_keepers;
  int scheme, metric, importance, reconstructs, keeps_positions;
  long long multiplicity;
  if (!parse_arguments(state, args,
                       "model scheme metric multiplicity ignored input_names input_shapes "
                       "importance reconstructs input_keepers keeps_positions",
                       "OiiLO!O!O!ipO!p:compressor_create", &model_object, &scheme, &metric,
                       &multiplicity, &PyTuple_Type, &ignored, &PyTuple_Type, &input_names,
                       &PyTuple_Type, &input_shapes, &importance, &reconstructs, &PyTuple_Type,
                       &input_keepers, &keeps_positions)) {
    return NULL;
  }
  handle_lock *lock;
  hs_model *model = model_borrow(state, model_object, &lock);
  if (!model) return NULL;
  names layers, inputs, keepers;
  shapes shapes;
  if (names_acquire(ignored, &layers) < 0) return NULL;
  if (names_acquire(input_names, &inputs) < 0) {
    names_release(&layers);
    return NULL;
  }
  if (names_acquire(input_keepers, &keepers) < 0) {
    names_release(&layers);
    names_release(&inputs);
    return NULL;
  }
  if (shapes_acquire(state, input_shapes, inputs.count, &shapes) < 0) {
    names_release(&layers);
    names_release(&inputs);
    names_release(&keepers);
    return NULL;
  }
  hs_compression_options options;
  hs_compression_options_init(&options);
  options.scheme = scheme;
  options.metric = metric;
  options.multiplicity = multiplicity;
  options.importance = importance;
  options.without_reconstruction = !reconstructs;
  options.ignored_layers = layers.texts;
  options.ignored_layer_count = layers.count;
  options.input_names = inputs.texts;
  options.input_shapes = shapes.extents;
  options.input_ranks = shapes.ranks;
  options.input_count = inputs.count;
  options.input_keepers = keepers.texts;
  options.input_keeper_count = keepers.count;
  options.keeps_positions = keeps_positions;
  hs_error error;
  hs_compressor *compressor = NULL;
  hs_status status = HS_ERR_INTERNAL;
  int entered = handle_enter(state, lock) == 0;
  if (entered) {
    Py_BEGIN_ALLOW_THREADS
    status = hs_compressor_create(model, &options, &compressor, &error);
    Py_END_ALLOW_THREADS
    handle_leave(lock);
  }
  shapes_release(&shapes);
  names_release(&keepers);
  names_release(&inputs);
  names_release(&layers);
  if (!entered) return NULL;
  return status == HS_OK ? compressor_wrap(state, compressor) : raise_error(state, &error);
}

// ------------------------------------------------------------------------------------------------
// Lists

typedef hs_status (*count_fn)(const hs_compressor *, size_t *, hs_error *);
typedef hs_status (*item_fn)(const hs_compressor *, size_t, PyObject **, hs_error *);

static hs_status cost_item(const hs_compressor *compressor, size_t index, PyObject **out,
                           hs_error *error) {
  hs_layer_cost cost;
  hs_status status = hs_compressor_cost(compressor, index, &cost, error);
  if (status == HS_OK) {
    *out = Py_BuildValue("NNNLL", text_of(cost.name), text_of(cost.op_type), text_of(cost.weight),
                         (long long)cost.macs, (long long)cost.parameters);
  }
  return status;
}

static hs_status layer_item(const hs_compressor *compressor, size_t index, PyObject **out,
                            hs_error *error) {
  hs_compressible_layer layer;
  hs_status status = hs_compressor_layer(compressor, index, &layer, error);
  if (status == HS_OK) {
    *out = Py_BuildValue("NNNLLL", text_of(layer.name), text_of(layer.op_type),
                         text_of(layer.weight), (long long)layer.macs, (long long)layer.parameters,
                         (long long)layer.maximum_units);
  }
  return status;
}

static hs_status refusal_item(const hs_compressor *compressor, size_t index, PyObject **out,
                              hs_error *error) {
  hs_compression_refusal refusal;
  hs_status status = hs_compressor_refusal(compressor, index, &refusal, error);
  if (status == HS_OK) {
    *out = Py_BuildValue("NN", text_of(refusal.layer), text_of(refusal.reason));
  }
  return status;
}

static PyObject *list_of(PyObject *object, count_fn count_of, item_fn item_of) {
  compressor_object *self = (compressor_object *)object;
  core_state *state = state_of(object);
  if (handle_enter(state, &self->lock) < 0) return NULL;
  hs_error error;
  size_t count = 0;
  hs_status status = count_of(self->compressor, &count, &error);
  PyObject *result = status == HS_OK ? PyList_New(0) : NULL;
  for (size_t i = 0; result && i < count; i++) {
    PyObject *item = NULL;
    status = item_of(self->compressor, i, &item, &error);
    if (!item || PyList_Append(result, item) < 0) Py_CLEAR(result);
    Py_XDECREF(item);
  }
  handle_leave(&self->lock);
  return status == HS_OK ? result : raise_error(state, &error);
}

static PyObject *compressor_costs(PyObject *self, PyObject *unused) {
  (void)unused;
  return list_of(self, hs_compressor_cost_count, cost_item);
}

static PyObject *compressor_layers(PyObject *self, PyObject *unused) {
  (void)unused;
  return list_of(self, hs_compressor_layer_count, layer_item);
}

static PyObject *compressor_refusals(PyObject *self, PyObject *unused) {
  (void)unused;
  return list_of(self, hs_compressor_refusal_count, refusal_item);
}

// ------------------------------------------------------------------------------------------------
// Sizes

static PyObject *compressor_find(PyObject *object, PyObject *args) {
  compressor_object *self = (compressor_object *)object;
  core_state *state = state_of(object);
  PyObject *name_object;
  if (!PyArg_ParseTuple(args, "O:find", &name_object)) return NULL;
  const char *name = utf8_of(name_object, "name of a layer");
  if (!name || handle_enter(state, &self->lock) < 0) return NULL;
  hs_error error;
  size_t index = 0;
  hs_status status = hs_compressor_find(self->compressor, name, &index, &error);
  handle_leave(&self->lock);
  return status == HS_OK ? PyLong_FromSize_t(index) : raise_error(state, &error);
}

// A list of positions from a function that first counts and then fills a buffer. By NAME, what a
// layer reads; without one, those that have ROLE at INDEX.
static PyObject *position_list(compressor_object *self, const char *name, size_t index,
                               hs_channel_role role) {
  core_state *state = state_of((PyObject *)self);
  if (handle_enter(state, &self->lock) < 0) return NULL;
  hs_error error;
  hs_status status = HS_OK;
  size_t count = 0;
  size_t *found = NULL;
  for (int pass = 0; pass < 2 && status == HS_OK; pass++) {
    size_t capacity = count;
    if (pass && !(found = PyMem_Calloc(count + 1, sizeof *found))) break;
    status = name ? hs_compressor_find_read(self->compressor, name, found, capacity, &count, &error)
                  : hs_compressor_members(self->compressor, index, role, found, capacity, &count,
                                          &error);
  }
  handle_leave(&self->lock);
  if (status != HS_OK) {
    PyMem_Free(found);
    return raise_error(state, &error);
  }
  if (!found) return PyErr_NoMemory();
  PyObject *list = PyList_New((Py_ssize_t)count);
  for (size_t i = 0; list && i < count; i++) {
    PyObject *item = PyLong_FromSize_t(found[i]);
    if (!item || PyList_SetItem(list, (Py_ssize_t)i, item) < 0) Py_CLEAR(list);
  }
  PyMem_Free(found);
  return list;
}

static PyObject *compressor_find_read(PyObject *object, PyObject *args) {
  PyObject *name_object;
  if (!PyArg_ParseTuple(args, "O:find_read", &name_object)) return NULL;
  const char *name = utf8_of(name_object, "name of a layer");
  return name ? position_list((compressor_object *)object, name, 0, 0) : NULL;
}

static PyObject *compressor_members(PyObject *object, PyObject *args) {
  Py_ssize_t index;
  int role;
  if (!PyArg_ParseTuple(args, "ni:members", &index, &role)) return NULL;
  return position_list((compressor_object *)object, NULL, (size_t)index, role);
}

static PyObject *compressor_units(PyObject *object, PyObject *args) {
  compressor_object *self = (compressor_object *)object;
  core_state *state = state_of(object);
  Py_ssize_t index;
  double ratio;
  if (!parse_arguments(state, args, "layer ratio", "nd:units", &index, &ratio)) return NULL;
  if (handle_enter(state, &self->lock) < 0) return NULL;
  hs_error error;
  int64_t units = 0;
  hs_status status = hs_compressor_units(self->compressor, (size_t)index, ratio, &units, &error);
  handle_leave(&self->lock);
  return status == HS_OK ? PyLong_FromLongLong(units) : raise_error(state, &error);
}

static PyObject *compressor_ratio(PyObject *object, PyObject *args) {
  compressor_object *self = (compressor_object *)object;
  core_state *state = state_of(object);
  Py_ssize_t index;
  long long units;
  if (!parse_arguments(state, args, "layer units", "nL:ratio", &index, &units)) return NULL;
  if (handle_enter(state, &self->lock) < 0) return NULL;
  hs_error error;
  double ratio = 0;
  hs_status status = hs_compressor_ratio(self->compressor, (size_t)index, units, &ratio, &error);
  handle_leave(&self->lock);
  return status == HS_OK ? PyFloat_FromDouble(ratio) : raise_error(state, &error);
}

static PyObject *units_list(const int64_t *units, size_t count) {
  PyObject *list = PyList_New((Py_ssize_t)count);
  for (size_t i = 0; list && i < count; i++) {
    PyObject *item = PyLong_FromLongLong(units[i]);
    if (!item || PyList_SetItem(list, (Py_ssize_t)i, item) < 0) Py_CLEAR(list);
  }
  return list;
}

/// Room for a size of each layer, and their number; NULL if it raised.
static int64_t *units_buffer(compressor_object *self, size_t *out_count) {
  hs_error error;
  if (hs_compressor_layer_count(self->compressor, out_count, &error) != HS_OK) {
    raise_error(state_of((PyObject *)self), &error);
    return NULL;
  }
  int64_t *units = PyMem_Calloc(*out_count + 1, sizeof *units);
  if (!units) PyErr_NoMemory();
  return units;
}

static PyObject *compressor_select(PyObject *object, PyObject *args) {
  compressor_object *self = (compressor_object *)object;
  core_state *state = state_of(object);
  double target;
  PyObject *callable;
  if (!parse_arguments(state, args, "target progress", "dO:select", &target, &callable))
    return NULL;
  size_t count;
  int64_t *units = units_buffer(self, &count);
  if (!units || handle_enter(state, &self->lock) < 0) {
    PyMem_Free(units);
    return NULL;
  }
  progress_context context = {.callable = callable};
  hs_error error;
  context.thread = PyEval_SaveThread();
  hs_status status = hs_compressor_select(self->compressor, target, report_progress, &context,
                                          units, count, &error);
  PyEval_RestoreThread(context.thread);
  handle_leave(&self->lock);
  PyObject *result = NULL;
  if (!PyErr_Occurred()) {
    result = status == HS_OK ? units_list(units, count) : raise_error(state, &error);
  }
  PyMem_Free(units);
  return result;
}

static PyObject *compressor_select_greedy(PyObject *object, PyObject *args) {
  compressor_object *self = (compressor_object *)object;
  core_state *state = state_of(object);
  double target;
  Py_buffer ratios, scores;
  int monotonic;
  if (!parse_arguments(state, args, "target ratios scores monotonic", "dy*y*p:select_greedy",
                       &target, &ratios, &scores, &monotonic)) {
    return NULL;
  }
  size_t candidates = (size_t)ratios.len / sizeof(double);
  size_t count = 0;
  PyObject *result = NULL;
  int64_t *units = units_buffer(self, &count);
  if (units && (size_t)scores.len != count * candidates * sizeof(double)) {
    raise_status(state, HS_ERR_INVALID_ARGUMENT, "scores: expected %zu of them, got %zu",
                 count * candidates, (size_t)scores.len / sizeof(double));
  } else if (units && handle_enter(state, &self->lock) == 0) {
    hs_error error;
    hs_status status;
    Py_BEGIN_ALLOW_THREADS
    status = hs_compressor_select_greedy(self->compressor, target, ratios.buf, scores.buf,
                                         candidates, monotonic, units, count, &error);
    Py_END_ALLOW_THREADS
    handle_leave(&self->lock);
    result = status == HS_OK ? units_list(units, count) : raise_error(state, &error);
  }
  PyMem_Free(units);
  PyBuffer_Release(&ratios);
  PyBuffer_Release(&scores);
  return result;
}

// ------------------------------------------------------------------------------------------------
// Data

static PyObject *compressor_calibrate(PyObject *object, PyObject *args) {
  compressor_object *self = (compressor_object *)object;
  core_state *state = state_of(object);
  PyObject *values;
  if (!PyArg_ParseTuple(args, "O:calibrate", &values)) return NULL;
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
      hs_compressor_calibrate(self->compressor, inputs.names, inputs.views, inputs.count, &error);
  Py_END_ALLOW_THREADS
  handle_leave(&self->lock);
  inputs_release(&inputs);
  return none_or_error(state, status, &error);
}

static PyObject *compressor_errors(PyObject *object, PyObject *args) {
  compressor_object *self = (compressor_object *)object;
  core_state *state = state_of(object);
  Py_ssize_t index;
  PyObject *callable;
  if (!parse_arguments(state, args, "layer progress", "nO:errors", &index, &callable)) return NULL;
  if (handle_enter(state, &self->lock) < 0) return NULL;
  progress_context context = {.callable = callable};
  hs_error error;
  size_t count = 0;
  context.thread = PyEval_SaveThread();
  hs_status status = hs_compressor_errors(self->compressor, (size_t)index, report_progress,
                                          &context, NULL, 0, &count, &error);
  PyEval_RestoreThread(context.thread);
  double *errors = NULL;
  if (!PyErr_Occurred() && status == HS_OK) {
    errors = PyMem_Calloc(count + 1, sizeof *errors);
    if (!errors) PyErr_NoMemory();
  }
  // The curves are known now: the second call only copies.
  if (errors) {
    status = hs_compressor_errors(self->compressor, (size_t)index, NULL, NULL, errors, count,
                                  &count, &error);
  }
  handle_leave(&self->lock);
  PyObject *list = NULL;
  if (errors && status == HS_OK) list = PyList_New((Py_ssize_t)count);
  for (size_t i = 0; list && i < count; i++) {
    PyObject *item = PyFloat_FromDouble(errors[i]);
    if (!item || PyList_SetItem(list, (Py_ssize_t)i, item) < 0) Py_CLEAR(list);
  }
  PyMem_Free(errors);
  return list || PyErr_Occurred() ? list : raise_error(state, &error);
}

// ------------------------------------------------------------------------------------------------
// Compression

static PyObject *compressed_tuple(const hs_compressed_layer *layer) {
  return Py_BuildValue(
      "NNLLLLLLNNNNdd", text_of(layer->name), text_of(layer->op_type), (long long)layer->units,
      (long long)layer->maximum_units, (long long)layer->macs_before, (long long)layer->macs_after,
      (long long)layer->parameters_before, (long long)layer->parameters_after,
      text_of(layer->weight), text_of(layer->first_weight), text_of(layer->second_weight),
      text_of(layer->bias), layer->noise_plain, layer->noise_kept);
}

static PyObject *constant_tuple(const hs_pruned_constant *constant) {
  PyObject *kept = PyTuple_New((Py_ssize_t)constant->kept_count);
  for (size_t i = 0; kept && i < constant->kept_count; i++) {
    PyObject *item = PyLong_FromLongLong(constant->kept[i]);
    if (!item || PyTuple_SetItem(kept, (Py_ssize_t)i, item) < 0) Py_CLEAR(kept);
  }
  if (!kept) return NULL;
  return Py_BuildValue("NNLN", text_of(constant->name), text_of(constant->result),
                       (long long)constant->axis, kept);
}

static PyObject *compressor_compress(PyObject *object, PyObject *args) {
  compressor_object *self = (compressor_object *)object;
  core_state *state = state_of(object);
  PyObject *sizes, *callable;
  if (!PyArg_ParseTuple(args, "O!O:compress", &PyTuple_Type, &sizes, &callable)) return NULL;
  size_t count = (size_t)PyTuple_Size(sizes);
  int64_t *units = PyMem_Calloc(count + 1, sizeof *units);
  if (!units) return PyErr_NoMemory();
  for (size_t i = 0; i < count; i++) {
    if (integer_of(state, PyTuple_GetItem(sizes, (Py_ssize_t)i), "units", &units[i]) < 0) break;
  }
  if (PyErr_Occurred() || handle_enter(state, &self->lock) < 0) {
    PyMem_Free(units);
    return NULL;
  }
  progress_context context = {.callable = callable};
  hs_error error;
  hs_model *model = NULL;
  hs_compression_report *report = NULL;
  context.thread = PyEval_SaveThread();
  hs_status status = hs_compressor_compress(self->compressor, units, count, report_progress,
                                            &context, &model, &report, &error);
  PyEval_RestoreThread(context.thread);
  handle_leave(&self->lock);
  PyMem_Free(units);
  if (PyErr_Occurred()) {  // what the callback or a signal handler raised
    hs_model_free(model);
    hs_compression_report_free(report);
    return NULL;
  }
  if (status != HS_OK) return raise_error(state, &error);
  PyObject *wrapped = model_wrap(state, model);
  PyObject *total = NULL;
  PyObject *layers = wrapped ? PyList_New(0) : NULL;
  hs_compressed_layer item;
  status = hs_compression_report_total(report, &item, &error);
  if (status == HS_OK) total = compressed_tuple(&item);
  size_t layer_count = 0;
  if (status == HS_OK) status = hs_compression_report_count(report, &layer_count, &error);
  for (size_t i = 0; layers && i < layer_count; i++) {
    status = hs_compression_report_get(report, i, &item, &error);
    PyObject *tuple = status == HS_OK ? compressed_tuple(&item) : NULL;
    if (!tuple || PyList_Append(layers, tuple) < 0) Py_CLEAR(layers);
    Py_XDECREF(tuple);
  }
  PyObject *constants = layers ? PyList_New(0) : NULL;
  size_t constant_count = 0;
  if (constants) status = hs_compression_report_constant_count(report, &constant_count, &error);
  for (size_t i = 0; constants && i < constant_count; i++) {
    hs_pruned_constant constant;
    status = hs_compression_report_constant(report, i, &constant, &error);
    PyObject *tuple = status == HS_OK ? constant_tuple(&constant) : NULL;
    if (!tuple || PyList_Append(constants, tuple) < 0) Py_CLEAR(constants);
    Py_XDECREF(tuple);
  }
  hs_compression_report_free(report);
  if (wrapped && total && layers && constants) {
    return Py_BuildValue("NNNN", wrapped, total, layers, constants);
  }
  Py_XDECREF(constants);
  Py_XDECREF(wrapped);
  Py_XDECREF(total);
  Py_XDECREF(layers);
  return PyErr_Occurred() ? NULL : raise_error(state, &error);
}

static PyMethodDef compressor_methods[] = {
    {"costs", compressor_costs, METH_NOARGS, NULL},
    {"layers", compressor_layers, METH_NOARGS, NULL},
    {"refusals", compressor_refusals, METH_NOARGS, NULL},
    {"find", compressor_find, METH_VARARGS, NULL},
    {"find_read", compressor_find_read, METH_VARARGS, NULL},
    {"members", compressor_members, METH_VARARGS, NULL},
    {"units", compressor_units, METH_VARARGS, NULL},
    {"ratio", compressor_ratio, METH_VARARGS, NULL},
    {"calibrate", compressor_calibrate, METH_VARARGS, NULL},
    {"errors", compressor_errors, METH_VARARGS, NULL},
    {"select", compressor_select, METH_VARARGS, NULL},
    {"select_greedy", compressor_select_greedy, METH_VARARGS, NULL},
    {"compress", compressor_compress, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL}};

static PyType_Slot compressor_slots[] = {{Py_tp_dealloc, compressor_dealloc},
                                         {Py_tp_methods, compressor_methods},
                                         {Py_tp_doc, "A handle on a compressor."},
                                         {0, NULL}};

PyType_Spec compressor_spec = {
    .name = "halfstep._core.Compressor",
    .basicsize = sizeof(compressor_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = compressor_slots,
};
