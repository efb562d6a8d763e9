// SPDX-License-Identifier: Apache-2.0
// What the files of the Simulation type share.
#ifndef HALFSTEP_SIMULATION_H
#define HALFSTEP_SIMULATION_H

#include "core.h"

typedef struct simulation_object {
  PyObject_HEAD hs_simulation *simulation;
  handle_lock lock;
} simulation_object;

// quantizers.c
PyObject *simulation_quantizers(PyObject *self, PyObject *unused);
PyObject *simulation_encoding(PyObject *self, PyObject *name);
PyObject *simulation_parameter_encoding(PyObject *self, PyObject *args);
PyObject *simulation_set_encoding(PyObject *self, PyObject *args);
PyObject *simulation_set_enabled(PyObject *self, PyObject *args);
PyObject *simulation_set_frozen(PyObject *self, PyObject *args);
PyObject *simulation_set_precision(PyObject *self, PyObject *args);
PyObject *simulation_set_range(PyObject *self, PyObject *args);

#endif
