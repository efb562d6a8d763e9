# SPDX-License-Identifier: Apache-2.0
# Normalization and scaling.
"""Writes layers that shift and scale."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from .._builder import Builder, Value
from ._writers import refuse_unless, scaled, writes


@writes("BatchNormalization")
def _batch_norm(b: Builder, layer: Any, x: Value, **rest: Any) -> Value:
    refuse_unless(rest.get("mask") is None, "masks")
    axis = layer.axis if isinstance(layer.axis, int) else layer.axis[0]
    refuse_unless(axis % x.rank == x.rank - 1, f"axis {axis}, which is not the last one")
    channels = int(layer.moving_mean.shape[0])
    source = b.first(x)
    gamma = (
        b.parameter(layer.gamma, "gamma") if layer.scale else b.constant(np.ones(channels), "gamma")
    )
    beta = (
        b.parameter(layer.beta, "beta") if layer.center else b.constant(np.zeros(channels), "beta")
    )
    mean = b.parameter(layer.moving_mean, "moving_mean")
    variance = b.parameter(layer.moving_variance, "moving_variance")
    out = b.node(
        "BatchNormalization",
        [source, gamma, beta, mean, variance],
        named=True,
        epsilon=float(layer.epsilon),
    )
    return Value(x.shape, first=out) if x.rank > 2 else Value(x.shape, last=out)


@writes("LayerNormalization")
def _layer_norm(b: Builder, layer: Any, x: Value) -> Value:
    refuse_unless(not getattr(layer, "rms_scaling", False), "rms_scaling")
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    axes = sorted(axis % x.rank for axis in axes)
    refuse_unless(axes == list(range(axes[0], x.rank)), f"axis {layer.axis}, not the last ones")
    shape = tuple(int(x.shape[axis]) for axis in axes)  # type: ignore[arg-type]
    gamma = (
        b.parameter(layer.gamma, "gamma") if layer.scale else b.constant(np.ones(shape), "gamma")
    )
    inputs = [b.last(x), gamma]
    if layer.center:
        inputs.append(b.parameter(layer.beta, "beta"))
    return Value(
        x.shape,
        last=b.node(
            "LayerNormalization", inputs, named=True, axis=axes[0], epsilon=float(layer.epsilon)
        ),
    )


@writes("Rescaling")
def _rescaling(b: Builder, layer: Any, x: Value) -> Value:
    shift = np.asarray(layer.offset, np.float32)
    suffix = "scaled" if shift.any() else None
    x = scaled(b, x, "Mul", layer.scale, suffix, "scale")
    return scaled(b, x, "Add", shift, None, "offset") if shift.any() else x


@writes("Normalization")
def _normalization(b: Builder, layer: Any, x: Value) -> Value:
    refuse_unless(
        layer.mean is not None, "no statistics yet: call adapt() or give mean and variance"
    )
    mean = keras.ops.convert_to_numpy(layer.mean)
    deviation = np.maximum(
        np.sqrt(keras.ops.convert_to_numpy(layer.variance)), np.float32(keras.backend.epsilon())
    )
    if layer.invert:
        return scaled(
            b, scaled(b, x, "Mul", deviation, "scaled", "scale"), "Add", mean, None, "mean"
        )
    return scaled(b, scaled(b, x, "Sub", mean, "centered", "mean"), "Div", deviation, None, "scale")


@writes("LayerScale")
def _layer_scale(b: Builder, layer: Any, x: Value) -> Value:
    name = b.parameter(layer.gamma, "gamma")
    return Value(x.shape, last=b.node("Mul", [b.last(x), name], named=True))
