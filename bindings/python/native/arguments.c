// SPDX-License-Identifier: Apache-2.0
// Reads arguments of calls, and names the number that is too large for its place.
#include <limits.h>
#include <stdarg.h>
#include <string.h>

#include "core.h"

/// Whether an integer does not fit where a unit of a format puts it.
static int overflows(PyObject *item, char unit) {
  PyObject *number = PyIndex_Check(item) ? PyNumber_Index(item) : NULL;
  int does = 0;
  if (number && unit == 'd') {
    does = PyLong_AsDouble(number) == -1.0 && PyErr_Occurred();
  } else if (number) {
    int direction = 0;
    long long value = PyLong_AsLongLongAndOverflow(number, &direction);
    does = direction != 0 || (unit == 'i' && (value < INT_MIN || value > INT_MAX));
  }
  PyErr_Clear();
  Py_XDECREF(number);
  return does;
}

/// Raises for the first number that overflows its unit; nothing if none does.
static void name_overflow(core_state *state, PyObject *args, const char *names,
                          const char *format) {
  Py_ssize_t position = 0;
  for (const char *unit = format; *unit && *unit != ':'; unit++) {
    if (strchr("!&*", *unit)) continue;
    size_t length = strcspn(names, " ");
    PyObject *item = PyTuple_GetItem(args, position++);
    if (!item) return;
    if (strchr("indL", *unit) && overflows(item, *unit)) {
      char name[64];
      if (length >= sizeof name) length = sizeof name - 1;
      memcpy(name, names, length);
      name[length] = 0;
      raise_status(state, HS_ERR_INVALID_ARGUMENT, "%s: the number is out of range", name);
      return;
    }
    names += length + (names[length] == ' ');
  }
}

int parse_arguments(core_state *state, PyObject *args, const char *names, const char *format, ...) {
  va_list places;
  va_start(places, format);
  int success = PyArg_VaParse(args, format, places);
  va_end(places);
  if (success || !PyErr_ExceptionMatches(PyExc_OverflowError)) return success;
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  name_overflow(state, args, names, format);
  if (PyErr_Occurred()) {
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
  } else {
    PyErr_Restore(type, value, traceback);
  }
  return 0;
}

int integer_of(core_state *state, PyObject *item, const char *name, int64_t *out) {
  *out = item ? PyLong_AsLongLong(item) : -1;
  if (*out != -1 || !PyErr_Occurred()) return 0;
  if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
    PyErr_Clear();
    raise_status(state, HS_ERR_INVALID_ARGUMENT, "%s: the number is out of range", name);
  }
  return -1;
}
