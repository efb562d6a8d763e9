# SPDX-License-Identifier: Apache-2.0
# Shapes and merging.
"""Writes layers that move, join and combine tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._builder import Builder, Value
from ._writers import aligned, placed, reshaped, shape_of, writes


@writes("Reshape")
def _reshape(b: Builder, layer: Any, x: Value) -> Value:
    return reshaped(b, x, shape_of(layer, x))


@writes("Flatten")
def _flatten(b: Builder, layer: Any, x: Value) -> Value:
    shape = shape_of(layer, x)
    pixel = x.rank > 2 and all(n == 1 for n in x.shape[1:-1])
    source = b.first(x) if pixel and x.first is not None else b.last(x)
    return Value(shape, last=b.node("Flatten", [source], axis=1))


@writes("Permute")
def _permute(b: Builder, layer: Any, x: Value) -> Value:
    return Value(shape_of(layer, x), last=b.node("Transpose", [b.last(x)], perm=[0, *layer.dims]))


@writes("RepeatVector")
def _repeat_vector(b: Builder, layer: Any, x: Value) -> Value:
    axes = b.constant([1], "axes", np.int64)
    times = b.constant([1, layer.n, 1], "repeats", np.int64)
    out = b.node("Tile", [b.node("Unsqueeze", [b.last(x), axes], "unsqueezed"), times])
    return Value(shape_of(layer, x), last=out)


_MERGES = {
    "Add": "Add",
    "Subtract": "Sub",
    "Multiply": "Mul",
    "Maximum": "Max",
    "Minimum": "Min",
    "Average": "Add",
}


@writes(*_MERGES)
def _merge(b: Builder, layer: Any, values: Sequence[Value]) -> Value:
    kind = type(layer).__name__
    names, is_first = aligned(b, values)
    out = names[0]
    for index, name in enumerate(names[1:], 2):
        last = index == len(names) and kind != "Average"
        out = b.node(_MERGES[kind], [out, name], None if last else f"partial{index}")
    if kind == "Average":
        out = b.node("Mul", [out, b.constant(1 / len(names), "scale")])
    return placed(shape_of(layer, *values), out, is_first)


@writes("Concatenate")
def _concatenate(b: Builder, layer: Any, values: Sequence[Value]) -> Value:
    rank = values[0].rank
    names, is_first = aligned(b, values)
    axis = layer.axis % rank
    if is_first and axis:
        axis = 1 if axis == rank - 1 else axis + 1
    out = b.node("Concat", names, named=True, axis=axis)
    return placed(shape_of(layer, *values), out, is_first)
