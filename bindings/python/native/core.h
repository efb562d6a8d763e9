// SPDX-License-Identifier: Apache-2.0
// What the files of the native module share.
#ifndef HALFSTEP_CORE_H
#define HALFSTEP_CORE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <halfstep.h>

/// What the module keeps for its whole life.
typedef struct core_state {
  PyTypeObject *tensor_type;
  PyTypeObject *model_type;
  PyTypeObject *simulation_type;
  PyTypeObject *compressor_type;
  PyObject *make_error;  ///< halfstep.errors.from_status(status, name, message)
} core_state;

/// State of the module that made an object of one of its (final) types.
static inline core_state *state_of(PyObject *self) { return PyType_GetModuleState(Py_TYPE(self)); }

// ------------------------------------------------------------------------------------------------
// errors.c

/// Raises the exception of a failed call; always NULL.
PyObject *raise_error(core_state *state, const hs_error *error);

/// Raises the exception of a status with a formatted message; always NULL.
PyObject *raise_status(core_state *state, hs_status status, const char *format, ...);

/// UTF-8 text of a str without NUL characters, which lives as long as the str; NULL if it raised.
const char *utf8_of(PyObject *text, const char *what);

/// A str of UTF-8 text; NULL becomes an empty str.
PyObject *text_of(const char *utf8);

// ------------------------------------------------------------------------------------------------
// arguments.c

/// PyArg_ParseTuple() with the arguments' names, apart by spaces: a number that is too large for
/// its place raises InvalidArgumentError with its name. 0 if it raised.
int parse_arguments(core_state *state, PyObject *args, const char *names, const char *format, ...);

/// An int as 64 bits; -1 if it raised.
int integer_of(core_state *state, PyObject *item, const char *name, int64_t *out);

// ------------------------------------------------------------------------------------------------
// lock.c

/// Lets one thread at a time use a handle; the others wait without the GIL.
typedef struct handle_lock {
  PyThread_type_lock lock;
  unsigned long owner;  ///< Thread that holds the lock; read and written under the GIL.
  int is_held;
} handle_lock;

/// Allocates the lock; -1 if it raised.
int handle_lock_init(handle_lock *lock);
/// Frees the lock.
void handle_lock_free(handle_lock *lock);

/// Waits for the handle. Raises (and returns -1) if this thread is already inside a call on it, as
/// in a progress callback, or if a signal handler raised.
int handle_enter(core_state *state, handle_lock *lock);
/// Lets the next thread in.
void handle_leave(handle_lock *lock);

// ------------------------------------------------------------------------------------------------
// views.c

/// Named arrays borrowed from Python for the time of one call.
typedef struct inputs {
  PyObject *items;  ///< List of (name, object), which keeps names and objects alive.
  size_t count;
  const char **names;
  hs_tensor_view *views;
  Py_buffer *buffers;
  size_t buffer_count;
} inputs;

/// Borrows the arrays of a dict {str: buffer}; -1 if it raised, and then nothing is held.
int inputs_acquire(core_state *state, PyObject *values, inputs *out);
/// Ends the loan; safe on zeroed inputs.
void inputs_release(inputs *inputs);

/// An array borrowed from Python for the time of one call, and the name that goes with it.
typedef struct named_value {
  const char *name;
  hs_tensor_view view;
  Py_buffer buffer;  ///< To be released.
} named_value;

/// Borrows the arguments (name, buffer), which must outlive the call; -1 if it raised, and then
/// nothing is held.
int named_value_acquire(core_state *state, PyObject *args, named_value *out);

/// UTF-8 names of a tuple of str, which must outlive them.
typedef struct names {
  const char **texts;
  size_t count;
} names;

/// Borrows the texts of a tuple of str; -1 if it raised, and then nothing is held.
int names_acquire(PyObject *tuple, names *out);
/// Frees the list.
void names_release(names *names);

/// Fills a view from an exported buffer; the view points into it. -1 if it raised.
int view_from_buffer(core_state *state, const char *name, const Py_buffer *buffer,
                     hs_tensor_view *out);

// ------------------------------------------------------------------------------------------------
// calls.c

/// None, or the exception of a status.
PyObject *none_or_error(core_state *state, hs_status status, const hs_error *error);

/// Bytes that a handle gives out in two calls: their number, then a copy of them.
typedef struct byte_source {
  void *handle;
  const char *key;  ///< Handed on to both; NULL where a handle has one kind of bytes.
  hs_status (*size)(void *handle, const char *key, size_t *out_size, hs_error *error);
  hs_status (*copy)(void *handle, const char *key, void *buffer, size_t capacity, size_t *out_size,
                    hs_error *error);
} byte_source;

/// A bytes object with what the source gives, asked for without the GIL; NULL if it raised.
PyObject *bytes_of(core_state *state, handle_lock *lock, const byte_source *source);

/// hs_model_run() or hs_simulation_run() on a handle.
typedef hs_status (*run_fn)(void *handle, const inputs *inputs, const hs_run_options *options,
                            hs_tensors **out_outputs, hs_error *error);

/// Runs with the arguments (inputs, extra outputs) and returns {name: Tensor}; NULL if it raised.
PyObject *run_of(core_state *state, handle_lock *lock, void *handle, run_fn run, PyObject *args);

/// What report_progress() needs as its `user_data`.
typedef struct progress_context {
  PyObject *callable;     ///< Or None: then only signals are looked for.
  PyObject *details;      ///< Only for rounding: gets more; NULL if nobody asked.
  PyThreadState *thread;  ///< PyEval_SaveThread()'s result, from before the library was called.
} progress_context;

/// An hs_progress_fn that calls a Python callable, which cancels by raising or returning False.
/// After the call, PyErr_Occurred() tells whether it or a signal handler raised.
int32_t report_progress(size_t completed, size_t total, void *user_data);

// ------------------------------------------------------------------------------------------------
// tensors.c

/// Makes a dict {name: Tensor} and takes the collection over, also if it raises.
PyObject *tensors_to_dict(core_state *state, hs_tensors *tensors, int is_writable);

// ------------------------------------------------------------------------------------------------
// model.c, simulation.c

/// A Model that owns the handle; frees the handle if it raises.
PyObject *model_wrap(core_state *state, hs_model *model);

/// Functions of the module: see _core.pyi.
PyObject *core_model_open(PyObject *module, PyObject *args);
PyObject *core_model_open_memory(PyObject *module, PyObject *args);
PyObject *core_simulation_create(PyObject *module, PyObject *args);
PyObject *core_compressor_create(PyObject *module, PyObject *args);
PyObject *core_fake_quantize(PyObject *module, PyObject *args);
PyObject *core_fake_quantize_backward(PyObject *module, PyObject *args);
PyObject *core_encoding_from_range(PyObject *module, PyObject *args);
PyObject *core_encoding_to_range(PyObject *module, PyObject *args);

/// The model inside a Model, with its lock; NULL if it raised.
hs_model *model_borrow(core_state *state, PyObject *object, handle_lock **out_lock);

extern PyType_Spec tensor_spec;
extern PyType_Spec model_spec;
extern PyType_Spec simulation_spec;
extern PyType_Spec compressor_spec;

/// Frees the memory of an object of a heap type and lets go of the type.
static inline void free_object(PyObject *self) {
  PyTypeObject *type = Py_TYPE(self);
  freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
  release(self);
  Py_DECREF(type);
}

/// Allocates an object of a heap type, zeroed.
static inline PyObject *new_object(PyTypeObject *type) {
  allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
  return allocate(type, 0);
}

#endif
