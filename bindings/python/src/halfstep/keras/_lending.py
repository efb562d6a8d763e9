# SPDX-License-Identifier: Apache-2.0
# Weights that the engine changes while their variables have no memory of their own.
"""Hands the memory of variables over to the engine and back, so that no weight exists twice."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from ..errors import FileAccessError
from ._builder import Parameter, memory_of
from ._network import Network

#: Bytes below which a variable keeps its memory: copies of these do not matter.
_LEAST = 1 << 16


class _Memory:
    """The memory of a tensor that nobody else refers to, to be written by NumPy."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        view = np.asarray(memoryview(tensor))
        self.__array_interface__ = {
            **view.__array_interface__,
            "data": (view.__array_interface__["data"][0], False),
        }


def fresh(shape: Any) -> tuple[Any, np.ndarray]:
    """Return a new float32 tensor, and an array over its memory that can be written."""
    with tf.device("CPU"):
        tensor = tf.raw_ops.Empty(shape=list(shape), dtype=tf.float32)
    return tensor, np.asarray(_Memory(tensor))


def _give(variable: Any, tensor: Any) -> None:
    """Let a variable refer to a tensor, of whatever shape, instead of its present one."""
    tf.raw_ops.AssignVariableOp(resource=variable.value.handle, value=tensor)


class Lending:
    """Context in which the engine has the variables' memory; undoes everything if it fails.

    The large variables' values go, in ONNX's order of axes, to memory that the engine may change;
    the variables have none meanwhile. TensorFlow's allocator keeps what it once had, so the memory
    comes from there, one variable at a time. Values as they were wait in a temporary file.

    Parameters
    ----------
    network : Network
        The network whose variables are lent.
    """

    def __init__(self, network: Network) -> None:
        counts = Counter(id(one.variable) for one in network.parameters.values())
        self._once = {key for key, count in counts.items() if count == 1}
        self._lent: dict[int, tuple[Any, int]] = {}
        self._undo: list[Callable[[], object]] = []
        self._file = tempfile.TemporaryFile()

    def __enter__(self) -> Lending:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is not None:
                for undo in reversed(self._undo):
                    undo()
        finally:
            self._file.close()

    def on_failure(self, undo: Callable[[], object]) -> None:
        """Remember what takes a change back."""
        self._undo.append(undo)

    def take(self, parameter: Parameter) -> np.ndarray | None:
        """Return a variable's value as the engine's memory; None for one that is not lent."""
        variable = parameter.variable
        size = 4 * int(np.prod(variable.shape))
        lendable = id(variable) in self._once and hasattr(variable.value, "handle")
        if size < _LEAST or parameter.zeros or not lendable:
            return None
        _, memory = fresh(parameter.shape)
        memory[...] = parameter.constant()
        start = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(memoryview(memory_of(variable)).cast("B"))
        except OSError as error:
            raise FileAccessError(f"temporary file for '{variable.path}': {error}") from error
        self._lent[id(variable)] = variable, start
        self.on_failure(lambda: self._restore(variable, start))
        _give(variable, tf.zeros((0,)))
        return memory

    def _restore(self, variable: Any, start: int) -> None:
        self._file.seek(start)
        tensor, memory = fresh(variable.shape)
        self._file.readinto(memoryview(memory).cast("B"))
        _give(variable, tensor)

    def assign(self, variable: Any, value: np.ndarray) -> None:
        """Give a variable a new value, and its memory back if that was lent."""
        if id(variable) not in self._lent:
            before = memory_of(variable)
            if not np.may_share_memory(before, value):
                self.on_failure(lambda: variable.assign(before))
                variable.assign(value)
            return
        tensor, memory = fresh(variable.shape)
        memory[...] = value
        _give(variable, tensor)
