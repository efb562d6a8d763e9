# SPDX-License-Identifier: Apache-2.0
# Activations.
"""Writes layers that work element by element."""

from __future__ import annotations

from typing import Any

from .. import _activations
from .._builder import Builder, Value
from ._writers import refuse_unless, writes


@writes("Activation")
def _activation(b: Builder, layer: Any, x: Value) -> Value:
    return _activations.apply(b, _activations.name_of(layer.activation), x)


@writes("ReLU")
def _relu(b: Builder, layer: Any, x: Value) -> Value:
    refuse_unless(not layer.threshold, "threshold")
    slope, top = float(layer.negative_slope), layer.max_value

    def write(one: str) -> str:
        if slope:
            out = b.node("LeakyRelu", [one], None if top is None else "leaky", alpha=slope)
            return out if top is None else _activations.clip(b, out, None, float(top), None)
        if top is None:
            return b.node("Relu", [one])
        return _activations.clip(b, one, 0.0, float(top), None)

    return _activations.in_place(b, x, write)


@writes("LeakyReLU")
def _leaky_relu(b: Builder, layer: Any, x: Value) -> Value:
    slope = float(layer.negative_slope)
    return _activations.in_place(b, x, lambda one: b.node("LeakyRelu", [one], alpha=slope))


@writes("ELU")
def _elu(b: Builder, layer: Any, x: Value) -> Value:
    alpha = float(layer.alpha)
    return _activations.in_place(b, x, lambda one: b.node("Elu", [one], alpha=alpha))


@writes("PReLU")
def _prelu(b: Builder, layer: Any, x: Value) -> Value:
    rank = len(layer.alpha.shape)
    if x.first is not None and rank > 1:
        slope = b.parameter(layer.alpha, "alpha", (rank - 1, *range(rank - 1)))
        return Value(x.shape, first=b.node("PRelu", [x.first, slope], named=True))
    slope = b.parameter(layer.alpha, "alpha")
    return Value(x.shape, last=b.node("PRelu", [b.last(x), slope], named=True))


@writes("Softmax")
def _softmax(b: Builder, layer: Any, x: Value, mask: Any = None) -> Value:
    refuse_unless(mask is None, "masks")
    refuse_unless(isinstance(layer.axis, int), "several axes")
    return Value(x.shape, last=b.node("Softmax", [b.last(x)], named=True, axis=layer.axis))


@writes("Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "AlphaDropout")
@writes("RandomBrightness", "RandomContrast", "RandomFlip", "RandomRotation", "RandomTranslation")
@writes(
    "RandomZoom",
    "GaussianDropout",
    "GaussianNoise",
    "StochasticDepth",
    "ActivityRegularization",
    "Identity",
)
def _identity(b: Builder, layer: Any, x: Value) -> Value:
    return x


@writes("BoundedReLU")
def _bounded_relu(b: Builder, layer: Any, x: Value) -> Value:
    rest = _activations.in_place(b, x, lambda one: b.node("Relu", [one], "relu"))
    channels, ones = int(layer.maximum.shape[0]), (1,) * max(x.rank - 2, 0)
    if rest.first is not None and x.rank > 2:
        bounds = b.parameter(layer.maximum, "maximum", None, (1, channels, *ones))
        return Value(x.shape, first=b.node("Min", [rest.first, bounds]))
    bounds = b.parameter(layer.maximum, "maximum", None, (1, *ones, channels))
    return Value(x.shape, last=b.node("Min", [b.last(rest), bounds]))
