// SPDX-License-Identifier: Apache-2.0
// Borrows Python buffers as tensor views.
#include <string.h>

#include "core.h"

static hs_data_type integer_type(Py_ssize_t size, int is_signed) {
  switch (size) {
    case 1:
      return is_signed ? HS_DATA_TYPE_INT8 : HS_DATA_TYPE_UINT8;
    case 2:
      return is_signed ? HS_DATA_TYPE_INT16 : HS_DATA_TYPE_UINT16;
    case 4:
      return is_signed ? HS_DATA_TYPE_INT32 : HS_DATA_TYPE_UINT32;
    case 8:
      return is_signed ? HS_DATA_TYPE_INT64 : HS_DATA_TYPE_UINT64;
    default:
      return 0;
  }
}

/// Element type of a struct-module format with one element in native order; 0 if there is none.
static hs_data_type type_of_format(const char *format, Py_ssize_t size) {
  if (!format) return HS_DATA_TYPE_UINT8;
  if (*format == '@' || *format == '=' || *format == '<') {
    format++;
  } else if (*format == '>' || *format == '!') {
    if (size != 1) return 0;
    format++;
  }
  if (!strcmp(format, "Zf")) return HS_DATA_TYPE_COMPLEX64;
  if (!strcmp(format, "Zd")) return HS_DATA_TYPE_COMPLEX128;
  if (format[0] == 0 || format[1] != 0) return 0;
  switch (format[0]) {
    case 'f':
      return size == 4 ? HS_DATA_TYPE_FLOAT32 : 0;
    case 'd':
      return size == 8 ? HS_DATA_TYPE_FLOAT64 : 0;
    case 'e':
      return size == 2 ? HS_DATA_TYPE_FLOAT16 : 0;
    case '?':
      return size == 1 ? HS_DATA_TYPE_BOOL : 0;
    case 'b':
    case 'h':
    case 'i':
    case 'l':
    case 'q':
    case 'n':
      return integer_type(size, 1);
    case 'B':
    case 'H':
    case 'I':
    case 'L':
    case 'Q':
    case 'N':
      return integer_type(size, 0);
    default:
      return 0;
  }
}

int view_from_buffer(core_state *state, const char *name, const Py_buffer *buffer,
                     hs_tensor_view *out) {
  hs_data_type type = type_of_format(buffer->format, buffer->itemsize);
  if (!type) {
    raise_status(state, HS_ERR_TYPE_MISMATCH,
                 "'%s': elements of format '%s' (%zd bytes) are not supported", name,
                 buffer->format, buffer->itemsize);
    return -1;
  }
  if (buffer->ndim > HS_RANK_MAX) {
    raise_status(state, HS_ERR_SHAPE_MISMATCH, "'%s': expected rank %d or less, got %d", name,
                 HS_RANK_MAX, buffer->ndim);
    return -1;
  }
  _Static_assert(sizeof(Py_ssize_t) == sizeof(int64_t), "extents are passed on as they are");
  out->data = buffer->buf;
  out->dtype = type;
  out->rank = buffer->ndim;
  out->shape = (const int64_t *)buffer->shape;
  out->strides = (const int64_t *)buffer->strides;
  return 0;
}

int inputs_acquire(core_state *state, PyObject *values, inputs *out) {
  memset(out, 0, sizeof *out);
  if (!PyDict_Check(values)) {
    PyErr_SetString(PyExc_TypeError, "expected a dict of arrays by name");
    return -1;
  }
  out->items = PyDict_Items(values);
  if (!out->items) return -1;
  size_t count = (size_t)PyList_Size(out->items);
  out->names = PyMem_Calloc(count + 1, sizeof *out->names);
  out->views = PyMem_Calloc(count + 1, sizeof *out->views);
  out->buffers = PyMem_Calloc(count + 1, sizeof *out->buffers);
  if (!out->names || !out->views || !out->buffers) {
    PyErr_NoMemory();
    inputs_release(out);
    return -1;
  }
  for (size_t i = 0; i < count; i++) {
    PyObject *item = PyList_GetItem(out->items, (Py_ssize_t)i);
    PyObject *value = PyTuple_GetItem(item, 1);
    out->names[i] = utf8_of(PyTuple_GetItem(item, 0), "name of an input");
    if (!out->names[i] || PyObject_GetBuffer(value, &out->buffers[i], PyBUF_RECORDS_RO) < 0) {
      inputs_release(out);
      return -1;
    }
    out->buffer_count = i + 1;
    if (view_from_buffer(state, out->names[i], &out->buffers[i], &out->views[i]) < 0) {
      inputs_release(out);
      return -1;
    }
  }
  out->count = count;
  return 0;
}

void inputs_release(inputs *inputs) {
  for (size_t i = 0; i < inputs->buffer_count; i++) PyBuffer_Release(&inputs->buffers[i]);
  PyMem_Free(inputs->buffers);
  PyMem_Free(inputs->views);
  PyMem_Free(inputs->names);
  Py_CLEAR(inputs->items);
  memset(inputs, 0, sizeof *inputs);
}

int named_value_acquire(core_state *state, PyObject *args, named_value *out) {
  PyObject *name, *value;
  if (!PyArg_ParseTuple(args, "OO", &name, &value)) return -1;
  out->name = utf8_of(name, "name of a tensor");
  if (!out->name || PyObject_GetBuffer(value, &out->buffer, PyBUF_RECORDS_RO) < 0) return -1;
  if (view_from_buffer(state, out->name, &out->buffer, &out->view) < 0) {
    PyBuffer_Release(&out->buffer);
    return -1;
  }
  return 0;
}

int names_acquire(PyObject *tuple, names *out) {
  out->count = (size_t)PyTuple_Size(tuple);
  out->texts = PyMem_Calloc(out->count + 1, sizeof *out->texts);
  if (!out->texts) {
    PyErr_NoMemory();
    return -1;
  }
  for (size_t i = 0; i < out->count; i++) {
    out->texts[i] = utf8_of(PyTuple_GetItem(tuple, (Py_ssize_t)i), "name");
    if (!out->texts[i]) {
      names_release(out);
      return -1;
    }
  }
  return 0;
}

void names_release(names *names) {
  PyMem_Free(names->texts);
  names->texts = NULL;
}
