# SPDX-License-Identifier: Apache-2.0
# Exceptions of the PyTorch front end.
"""What `halfstep.torch` raises beside what the engine does (`halfstep.errors`)."""

from __future__ import annotations

from ..errors import (
    EncodingMismatchError,
    InvalidArgumentError,
    InvalidStateError,
    UnsupportedOperatorError,
)


class UntraceableModelError(UnsupportedOperatorError):
    """A model's Python code cannot be turned into a graph; the message names the line."""


class DeviceMismatchError(InvalidStateError):
    """Parts of a simulated model lie on different devices; the message names a layer."""


__all__ = [
    "DeviceMismatchError",
    "EncodingMismatchError",
    "InvalidArgumentError",
    "InvalidStateError",
    "UntraceableModelError",
]
