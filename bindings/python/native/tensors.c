// SPDX-License-Identifier: Apache-2.0
// Tensors that the library gave out, exported as buffers without copying.
#include "core.h"

/// One tensor of a collection, which it keeps alive.
typedef struct tensor_object {
  PyObject_HEAD PyObject *collection;  ///< Capsule that owns the hs_tensors.
  void *data;
  const char *format;
  Py_ssize_t item_size;
  Py_ssize_t byte_count;
  Py_ssize_t *extents;  ///< Shape, then strides: `[2 * rank]`.
  int rank;
  int is_writable;
  hs_data_type dtype;
} tensor_object;

static const char *const collection_name = "halfstep.tensors";

static void free_collection(PyObject *capsule) {
  hs_tensors_free(PyCapsule_GetPointer(capsule, collection_name));
}

/// Format and size of an element as Python sees it; types that Python lacks come as their bits.
static const char *format_of_type(hs_data_type type, Py_ssize_t *out_size) {
  switch (type) {
    case HS_DATA_TYPE_FLOAT32:
      *out_size = 4;
      return "f";
    case HS_DATA_TYPE_FLOAT64:
      *out_size = 8;
      return "d";
    case HS_DATA_TYPE_FLOAT16:
      *out_size = 2;
      return "e";
    case HS_DATA_TYPE_BFLOAT16:
      *out_size = 2;
      return "H";
    case HS_DATA_TYPE_INT8:
      *out_size = 1;
      return "b";
    case HS_DATA_TYPE_INT16:
      *out_size = 2;
      return "h";
    case HS_DATA_TYPE_INT32:
      *out_size = 4;
      return "i";
    case HS_DATA_TYPE_INT64:
      *out_size = 8;
      return "q";
    case HS_DATA_TYPE_UINT16:
      *out_size = 2;
      return "H";
    case HS_DATA_TYPE_UINT32:
      *out_size = 4;
      return "I";
    case HS_DATA_TYPE_UINT64:
      *out_size = 8;
      return "Q";
    case HS_DATA_TYPE_BOOL:
      *out_size = 1;
      return "?";
    case HS_DATA_TYPE_COMPLEX64:
      *out_size = 8;
      return "Zf";
    case HS_DATA_TYPE_COMPLEX128:
      *out_size = 16;
      return "Zd";
    case HS_DATA_TYPE_UINT8:
    case HS_DATA_TYPE_FLOAT8E4M3FN:
    case HS_DATA_TYPE_FLOAT8E4M3FNUZ:
    case HS_DATA_TYPE_FLOAT8E5M2:
    case HS_DATA_TYPE_FLOAT8E5M2FNUZ:
    case HS_DATA_TYPE_FLOAT8E8M0:
      *out_size = 1;
      return "B";
    default:
      return NULL;
  }
}

/// Elements in a byte of the types that are packed; 0 for the others.
static Py_ssize_t packing_of_type(hs_data_type type) {
  switch (type) {
    case HS_DATA_TYPE_INT4:
    case HS_DATA_TYPE_UINT4:
    case HS_DATA_TYPE_FLOAT4E2M1:
      return 2;
    case HS_DATA_TYPE_INT2:
    case HS_DATA_TYPE_UINT2:
      return 4;
    default:
      return 0;
  }
}

static PyObject *make_tensor(core_state *state, PyObject *collection, const hs_tensor_view *view,
                             int is_writable) {
  tensor_object *self = (tensor_object *)new_object(state->tensor_type);
  if (!self) return NULL;
  self->dtype = view->dtype;
  self->data = (void *)view->data;
  self->is_writable = is_writable;
  Py_ssize_t packing = packing_of_type(view->dtype);
  self->format = packing ? "B" : format_of_type(view->dtype, &self->item_size);
  if (packing) self->item_size = 1;
  if (!self->format) {
    raise_status(state, HS_ERR_TYPE_MISMATCH, "elements of type %d have no format in Python",
                 (int)view->dtype);
    Py_DECREF(self);
    return NULL;
  }
  Py_ssize_t count = 1;
  for (int32_t i = 0; i < view->rank; i++) count *= (Py_ssize_t)view->shape[i];
  self->rank = packing ? 1 : view->rank;
  self->extents = PyMem_Calloc(2 * (size_t)self->rank + 1, sizeof *self->extents);
  if (!self->extents) {
    Py_DECREF(self);
    return PyErr_NoMemory();
  }
  if (packing) {
    self->extents[0] = (count + packing - 1) / packing;
    self->extents[1] = 1;
    self->byte_count = self->extents[0];
  } else {
    Py_ssize_t stride = self->item_size;
    for (int i = self->rank - 1; i >= 0; i--) {
      self->extents[i] = (Py_ssize_t)view->shape[i];
      self->extents[self->rank + i] = stride;
      stride *= self->extents[i];
    }
    self->byte_count = count * self->item_size;
  }
  Py_INCREF(collection);
  self->collection = collection;
  return (PyObject *)self;
}

static void tensor_dealloc(PyObject *object) {
  tensor_object *self = (tensor_object *)object;
  PyMem_Free(self->extents);
  Py_XDECREF(self->collection);
  free_object(object);
}

static int tensor_getbuffer(PyObject *object, Py_buffer *view, int flags) {
  tensor_object *self = (tensor_object *)object;
  view->obj = NULL;
  if ((flags & PyBUF_WRITABLE) && !self->is_writable) {
    PyErr_SetString(PyExc_BufferError, "the tensor is shared with a model and read-only");
    return -1;
  }
  if ((flags & PyBUF_F_CONTIGUOUS) == PyBUF_F_CONTIGUOUS && self->rank > 1) {
    PyErr_SetString(PyExc_BufferError, "the tensor is row-major");
    return -1;
  }
  static char nothing;
  view->buf = self->data ? self->data : &nothing;
  view->len = self->byte_count;
  view->itemsize = self->item_size;
  view->readonly = !self->is_writable;
  view->format = (flags & PyBUF_FORMAT) ? (char *)self->format : NULL;
  view->ndim = (flags & PyBUF_ND) ? self->rank : 1;
  view->shape = (flags & PyBUF_ND) ? self->extents : NULL;
  view->strides = (flags & PyBUF_STRIDES) == PyBUF_STRIDES ? self->extents + self->rank : NULL;
  view->suboffsets = NULL;
  view->internal = NULL;
  Py_INCREF(object);
  view->obj = object;
  return 0;
}

static PyObject *tensor_dtype(PyObject *self, void *closure) {
  (void)closure;
  return PyLong_FromLong(((tensor_object *)self)->dtype);
}

static PyGetSetDef tensor_properties[] = {
    {"dtype", tensor_dtype, NULL, "Number of the element type in ONNX.", NULL},
    {NULL, NULL, NULL, NULL, NULL}};

static PyType_Slot tensor_slots[] = {{Py_tp_dealloc, tensor_dealloc},
                                     {Py_bf_getbuffer, tensor_getbuffer},
                                     {Py_tp_getset, tensor_properties},
                                     {Py_tp_doc, "A tensor of the library as a buffer."},
                                     {0, NULL}};

PyType_Spec tensor_spec = {
    .name = "halfstep._core.Tensor",
    .basicsize = sizeof(tensor_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = tensor_slots,
};

PyObject *tensors_to_dict(core_state *state, hs_tensors *tensors, int is_writable) {
  PyObject *collection = PyCapsule_New(tensors, collection_name, free_collection);
  if (!collection) {
    hs_tensors_free(tensors);
    return NULL;
  }
  hs_error error;
  size_t count;
  PyObject *result = PyDict_New();
  if (result && hs_tensors_count(tensors, &count, &error) != HS_OK) {
    raise_error(state, &error);
    Py_CLEAR(result);
  }
  for (size_t i = 0; result && i < count; i++) {
    const char *name;
    hs_tensor_view view;
    if (hs_tensors_get(tensors, i, &name, &view, &error) != HS_OK) {
      raise_error(state, &error);
      Py_CLEAR(result);
      break;
    }
    if (view.dtype == HS_DATA_TYPE_STRING) continue;  // has no elements of a fixed size
    void *memory;
    if (is_writable) {
      if (hs_tensors_get_mutable(tensors, i, &memory, &error) != HS_OK) {
        raise_error(state, &error);
        Py_CLEAR(result);
        break;
      }
      view.data = memory;
    }
    PyObject *key = text_of(name);
    PyObject *value = key ? make_tensor(state, collection, &view, is_writable) : NULL;
    if (!value || PyDict_SetItem(result, key, value) < 0) Py_CLEAR(result);
    Py_XDECREF(key);
    Py_XDECREF(value);
  }
  Py_DECREF(collection);
  return result;
}
