# SPDX-License-Identifier: Apache-2.0
# What functions of keras.ops are in ONNX.
"""Writes `keras.ops` functions that are called between layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from . import _activations
from ._builder import Builder, Value
from ._layers import aligned, placed, refuse_unless, reshaped, scaled

WRITERS: dict[str, Callable[..., Any]] = {}

_BINARY = {
    "Add": "Add",
    "Subtract": "Sub",
    "Multiply": "Mul",
    "Divide": "Div",
    "TrueDivide": "Div",
    "Maximum": "Max",
    "Minimum": "Min",
    "Power": "Pow",
}
_UNARY = {
    "Absolute": "Abs",
    "Abs": "Abs",
    "Negative": "Neg",
    "Exp": "Exp",
    "Log": "Log",
    "Sqrt": "Sqrt",
    "Reciprocal": "Reciprocal",
    "Sin": "Sin",
    "Cos": "Cos",
    "Erf": "Erf",
    "Floor": "Floor",
    "Ceil": "Ceil",
    "Round": "Round",
    "Sign": "Sign",
}
_ACTIVATIONS = {
    "Relu": "relu",
    "Relu6": "relu6",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Silu": "silu",
    "Softplus": "softplus",
    "Softsign": "softsign",
    "Selu": "selu",
    "HardSigmoid": "hard_sigmoid",
    "HardSilu": "hard_silu",
    "HardTanh": "hard_tanh",
    "LogSigmoid": "log_sigmoid",
    "TanhShrink": "tanh_shrink",
}
_REDUCTIONS = {"Mean": "ReduceMean", "Sum": "ReduceSum", "Max": "ReduceMax", "Min": "ReduceMin"}


def _number(value: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(value), np.float32)


def _binary(b: Builder, op: Any, x1: Any, x2: Any) -> Value:
    kind = _BINARY[type(op).__name__]
    if isinstance(x1, Value) and isinstance(x2, Value):
        names, is_first = aligned(b, (x1, x2))
        shape = op.compute_output_spec(_symbol(x1), _symbol(x2)).shape
        return placed(shape, b.node(kind, names), is_first)
    value, other = (x1, x2) if isinstance(x1, Value) else (x2, x1)
    constant = _number(other)
    refuse_unless(constant.ndim <= value.rank, "a constant of more axes than the tensor")
    if value is x1:
        return scaled(b, value, kind, constant, None, "constant")
    refuse_unless(constant.size == 1, "a constant tensor on the left side")
    name = b.constant(constant.reshape(()), "constant")
    return _activations.in_place(b, value, lambda one: b.node(kind, [name, one]))


def _symbol(value: Value) -> Any:
    return keras.KerasTensor(value.shape)


def _unary(b: Builder, op: Any, x: Value) -> Value:
    kind = _UNARY[type(op).__name__]
    return _activations.in_place(b, x, lambda one: b.node(kind, [one]))


def _square(b: Builder, op: Any, x: Value) -> Value:
    return _activations.in_place(b, x, lambda one: b.node("Mul", [one, one]))


def _activation(b: Builder, op: Any, x: Value) -> Value:
    return _activations.apply(b, _ACTIVATIONS[type(op).__name__], x)


def _gelu(b: Builder, op: Any, x: Value) -> Value:
    how = "tanh" if op.approximate else "none"
    return _activations.in_place(b, x, lambda one: b.node("Gelu", [one], approximate=how))


def _leaky_relu(b: Builder, op: Any, x: Value) -> Value:
    alpha = float(op.negative_slope)
    return _activations.in_place(b, x, lambda one: b.node("LeakyRelu", [one], alpha=alpha))


def _elu(b: Builder, op: Any, x: Value) -> Value:
    alpha = float(op.alpha)
    return _activations.in_place(b, x, lambda one: b.node("Elu", [one], alpha=alpha))


def _softmax(b: Builder, op: Any, x: Value) -> Value:
    refuse_unless(isinstance(op.axis, int), "several axes, or none")
    return Value(x.shape, last=b.node("Softmax", [b.last(x)], axis=op.axis))


def _clip(b: Builder, op: Any, x: Value) -> Value:
    low, high = float(op.x_min), float(op.x_max)
    return _activations.in_place(b, x, lambda one: _activations.clip(b, one, low, high, None))


def _reduction(b: Builder, op: Any, x: Value) -> Value:
    refuse_unless(op.axis is not None, "reduction over the batch")
    axes = [op.axis] if isinstance(op.axis, int) else list(op.axis)
    axes = sorted(axis % x.rank for axis in axes)
    refuse_unless(0 not in axes, "reduction over the batch")
    shape = tuple(op.compute_output_spec(_symbol(x)).shape)
    kind = _REDUCTIONS[type(op).__name__]
    numbers = b.constant(axes, "axes", np.int64)
    out = b.node(kind, [b.last(x), numbers], keepdims=int(op.keepdims))
    return Value(shape, last=out)


def _reshape(b: Builder, op: Any, x: Value) -> Value:
    return reshaped(b, x, tuple(op.compute_output_spec(_symbol(x)).shape))


def _transpose(b: Builder, op: Any, x: Value) -> Value:
    axes = tuple(reversed(range(x.rank))) if op.axes is None else tuple(op.axes)
    shape = tuple(x.shape[axis] for axis in axes)
    return Value(shape, last=b.node("Transpose", [b.last(x)], perm=[a % x.rank for a in axes]))


def _expand(b: Builder, op: Any, x: Value) -> Value:
    shape = tuple(op.compute_output_spec(_symbol(x)).shape)
    axes = [op.axis] if isinstance(op.axis, int) else list(op.axis)
    numbers = b.constant([axis % len(shape) for axis in axes], "axes", np.int64)
    return Value(shape, last=b.node("Unsqueeze", [b.last(x), numbers]))


def _squeeze(b: Builder, op: Any, x: Value) -> Value:
    refuse_unless(op.axis is not None, "axes that are not named")
    shape = tuple(op.compute_output_spec(_symbol(x)).shape)
    axes = [op.axis] if isinstance(op.axis, int) else list(op.axis)
    numbers = b.constant([axis % x.rank for axis in axes], "axes", np.int64)
    return Value(shape, last=b.node("Squeeze", [b.last(x), numbers]))


def _concatenate(b: Builder, op: Any, xs: Any) -> Value:
    shape = tuple(op.compute_output_spec([_symbol(x) for x in xs]).shape)
    names = [b.last(x) for x in xs]
    return Value(shape, last=b.node("Concat", names, axis=op.axis % len(shape)))


def _matmul(b: Builder, op: Any, x1: Any, x2: Any) -> Value:
    refuse_unless(isinstance(x1, Value) and isinstance(x2, Value), "a constant factor")
    shape = tuple(op.compute_output_spec(_symbol(x1), _symbol(x2)).shape)
    return Value(shape, last=b.node("MatMul", [b.last(x1), b.last(x2)]))


def _get_item(b: Builder, op: Any, x: Value, key: Any) -> Value:
    keys = list(key) if isinstance(key, (tuple, list)) else [key]
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        keys[at : at + 1] = [slice(None)] * (x.rank - len(keys) + 1)
    starts, ends, steps, axes, dropped = [], [], [], [], []
    for axis, one in enumerate(keys):
        refuse_unless(isinstance(one, (int, slice)), f"index {one!r}")
        if isinstance(one, int):
            end = one + 1 if one != -1 else np.iinfo(np.int64).max
            one = slice(one, end)
            dropped.append(axis)
        if one == slice(None):
            continue
        refuse_unless((one.step or 1) > 0, "a negative step")
        starts.append(one.start or 0)
        ends.append(np.iinfo(np.int64).max if one.stop is None else one.stop)
        steps.append(one.step or 1)
        axes.append(axis)
    shape = tuple(op.compute_output_spec(_symbol(x), key).shape)
    if not axes:
        return x
    numbers = [
        b.constant(values, what, np.int64)
        for values, what in ((starts, "starts"), (ends, "ends"), (axes, "axes"), (steps, "steps"))
    ]
    out = b.node("Slice", [b.last(x), *numbers], "slice" if dropped else None)
    if dropped:
        out = b.node("Squeeze", [out, b.constant(dropped, "dropped", np.int64)])
    return Value(shape, last=out)


for _names, _writer in (
    (_BINARY, _binary),
    (_UNARY, _unary),
    (_ACTIVATIONS, _activation),
    (_REDUCTIONS, _reduction),
):
    WRITERS.update(dict.fromkeys(_names, _writer))
WRITERS |= {
    "Square": _square,
    "Gelu": _gelu,
    "LeakyRelu": _leaky_relu,
    "Elu": _elu,
    "Softmax": _softmax,
    "Clip": _clip,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "ExpandDims": _expand,
    "Squeeze": _squeeze,
    "Concatenate": _concatenate,
    "Matmul": _matmul,
    "GetItem": _get_item,
}
