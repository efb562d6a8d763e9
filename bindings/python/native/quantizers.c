// SPDX-License-Identifier: Apache-2.0
// Methods of Simulation that concern single quantizers.
#include "simulation.h"

PyObject *simulation_quantizers(PyObject *object, PyObject *unused) {
  (void)unused;
  simulation_object *self = (simulation_object *)object;
  core_state *state = state_of(object);
  if (handle_enter(state, &self->lock) < 0) return NULL;
  hs_error error;
  size_t count = 0;
  hs_status status = hs_simulation_quantizer_count(self->simulation, &count, &error);
  PyObject *result = status == HS_OK ? PyList_New(0) : NULL;
  for (size_t i = 0; result && i < count; i++) {
    hs_quantizer quantizer;
    status = hs_simulation_quantizer(self->simulation, i, &quantizer, &error);
    PyObject *item = NULL;
    if (status == HS_OK) {
      item = Py_BuildValue(
          "NNNiNNNN", text_of(quantizer.tensor), text_of(quantizer.tied_to),
          PyBool_FromLong(quantizer.role == HS_QUANTIZER_ROLE_PARAMETER), (int)quantizer.bits,
          PyBool_FromLong(quantizer.is_symmetric), PyBool_FromLong(quantizer.is_enabled),
          PyBool_FromLong(quantizer.is_frozen), PyBool_FromLong(quantizer.has_encoding));
    }
    if (!item || PyList_Append(result, item) < 0) Py_CLEAR(result);
    Py_XDECREF(item);
  }
  handle_leave(&self->lock);
  return status == HS_OK ? result : raise_error(state, &error);
}

static PyObject *encoding_tuple(const hs_encoding *encoding) {
  Py_ssize_t size = (Py_ssize_t)(encoding->count * 4);
  return Py_BuildValue(
      "y#y#iiiLiNNN", (const char *)encoding->scales, size, (const char *)encoding->zero_points,
      size, (int)encoding->granularity, (int)encoding->axis, (int)encoding->block_axis,
      (long long)encoding->block_size, (int)encoding->bits, PyBool_FromLong(encoding->is_signed),
      PyBool_FromLong(encoding->is_symmetric), PyBool_FromLong(encoding->is_strict));
}

PyObject *simulation_encoding(PyObject *object, PyObject *name) {
  simulation_object *self = (simulation_object *)object;
  core_state *state = state_of(object);
  const char *tensor = utf8_of(name, "name of a tensor");
  if (!tensor || handle_enter(state, &self->lock) < 0) return NULL;
  hs_error error;
  hs_encoding encoding;
  hs_status status = hs_simulation_encoding(self->simulation, tensor, &encoding, &error);
  PyObject *result = status == HS_OK ? encoding_tuple(&encoding) : NULL;
  handle_leave(&self->lock);
  return status == HS_OK ? result : raise_error(state, &error);
}

PyObject *simulation_parameter_encoding(PyObject *object, PyObject *args) {
  simulation_object *self = (simulation_object *)object;
  core_state *state = state_of(object);
  named_value named;
  if (named_value_acquire(state, args, &named) < 0) return NULL;
  if (handle_enter(state, &self->lock) < 0) {
    PyBuffer_Release(&named.buffer);
    return NULL;
  }
  hs_error error;
  hs_encoding encoding;
  hs_status status;
  Py_BEGIN_ALLOW_THREADS
  status = hs_simulation_parameter_encoding(self->simulation, named.name, &named.view, &encoding,
                                            &error);
  Py_END_ALLOW_THREADS
  PyObject *result = status == HS_OK ? encoding_tuple(&encoding) : NULL;
  handle_leave(&self->lock);
  PyBuffer_Release(&named.buffer);
  return status == HS_OK ? result : raise_error(state, &error);
}

PyObject *simulation_set_encoding(PyObject *object, PyObject *args) {
  simulation_object *self = (simulation_object *)object;
  core_state *state = state_of(object);
  PyObject *name;
  Py_buffer scales, zero_points;
  int granularity, axis, block_axis, bits, is_signed, is_symmetric, is_strict;
  long long block_size;
  if (!parse_arguments(state, args,
                       "tensor scales zero_points granularity axis block_axis block_size bits "
                       "is_signed is_symmetric is_strict",
                       "Oy*y*iiiLippp:set_encoding", &name, &scales, &zero_points, &granularity,
                       &axis, &block_axis, &block_size, &bits, &is_signed, &is_symmetric,
                       &is_strict)) {
    return NULL;
  }
  hs_error error;
  hs_status status = HS_OK;
  int called = 0;
  const char *tensor = utf8_of(name, "name of a tensor");
  if (tensor && scales.len != zero_points.len) {
    raise_status(state, HS_ERR_SHAPE_MISMATCH, "zero points: expected %zd, got %zd", scales.len / 4,
                 zero_points.len / 4);
  } else if (tensor && handle_enter(state, &self->lock) == 0) {
    hs_encoding encoding = {
        .scales = scales.buf,
        .zero_points = zero_points.buf,
        .count = (size_t)scales.len / 4,
        .block_size = block_size,
        .granularity = granularity,
        .axis = axis,
        .block_axis = block_axis,
        .bits = bits,
        .is_signed = is_signed,
        .is_symmetric = is_symmetric,
        .is_strict = is_strict,
    };
    called = 1;
    Py_BEGIN_ALLOW_THREADS
    status = hs_simulation_set_encoding(self->simulation, tensor, &encoding, &error);
    Py_END_ALLOW_THREADS
    handle_leave(&self->lock);
  }
  PyBuffer_Release(&scales);
  PyBuffer_Release(&zero_points);
  return called ? none_or_error(state, status, &error) : NULL;
}

typedef hs_status (*flag_fn)(hs_simulation *, const char *, int32_t, hs_error *);

static PyObject *set_flag(PyObject *object, PyObject *args, flag_fn function) {
  simulation_object *self = (simulation_object *)object;
  core_state *state = state_of(object);
  PyObject *name;
  int flag;
  if (!PyArg_ParseTuple(args, "Op", &name, &flag)) return NULL;
  const char *tensor = utf8_of(name, "name of a tensor");
  if (!tensor || handle_enter(state, &self->lock) < 0) return NULL;
  hs_error error;
  hs_status status;
  Py_BEGIN_ALLOW_THREADS
  status = function(self->simulation, tensor, flag, &error);
  Py_END_ALLOW_THREADS
  handle_leave(&self->lock);
  return none_or_error(state, status, &error);
}

PyObject *simulation_set_enabled(PyObject *object, PyObject *args) {
  return set_flag(object, args, hs_simulation_set_enabled);
}

PyObject *simulation_set_frozen(PyObject *object, PyObject *args) {
  return set_flag(object, args, hs_simulation_set_frozen);
}

PyObject *simulation_set_precision(PyObject *object, PyObject *args) {
  simulation_object *self = (simulation_object *)object;
  core_state *state = state_of(object);
  PyObject *name;
  int bits, is_symmetric;
  if (!parse_arguments(state, args, "tensor bits is_symmetric", "Oii:set_precision", &name, &bits,
                       &is_symmetric))
    return NULL;
  const char *tensor = utf8_of(name, "name of a tensor");
  if (!tensor || handle_enter(state, &self->lock) < 0) return NULL;
  hs_error error;
  hs_status status;
  Py_BEGIN_ALLOW_THREADS
  status = hs_simulation_set_precision(self->simulation, tensor, bits, is_symmetric, &error);
  Py_END_ALLOW_THREADS
  handle_leave(&self->lock);
  return none_or_error(state, status, &error);
}

PyObject *simulation_set_range(PyObject *object, PyObject *args) {
  simulation_object *self = (simulation_object *)object;
  core_state *state = state_of(object);
  PyObject *name;
  double minimum, maximum;
  if (!parse_arguments(state, args, "tensor minimum maximum", "Odd:set_range", &name, &minimum,
                       &maximum))
    return NULL;
  const char *tensor = utf8_of(name, "name of a tensor");
  if (!tensor || handle_enter(state, &self->lock) < 0) return NULL;
  hs_error error;
  hs_status status;
  Py_BEGIN_ALLOW_THREADS
  status = hs_simulation_set_range(self->simulation, tensor, minimum, maximum, &error);
  Py_END_ALLOW_THREADS
  handle_leave(&self->lock);
  return none_or_error(state, status, &error);
}
