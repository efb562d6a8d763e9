// SPDX-License-Identifier: Apache-2.0
// Turns statuses into Python exceptions, and text between the two languages.
#include <stdarg.h>
#include <string.h>

#include "core.h"

static PyObject *raise_text(core_state *state, hs_status status, PyObject *message) {
  if (!message) return NULL;
  PyObject *error =
      PyObject_CallFunction(state->make_error, "isO", (int)status, hs_status_name(status), message);
  Py_DECREF(message);
  if (error) {
    PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_DECREF(error);
  }
  return NULL;
}

PyObject *raise_error(core_state *state, const hs_error *error) {
  return raise_text(state, error->status, text_of(error->message));
}

PyObject *raise_status(core_state *state, hs_status status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  PyObject *message = PyUnicode_FromFormatV(format, arguments);
  va_end(arguments);
  return raise_text(state, status, message);
}

const char *utf8_of(PyObject *text, const char *what) {
  if (!PyUnicode_Check(text)) {
    PyErr_Format(PyExc_TypeError, "%s: expected str", what);
    return NULL;
  }
  Py_ssize_t size;
  const char *utf8 = PyUnicode_AsUTF8AndSize(text, &size);
  if (utf8 && strlen(utf8) != (size_t)size) {
    PyErr_Format(PyExc_ValueError, "%s: NUL character", what);
    return NULL;
  }
  return utf8;
}

PyObject *text_of(const char *utf8) {
  if (!utf8) utf8 = "";
  return PyUnicode_DecodeUTF8(utf8, (Py_ssize_t)strlen(utf8), "replace");
}
