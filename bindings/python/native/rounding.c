// SPDX-License-Identifier: Apache-2.0
// Rounding and bias correction of the Model type.
#include <string.h>

#include "model.h"

static PyObject *rounded_layers(core_state *state, hs_rounding_report *report) {
  hs_error error;
  size_t count = 0;
  hs_status status = hs_rounding_report_count(report, &count, &error);
  PyObject *layers = status == HS_OK ? PyList_New(0) : NULL;
  for (size_t i = 0; layers && i < count; i++) {
    hs_rounded_layer layer;
    status = hs_rounding_report_get(report, i, &layer, &error);
    PyObject *item = NULL;
    if (status == HS_OK) {
      item = Py_BuildValue("NNiddN", text_of(layer.layer), text_of(layer.weight), (int)layer.bits,
                           layer.noise_before, layer.noise_after, text_of(layer.kept));
    }
    if (!item || PyList_Append(layers, item) < 0) Py_CLEAR(layers);
    Py_XDECREF(item);
  }
  hs_rounding_report_free(report);
  return status == HS_OK ? layers : raise_error(state, &error);
}

/// An hs_rounding_progress_fn that calls a Python callable, as report_progress() does another.
static int32_t report_details(const hs_rounding_progress *progress, void *user_data) {
  progress_context *context = user_data;
  PyEval_RestoreThread(context->thread);
  PyObject *left =
      progress->seconds_left >= 0 ? PyFloat_FromDouble(progress->seconds_left) : Py_NewRef(Py_None);
  PyObject *answer = NULL;
  if (left) {
    answer = PyObject_CallFunction(context->details, "nnNdN", (Py_ssize_t)progress->completed,
                                   (Py_ssize_t)progress->total, text_of(progress->layer),
                                   progress->fraction, left);
  }
  int32_t result = !answer || answer == Py_False;
  Py_XDECREF(answer);
  context->thread = PyEval_SaveThread();
  return result;
}

typedef hs_status (*round_fn)(hs_model *model, const char *const *names,
                              const hs_tensor_view *values, size_t count,
                              const hs_rounding_options *options, hs_rounding_report **out_report,
                              hs_error *error);

static PyObject *round_with(PyObject *object, PyObject *args, round_fn round) {
  model_object *self = (model_object *)object;
  core_state *state = state_of(object);
  PyObject *values, *configuration, *excluded, *callable, *cache, *width_layers, *width_bytes;
  PyObject *details;
  Py_ssize_t maximum_rows, maximum_bytes;
  unsigned long long seed;
  hs_rounding_options options;
  hs_rounding_options_init(&options);
  int method, parameter_bits, activation_bits, scheme, floor_or_ceil, iterations, block_size;
  if (!parse_arguments(
          state, args,
          "data method param_bits activation_bits quant_scheme percentile config excluded_layers "
          "max_rows max_bytes seed floor_or_ceil iterations block_size reg_param beta_range "
          "beta_range warm_start num_candidates layer_bits layer_bits cache progress "
          "details",
          "OiiiidOO!nnKpiiddddiO!O!OOO:adaround", &values, &method, &parameter_bits,
          &activation_bits, &scheme, &options.percentile, &configuration, &PyTuple_Type, &excluded,
          &maximum_rows, &maximum_bytes, &seed, &floor_or_ceil, &iterations, &block_size,
          &options.regularization, &options.beta_start, &options.beta_end, &options.warm_start,
          &options.candidates, &PyTuple_Type, &width_layers, &PyBytes_Type, &width_bytes, &cache,
          &callable, &details)) {
    return NULL;
  }
  options.method = method;
  options.parameter_bits = parameter_bits;
  options.activation_bits = activation_bits;
  options.scheme = scheme;
  options.maximum_rows = (size_t)maximum_rows;
  options.maximum_bytes = (size_t)maximum_bytes;
  options.seed = seed;
  options.floor_or_ceil = floor_or_ceil;
  options.iterations = iterations;
  options.block_size = block_size;
  if (configuration != Py_None) {
    options.configuration = utf8_of(configuration, "config");
    if (!options.configuration) return NULL;
  }
  if (cache != Py_None) {
    options.cache = utf8_of(cache, "cache");
    if (!options.cache) return NULL;
  }
  names excluded_layers;
  if (names_acquire(excluded, &excluded_layers) < 0) return NULL;
  options.excluded_layers = excluded_layers.texts;
  options.excluded_layer_count = excluded_layers.count;
  names layers;
  if (names_acquire(width_layers, &layers) < 0) {
    names_release(&excluded_layers);
    return NULL;
  }
  options.width_layers = layers.texts;
  options.width_count = layers.count;
  // An int32 for each layer, in the machine's order; the tuple of arguments holds the bytes.
  options.widths = (const int32_t *)(const void *)PyBytes_AsString(width_bytes);
  inputs inputs;
  memset(&inputs, 0, sizeof inputs);
  int ready = (size_t)PyBytes_Size(width_bytes) == layers.count * sizeof(int32_t);
  if (!ready) PyErr_SetString(PyExc_ValueError, "layer_bits: as many widths as names");
  if (ready && values != Py_None) ready = inputs_acquire(state, values, &inputs) == 0;
  if (ready && handle_enter(state, &self->lock) < 0) {
    inputs_release(&inputs);
    ready = 0;
  }
  if (!ready) {
    names_release(&layers);
    names_release(&excluded_layers);
    return NULL;
  }
  progress_context context = {.callable = callable, .details = details};
  options.progress = report_progress;
  if (details != Py_None) options.details = report_details;
  options.user_data = &context;
  hs_error error;
  hs_rounding_report *report = NULL;
  context.thread = PyEval_SaveThread();
  hs_status status =
      round(self->model, inputs.names, inputs.views, inputs.count, &options, &report, &error);
  PyEval_RestoreThread(context.thread);
  handle_leave(&self->lock);
  inputs_release(&inputs);
  names_release(&layers);
  names_release(&excluded_layers);
  if (PyErr_Occurred()) {  // what the callback or a signal handler raised
    hs_rounding_report_free(report);
    return NULL;
  }
  return status == HS_OK ? rounded_layers(state, report) : raise_error(state, &error);
}

PyObject *model_adaround(PyObject *object, PyObject *args) {
  return round_with(object, args, hs_model_adaround);
}

PyObject *model_correct_biases(PyObject *object, PyObject *args) {
  return round_with(object, args, hs_model_correct_biases);
}
