# SPDX-License-Identifier: Apache-2.0
# Loads the native module with threads that wait briefly.
"""Load the native module, whose OpenMP threads are to wait briefly.

libgomp's threads spin after a loop, by default for milliseconds. Beside another busy process, two
threads on one core then hold each other up: on two cores a network took 60 times as long. A count
of 1000 costs nothing on a quiet machine. libgomp reads its settings when it is loaded, and never
again; so the variable is set for that moment only, and not at all if the user has set either.
"""

from __future__ import annotations

import os

_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_SPIN_COUNT = "1000"


def _load() -> None:
    if any(name in os.environ for name in _SETTINGS):
        from . import _core as _core

        return
    os.environ["GOMP_SPINCOUNT"] = _SPIN_COUNT
    try:
        from . import _core as _core
    finally:
        del os.environ["GOMP_SPINCOUNT"]


_load()
