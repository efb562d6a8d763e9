# SPDX-License-Identifier: Apache-2.0
# Activation functions of Keras as ONNX operators.
"""Writes activation functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import UnsupportedOperatorError
from ._builder import Builder, Value

#: Activations that are one operator with fixed attributes.
_SINGLE: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("Relu", {}),
    "sigmoid": ("Sigmoid", {}),
    "tanh": ("Tanh", {}),
    "elu": ("Elu", {}),
    "selu": ("Selu", {}),
    "celu": ("Celu", {}),
    "softplus": ("Softplus", {}),
    "softsign": ("Softsign", {}),
    "gelu": ("Gelu", {}),
    "mish": ("Mish", {}),
    "exponential": ("Exp", {}),
    "hard_silu": ("HardSwish", {}),
    "hard_swish": ("HardSwish", {}),
    "hard_sigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    "sparse_sigmoid": ("HardSigmoid", {"alpha": 0.5, "beta": 0.5}),
    "leaky_relu": ("LeakyRelu", {"alpha": 0.2}),
    "soft_shrink": ("Shrink", {"lambd": 0.5, "bias": 0.5}),
    "hard_shrink": ("Shrink", {"lambd": 0.5, "bias": 0.0}),
}


def name_of(function: Any) -> str:
    """Return how Keras calls an activation, "linear" for none."""
    if function is None:
        return "linear"
    return getattr(function, "__name__", type(function).__name__)


def clip(b: Builder, x: str, low: float | None, high: float | None, suffix: str | None) -> str:
    """Bound a tensor."""
    ends = [
        "" if end is None else b.constant(end, what) for end, what in ((low, "min"), (high, "max"))
    ]
    return b.node("Clip", [x, *ends] if ends[1] else [x, ends[0]], suffix)


def function(b: Builder, kind: str, x: str, suffix: str | None = None) -> str:
    """Write an activation that does not depend on the layout and return its output."""
    if kind == "linear":
        return x
    if kind in _SINGLE:
        op, attributes = _SINGLE[kind]
        return b.node(op, [x], suffix, **attributes)
    if kind in ("silu", "swish"):
        return b.node("Mul", [x, b.node("Sigmoid", [x], "sigmoid")], suffix)
    if kind == "relu6":
        return clip(b, x, 0.0, 6.0, suffix)
    if kind == "hard_tanh":
        return clip(b, x, -1.0, 1.0, suffix)
    if kind == "log_sigmoid":
        inner = b.node("Softplus", [b.node("Neg", [x], "negated")], "softplus")
        return b.node("Neg", [inner], suffix)
    if kind == "tanh_shrink":
        return b.node("Sub", [x, b.node("Tanh", [x], "tanh")], suffix)
    if kind == "squareplus":  # (x + sqrt(x² + 4)) / 2
        shifted = b.node(
            "Add", [b.node("Mul", [x, x], "square"), b.constant(4.0, "four")], "shifted"
        )
        total = b.node("Add", [x, b.node("Sqrt", [shifted], "root")], "total")
        return b.node("Mul", [total, b.constant(0.5, "half")], suffix)
    if kind == "sparse_plus":  # 0 up to -1, (x + 1)² / 4 up to 1, x from there
        above = b.node("Relu", [b.node("Sub", [x, b.constant(1.0, "one")], "less")], "above")
        bent = b.node("Add", [clip(b, x, -1.0, 1.0, "middle"), b.constant(1.0, "shift")], "bent")
        square = b.node("Mul", [bent, bent], "square")
        quarter = b.node("Mul", [square, b.constant(0.25, "quarter")], "bow")
        return b.node("Add", [above, quarter], suffix)
    raise UnsupportedOperatorError(f"activation '{kind}'")


def apply(b: Builder, kind: str, value: Value, suffix: str | None = None) -> Value:
    """Write an activation in the layout that its input has."""
    if kind == "linear":
        return value
    if kind in ("softmax", "log_softmax"):
        op = "Softmax" if kind == "softmax" else "LogSoftmax"
        return Value(value.shape, last=b.node(op, [b.last(value)], suffix, axis=-1))
    return in_place(b, value, lambda x: function(b, kind, x, suffix))


def in_place(b: Builder, value: Value, write: Callable[[str], str]) -> Value:
    """Write something that works element by element, in the layout that its input has."""
    del b
    if value.first is not None:
        return Value(value.shape, first=write(value.first))
    assert value.last is not None
    return Value(value.shape, last=write(value.last))


def is_one(value: Any) -> bool:
    """Return whether every element is 1."""
    return bool((np.asarray(value) == 1).all())
