// SPDX-License-Identifier: Apache-2.0
// Fake quantization of one array.
#include "core.h"

static int get_vector(PyObject *object, Py_buffer *buffer, int flags) {
  return PyObject_GetBuffer(object, buffer, flags | PyBUF_C_CONTIGUOUS | PyBUF_FORMAT);
}

PyObject *core_fake_quantize(PyObject *module, PyObject *args) {
  core_state *state = PyModule_GetState(module);
  PyObject *objects[4];  // input, scales, zero points, output
  int granularity, axis, block_axis, bits, is_signed, is_strict;
  long long block_size;
  if (!parse_arguments(
          state, args,
          "array scale zero_point out granularity axis block_axis block_size bits signed strict",
          "OOOOiiiLipp:fake_quantize", &objects[0], &objects[1], &objects[2], &objects[3],
          &granularity, &axis, &block_axis, &block_size, &bits, &is_signed, &is_strict)) {
    return NULL;
  }
  Py_buffer buffers[4];
  hs_tensor_view views[4];
  static const char *const what[4] = {"array", "scale", "zero_point", "out"};
  static const hs_data_type types[4] = {HS_DATA_TYPE_FLOAT32, HS_DATA_TYPE_FLOAT32,
                                        HS_DATA_TYPE_INT32, HS_DATA_TYPE_FLOAT32};
  int held = 0;
  hs_error error;
  hs_status status = HS_ERR_INTERNAL;
  int called = 0;
  for (; held < 4; held++) {
    int failed = held == 0 ? PyObject_GetBuffer(objects[0], &buffers[0], PyBUF_RECORDS_RO)
                           : get_vector(objects[held], &buffers[held],
                                        held == 3 ? PyBUF_WRITABLE : PyBUF_SIMPLE);
    if (failed < 0) goto done;
    if (view_from_buffer(state, what[held], &buffers[held], &views[held]) < 0) {
      held++;
      goto done;
    }
    if (held > 0 && views[held].dtype != types[held]) {
      raise_status(state, HS_ERR_TYPE_MISMATCH, "%s: expected %s, got format '%s'", what[held],
                   types[held] == HS_DATA_TYPE_INT32 ? "int32" : "float32", buffers[held].format);
      held++;
      goto done;
    }
  }
  if (buffers[1].len != buffers[2].len) {
    raise_status(state, HS_ERR_SHAPE_MISMATCH, "zero_point: expected %zd values, got %zd",
                 buffers[1].len / 4, buffers[2].len / 4);
    goto done;
  }
  hs_encoding encoding = {
      .scales = buffers[1].buf,
      .zero_points = buffers[2].buf,
      .count = (size_t)buffers[1].len / 4,
      .block_size = block_size,
      .granularity = granularity,
      .axis = axis,
      .block_axis = block_axis,
      .bits = bits,
      .is_signed = is_signed,
      .is_symmetric = 0,
      .is_strict = is_strict,
  };
  called = 1;
  Py_BEGIN_ALLOW_THREADS
  status =
      hs_fake_quantize(&views[0], &encoding, buffers[3].buf, (size_t)buffers[3].len / 4, &error);
  Py_END_ALLOW_THREADS
done:
  while (held > 0) PyBuffer_Release(&buffers[--held]);
  if (!called) return NULL;
  if (status != HS_OK) return raise_error(state, &error);
  Py_RETURN_NONE;
}
