# SPDX-License-Identifier: Apache-2.0
# What the writers of Keras layers share.
"""The table of writers, and what several of them need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...errors import UnsupportedOperatorError
from .. import _activations
from .._builder import Builder, Value

#: Writers by class name: layers of the same name elsewhere have to be registered by their users.
WRITERS: dict[str, Callable[..., Any]] = {}


def writes(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a writer for layer classes."""

    def register(writer: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            WRITERS[name] = writer
        return writer

    return register


def shape_of(layer: Any, *values: Value) -> tuple[int | None, ...]:
    """Return the shape that Keras computes for a layer's output."""
    shapes = [value.shape for value in values]
    return tuple(layer.compute_output_shape(shapes[0] if len(shapes) == 1 else shapes))


def refuse_unless(condition: bool, what: str) -> None:
    """Raise unless a layer has the form that can be written."""
    if not condition:
        raise UnsupportedOperatorError(what)


def refuse_channels_first(layer: Any) -> None:
    """Raise unless a layer has Keras's default order of axes."""
    refuse_unless(
        getattr(layer, "data_format", "channels_last") == "channels_last",
        "data_format 'channels_first'",
    )


def as_tuple(value: Any, count: int) -> tuple[int, ...]:
    """Return one extent for each axis."""
    return (value,) * count if isinstance(value, int) else tuple(value)


def window(
    padding: str,
    shape: Sequence[int | None],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> dict[str, Any]:
    """Return ONNX's padding attributes for a window over a Keras shape ``[N, spatial..., C]``."""
    if padding == "valid":
        return {}
    refuse_unless(padding == "same", f"padding '{padding}'")
    spatial = shape[1:-1]
    before, after = [], []
    for extent, size, stride, dilation in zip(spatial, kernel, strides, dilations, strict=True):
        reach = (size - 1) * dilation + 1
        if stride == 1:
            total = reach - 1
        elif extent is None:
            return {"auto_pad": "SAME_UPPER"}
        else:
            total = max((-(-extent // stride) - 1) * stride + reach - extent, 0)
        before.append(total // 2)
        after.append(total - total // 2)
    return {"pads": before + after} if any(before + after) else {}


def finish(b: Builder, kind: str, value: Value) -> Value:
    """Write the activation that a layer ends with."""
    return _activations.apply(b, kind, value)


def scaled(b: Builder, x: Value, op: str, constant: Any, suffix: Any, what: str) -> Value:
    """Combine a tensor with a constant that broadcasts against it in Keras's layout."""
    constant = np.asarray(constant, np.float32)
    constant = constant.reshape((1,) * (x.rank - constant.ndim) + constant.shape)
    if constant.size == 1:
        name = b.constant(constant.reshape(()), what)
        return _activations.in_place(b, x, lambda one: b.node(op, [one, name], suffix))
    if x.first is not None and x.rank > 2:
        turned = b.constant(np.moveaxis(constant, -1, 1), what)
        return Value(x.shape, first=b.node(op, [x.first, turned], suffix))
    return Value(x.shape, last=b.node(op, [b.last(x), b.constant(constant, what)], suffix))


def reshaped(b: Builder, x: Value, target: Sequence[int | None], suffix: Any = None) -> Value:
    """Give a tensor another shape; one extent besides the batch may be unknown."""
    rest = [-1 if n is None else int(n) for n in target[1:]]
    refuse_unless(rest.count(-1) <= 1, "more than one extent that is not fixed")
    if x.rank == 2 and len(rest) > 1 and all(n == 1 for n in rest[:-1]):
        # A vector to be used as a picture of one pixel: channels stay where ONNX wants them.
        numbers = b.constant([0, rest[-1], *rest[:-1]], "shape", np.int64)
        return Value(target, first=b.node("Reshape", [b.last(x), numbers], suffix))
    numbers = b.constant([0, *rest], "shape", np.int64)
    return Value(target, last=b.node("Reshape", [b.last(x), numbers], suffix))


def aligned(b: Builder, values: Sequence[Value]) -> tuple[list[str], bool]:
    """Return tensors in a common layout, and whether that has channels behind the batch."""
    ranks = {value.rank for value in values}
    refuse_unless(len(ranks) == 1, f"inputs of different rank: {[v.shape for v in values]}")
    if ranks.pop() > 2 and any(value.first is not None for value in values):
        return [b.first(value) for value in values], True
    return [b.last(value) for value in values], False


def placed(shape: Sequence[int | None], name: str, is_first: bool) -> Value:
    """Return a value whose tensor is known in one layout."""
    return Value(shape, first=name) if is_first else Value(shape, last=name)
