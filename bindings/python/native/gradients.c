// SPDX-License-Identifier: Apache-2.0
// Backward pass of fake quantization, and grids between the ends of ranges.
#include "core.h"

/// One buffer argument: how it is called, what it must hold, whether it is written.
typedef struct argument {
  const char *name;
  PyObject *object;    ///< None is allowed if `is_optional`; the buffer is then not held.
  hs_data_type dtype;  ///< Element type that the call takes.
  int is_writable;
  int is_strided;  ///< Any layout; else C-contiguous.
  int is_optional;
  Py_ssize_t count;  ///< Elements that it must have; -1 for any number.
  Py_buffer buffer;
  int is_held;
  hs_tensor_view view;
} argument;

static int acquire(core_state *state, argument *argument) {
  if (argument->is_optional && argument->object == Py_None) return 0;
  int flags = argument->is_strided ? PyBUF_RECORDS_RO : PyBUF_C_CONTIGUOUS | PyBUF_FORMAT;
  if (argument->is_writable) flags |= PyBUF_WRITABLE;
  if (PyObject_GetBuffer(argument->object, &argument->buffer, flags) < 0) return -1;
  argument->is_held = 1;
  if (view_from_buffer(state, argument->name, &argument->buffer, &argument->view) < 0) return -1;
  if (argument->view.dtype != argument->dtype) {
    raise_status(state, HS_ERR_TYPE_MISMATCH, "%s: expected %s, got format '%s'", argument->name,
                 argument->dtype == HS_DATA_TYPE_INT32 ? "int32" : "float32",
                 argument->buffer.format);
    return -1;
  }
  if (argument->count >= 0 && argument->buffer.len / 4 != argument->count) {
    raise_status(state, HS_ERR_SHAPE_MISMATCH, "%s: expected %zd values, got %zd", argument->name,
                 argument->count, argument->buffer.len / 4);
    return -1;
  }
  return 0;
}

static void release(argument *arguments, size_t count) {
  for (size_t i = 0; i < count; i++) {
    if (arguments[i].is_held) PyBuffer_Release(&arguments[i].buffer);
  }
}

/// Address of a held buffer; NULL if the argument was None.
static void *data_of(const argument *argument) {
  return argument->is_held ? argument->buffer.buf : NULL;
}

PyObject *core_fake_quantize_backward(PyObject *module, PyObject *args) {
  core_state *state = PyModule_GetState(module);
  enum { VALUES, SCALES, ZERO_POINTS, UPSTREAM, OUT, MINIMUMS, OUT_LOW, OUT_HIGH, COUNT };
  const hs_data_type floats = HS_DATA_TYPE_FLOAT32;
  argument a[COUNT] = {
      [VALUES] = {.name = "values", .dtype = floats, .is_strided = 1, .count = -1},
      [SCALES] = {.name = "scales", .dtype = floats, .count = -1},
      [ZERO_POINTS] = {.name = "zero_points", .dtype = HS_DATA_TYPE_INT32},
      [UPSTREAM] = {.name = "upstream", .dtype = floats, .is_strided = 1, .count = -1},
      [OUT] = {.name = "out", .dtype = floats, .is_writable = 1, .count = -1},
      [MINIMUMS] = {.name = "minimums", .dtype = floats, .is_optional = 1},
      [OUT_LOW] = {.name = "out_minimums", .dtype = floats, .is_writable = 1, .is_optional = 1},
      [OUT_HIGH] = {.name = "out_maximums", .dtype = floats, .is_writable = 1, .is_optional = 1},
  };
  int granularity, axis, block_axis, bits, is_signed, is_symmetric, is_strict;
  long long block_size;
  if (!parse_arguments(state, args,
                       "values scales zero_points upstream out minimums out_minimums out_maximums "
                       "granularity axis block_axis block_size bits signed symmetric strict",
                       "OOOOOOOOiiiLippp:fake_quantize_backward", &a[VALUES].object,
                       &a[SCALES].object, &a[ZERO_POINTS].object, &a[UPSTREAM].object,
                       &a[OUT].object, &a[MINIMUMS].object, &a[OUT_LOW].object, &a[OUT_HIGH].object,
                       &granularity, &axis, &block_axis, &block_size, &bits, &is_signed,
                       &is_symmetric, &is_strict)) {
    return NULL;
  }
  for (int i = 0; i < COUNT; i++) {
    if (acquire(state, &a[i]) < 0) {
      release(a, COUNT);
      return NULL;
    }
    if (i == SCALES) {
      Py_ssize_t count = a[SCALES].buffer.len / 4;
      a[ZERO_POINTS].count = a[MINIMUMS].count = a[OUT_LOW].count = a[OUT_HIGH].count = count;
    }
  }
  hs_encoding encoding = {
      .scales = a[SCALES].buffer.buf,
      .zero_points = a[ZERO_POINTS].buffer.buf,
      .count = (size_t)a[SCALES].buffer.len / 4,
      .block_size = block_size,
      .granularity = granularity,
      .axis = axis,
      .block_axis = block_axis,
      .bits = bits,
      .is_signed = is_signed,
      .is_symmetric = is_symmetric,
      .is_strict = is_strict,
  };
  hs_error error;
  hs_status status;
  Py_BEGIN_ALLOW_THREADS
  status = hs_fake_quantize_backward(
      &a[VALUES].view, &encoding, data_of(&a[MINIMUMS]), &a[UPSTREAM].view, a[OUT].buffer.buf,
      (size_t)a[OUT].buffer.len / 4, data_of(&a[OUT_LOW]), data_of(&a[OUT_HIGH]), &error);
  Py_END_ALLOW_THREADS
  release(a, COUNT);
  if (status != HS_OK) return raise_error(state, &error);
  Py_RETURN_NONE;
}

PyObject *core_encoding_from_range(PyObject *module, PyObject *args) {
  core_state *state = PyModule_GetState(module);
  enum { MINIMUMS, MAXIMUMS, SCALES, ZERO_POINTS, COUNT };
  const hs_data_type floats = HS_DATA_TYPE_FLOAT32;
  argument a[COUNT] = {
      [MINIMUMS] = {.name = "minimums", .dtype = floats, .count = -1},
      [MAXIMUMS] = {.name = "maximums", .dtype = floats},
      [SCALES] = {.name = "out_scales", .dtype = floats, .is_writable = 1},
      [ZERO_POINTS] = {.name = "out_zero_points", .dtype = HS_DATA_TYPE_INT32, .is_writable = 1}};
  int bits, is_signed, is_symmetric, is_strict;
  if (!parse_arguments(
          state, args, "minimums maximums bits signed symmetric strict out_scales out_zero_points",
          "OOipppOO:encoding_from_range", &a[MINIMUMS].object, &a[MAXIMUMS].object, &bits,
          &is_signed, &is_symmetric, &is_strict, &a[SCALES].object, &a[ZERO_POINTS].object)) {
    return NULL;
  }
  for (int i = 0; i < COUNT; i++) {
    if (acquire(state, &a[i]) < 0) {
      release(a, COUNT);
      return NULL;
    }
    if (i == MINIMUMS) {
      Py_ssize_t count = a[MINIMUMS].buffer.len / 4;
      a[MAXIMUMS].count = a[SCALES].count = a[ZERO_POINTS].count = count;
    }
  }
  hs_error error;
  hs_status status;
  Py_BEGIN_ALLOW_THREADS
  status = hs_encoding_from_range(
      a[MINIMUMS].buffer.buf, a[MAXIMUMS].buffer.buf, (size_t)a[MINIMUMS].buffer.len / 4, bits,
      is_signed, is_symmetric, is_strict, a[SCALES].buffer.buf, a[ZERO_POINTS].buffer.buf, &error);
  Py_END_ALLOW_THREADS
  release(a, COUNT);
  if (status != HS_OK) return raise_error(state, &error);
  Py_RETURN_NONE;
}

PyObject *core_encoding_to_range(PyObject *module, PyObject *args) {
  core_state *state = PyModule_GetState(module);
  enum { SCALES, ZERO_POINTS, MINIMUMS, MAXIMUMS, COUNT };
  const hs_data_type floats = HS_DATA_TYPE_FLOAT32;
  argument a[COUNT] = {[SCALES] = {.name = "scales", .dtype = floats, .count = -1},
                       [ZERO_POINTS] = {.name = "zero_points", .dtype = HS_DATA_TYPE_INT32},
                       [MINIMUMS] = {.name = "out_minimums", .dtype = floats, .is_writable = 1},
                       [MAXIMUMS] = {.name = "out_maximums", .dtype = floats, .is_writable = 1}};
  int bits, is_signed, is_symmetric, is_strict;
  if (!parse_arguments(
          state, args, "scales zero_points bits signed symmetric strict out_minimums out_maximums",
          "OOipppOO:encoding_to_range", &a[SCALES].object, &a[ZERO_POINTS].object, &bits,
          &is_signed, &is_symmetric, &is_strict, &a[MINIMUMS].object, &a[MAXIMUMS].object)) {
    return NULL;
  }
  for (int i = 0; i < COUNT; i++) {
    if (acquire(state, &a[i]) < 0) {
      release(a, COUNT);
      return NULL;
    }
    if (i == SCALES) {
      Py_ssize_t count = a[SCALES].buffer.len / 4;
      a[ZERO_POINTS].count = a[MINIMUMS].count = a[MAXIMUMS].count = count;
    }
  }
  hs_encoding encoding = {
      .scales = a[SCALES].buffer.buf,
      .zero_points = a[ZERO_POINTS].buffer.buf,
      .count = (size_t)a[SCALES].buffer.len / 4,
      .bits = bits,
      .is_signed = is_signed,
      .is_symmetric = is_symmetric,
      .is_strict = is_strict,
  };
  hs_error error;
  hs_status status =
      hs_encoding_to_range(&encoding, a[MINIMUMS].buffer.buf, a[MAXIMUMS].buffer.buf, &error);
  release(a, COUNT);
  if (status != HS_OK) return raise_error(state, &error);
  Py_RETURN_NONE;
}
