// SPDX-License-Identifier: Apache-2.0
// What the files of the Model type share.
#ifndef HALFSTEP_MODEL_H
#define HALFSTEP_MODEL_H

#include "core.h"

typedef struct model_object {
  PyObject_HEAD hs_model *model;
  handle_lock lock;
} model_object;

// rounding.c
PyObject *model_adaround(PyObject *self, PyObject *args);
PyObject *model_correct_biases(PyObject *self, PyObject *args);

#endif
