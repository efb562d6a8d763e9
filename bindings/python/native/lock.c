// SPDX-License-Identifier: Apache-2.0
// One thread at a time in a handle, without holding the GIL while waiting.
#include "core.h"

int handle_lock_init(handle_lock *lock) {
  lock->lock = PyThread_allocate_lock();
  if (lock->lock) return 0;
  PyErr_NoMemory();
  return -1;
}

void handle_lock_free(handle_lock *lock) {
  if (lock->lock) PyThread_free_lock(lock->lock);
  lock->lock = NULL;
}

int handle_enter(core_state *state, handle_lock *lock) {
  unsigned long self = PyThread_get_thread_ident();
  if (lock->is_held && lock->owner == self) {
    raise_status(state, HS_ERR_INVALID_STATE,
                 "the object is busy with the call that this callback belongs to");
    return -1;
  }
  PyLockStatus status = PyThread_acquire_lock_timed(lock->lock, 0, 0);
  while (status != PY_LOCK_ACQUIRED) {
    Py_BEGIN_ALLOW_THREADS
    status = PyThread_acquire_lock_timed(lock->lock, -1, 1);
    Py_END_ALLOW_THREADS
    if (status == PY_LOCK_INTR && PyErr_CheckSignals() < 0) return -1;
  }
  lock->owner = self;
  lock->is_held = 1;
  return 0;
}

void handle_leave(handle_lock *lock) {
  lock->is_held = 0;
  PyThread_release_lock(lock->lock);
}
