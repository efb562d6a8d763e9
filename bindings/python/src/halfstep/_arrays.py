# SPDX-License-Identifier: Apache-2.0
# The only module that imports NumPy, and only when the first array is needed.
"""NumPy arrays from and for the native module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core
from .errors import InvalidArgumentError, TypeMismatchError

if TYPE_CHECKING:
    from .records import TensorInfo

#: Names of ONNX's element types by number.
TYPE_NAMES: dict[int, str] = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    8: "string",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    14: "complex64",
    15: "complex128",
    16: "bfloat16",
    17: "float8_e4m3fn",
    18: "float8_e4m3fnuz",
    19: "float8_e5m2",
    20: "float8_e5m2fnuz",
    21: "uint4",
    22: "int4",
    23: "float4_e2m1fn",
    24: "float8_e8m0fnu",
    25: "uint2",
    26: "int2",
}


def from_tensors(tensors: Mapping[str, _core.Tensor]) -> dict[str, np.ndarray]:
    """Return arrays over the tensors' own memory."""
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}


def floats(data: bytes) -> np.ndarray:
    """Return a read-only float32 vector over the bytes."""
    return np.frombuffer(data, np.float32)


def as_array(value: Any, name: str) -> np.ndarray:
    """Return an array over the memory of what a user gave, or of a copy where that is not possible.

    Raises
    ------
    TypeMismatchError
        For what is no array of numbers in main memory.
    """
    if isinstance(value, np.ndarray):
        array = value
    else:
        convert = np.from_dlpack if hasattr(value, "__dlpack__") else np.asarray
        try:
            array = convert(value)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            kind = type(value).__name__
            raise TypeMismatchError(f"'{name}': {kind} is no array: {error}") from error
    if array.dtype.kind not in "biufc" or not array.dtype.isnative:
        raise TypeMismatchError(f"'{name}': elements of type {array.dtype} are not supported")
    if not array.flags.aligned:
        array = array.copy()
    return array


def as_inputs(values: Any, infos: tuple[TensorInfo, ...]) -> dict[str, np.ndarray]:
    """Return the inputs of a run by name; a lone array is the only input."""
    if isinstance(values, Mapping):
        return {name: as_array(value, name) for name, value in values.items()}
    if len(infos) != 1:
        names = ", ".join(f"'{info.name}'" for info in infos)
        raise InvalidArgumentError(
            f"the network has {len(infos)} inputs ({names}): expected a dict of arrays by name"
        )
    return {infos[0].name: as_array(values, infos[0].name)}


def fake_quantize(
    array: Any,
    scale: Any,
    zero_point: Any,
    bits: int,
    signed: bool,
    axis: int | None,
    block_axis: int | None,
    block_size: int,
    strict: bool,
    out: np.ndarray | None,
) -> np.ndarray:
    """Do what `halfstep.fake_quantize` says."""
    values = as_array(array, "array")
    scales = np.require(scale, np.float32, "CA").reshape(-1)
    offsets = np.asarray(zero_point)
    if offsets.dtype.kind not in "iu":
        raise TypeMismatchError(f"zero_point: expected integers, got {offsets.dtype}")
    if offsets.size and (offsets.min() < -(2**31) or offsets.max() >= 2**31):
        raise InvalidArgumentError("zero_point: expected 32-bit integers")
    offsets = np.ascontiguousarray(
        np.broadcast_to(offsets.astype(np.int32).reshape(-1), scales.shape)
        if offsets.size == 1
        else offsets.astype(np.int32).reshape(-1)
    )
    if out is None:
        out = np.empty(values.shape, np.float32)
    else:
        if not isinstance(out, np.ndarray) or out.dtype != np.float32:
            raise TypeMismatchError("out: expected a float32 array")
        if out.shape != values.shape or not out.flags.c_contiguous or not out.flags.writeable:
            raise InvalidArgumentError(
                f"out: expected a writable row-major array of shape {values.shape}"
            )
        same = out.ctypes.data == values.ctypes.data and out.strides == values.strides
        if not same and np.may_share_memory(out, values):
            values = values.copy()
    rank = values.ndim
    axes = []
    for which, what in ((axis, "axis"), (block_axis, "block_axis")):
        which = 0 if which is None else which
        if not -rank <= which < max(rank, 1):
            raise InvalidArgumentError(f"{what}: {which} is outside rank {rank}")
        axes.append(which % rank if rank else 0)
    granularity = 2 if block_axis is not None else 0 if axis is None else 1
    _core.fake_quantize(
        values, scales, offsets, out, granularity, *axes, block_size, bits, signed, strict
    )
    return out
