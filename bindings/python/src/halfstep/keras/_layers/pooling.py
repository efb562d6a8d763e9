# SPDX-License-Identifier: Apache-2.0
# Pooling, padding, cropping and sizes of pictures.
"""Writes layers that change the extents of pictures."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._builder import Builder, Value
from ._writers import as_tuple, refuse_channels_first, refuse_unless, shape_of, window, writes


@writes("MaxPooling1D", "MaxPooling2D", "MaxPooling3D")
@writes("AveragePooling1D", "AveragePooling2D", "AveragePooling3D")
def _pooling(b: Builder, layer: Any, x: Value) -> Value:
    refuse_channels_first(layer)
    rank = x.rank - 2
    size, strides = as_tuple(layer.pool_size, rank), as_tuple(layer.strides, rank)
    op = "MaxPool" if "Max" in type(layer).__name__ else "AveragePool"
    padding = window(layer.padding, x.shape, size, strides, (1,) * rank)
    out = b.node(
        op, [b.first(x)], named=True, kernel_shape=list(size), strides=list(strides), **padding
    )
    return Value(shape_of(layer, x), first=out)


@writes("GlobalAveragePooling1D", "GlobalAveragePooling2D", "GlobalAveragePooling3D")
@writes("GlobalMaxPooling1D", "GlobalMaxPooling2D", "GlobalMaxPooling3D")
def _global_pooling(b: Builder, layer: Any, x: Value, **rest: Any) -> Value:
    refuse_channels_first(layer)
    refuse_unless(rest.get("mask") is None, "masks")
    op = "GlobalMaxPool" if "Max" in type(layer).__name__ else "GlobalAveragePool"
    shape = shape_of(layer, x)
    if layer.keepdims:
        return Value(shape, first=b.node(op, [b.first(x)], named=True))
    pooled = b.node(op, [b.first(x)], "pooled", named=True)
    return Value(shape, last=b.node("Flatten", [pooled], axis=1))


@writes("AdaptiveAveragePooling1D", "AdaptiveAveragePooling2D", "AdaptiveAveragePooling3D")
@writes("AdaptiveMaxPooling1D", "AdaptiveMaxPooling2D", "AdaptiveMaxPooling3D")
def _adaptive_pooling(b: Builder, layer: Any, x: Value) -> Value:
    refuse_channels_first(layer)
    shape = shape_of(layer, x)
    extents = list(zip(x.shape[1:-1], shape[1:-1], strict=True))
    refuse_unless(
        all(given is not None and given % wanted == 0 for given, wanted in extents),
        f"output_size {layer.output_size} of pictures {x.shape[1:-1]}: windows of one size only",
    )
    size = [given // wanted for given, wanted in extents]
    op = "MaxPool" if "Max" in type(layer).__name__ else "AveragePool"
    out = b.node(op, [b.first(x)], named=True, kernel_shape=size, strides=size)
    return Value(shape, first=out)


def _pairs(value: Any, rank: int) -> list[tuple[int, int]]:
    if isinstance(value, int):
        return [(value, value)] * rank
    if rank == 1 and len(value) == 2 and isinstance(value[0], int):
        return [tuple(value)]
    return [(one, one) if isinstance(one, int) else tuple(one) for one in value]


@writes("ZeroPadding1D", "ZeroPadding2D", "ZeroPadding3D")
def _zero_padding(b: Builder, layer: Any, x: Value) -> Value:
    refuse_channels_first(layer)
    pairs = _pairs(layer.padding, x.rank - 2)
    amounts = [0, 0, *(p[0] for p in pairs), 0, 0, *(p[1] for p in pairs)]
    out = b.node("Pad", [b.first(x), b.constant(amounts, "padding", np.int64)], named=True)
    return Value(shape_of(layer, x), first=out)


@writes("Cropping1D", "Cropping2D", "Cropping3D")
def _cropping(b: Builder, layer: Any, x: Value) -> Value:
    refuse_channels_first(layer)
    pairs = _pairs(layer.cropping, x.rank - 2)
    ends = [-p[1] if p[1] else np.iinfo(np.int64).max for p in pairs]
    inputs = [
        b.first(x),
        b.constant([p[0] for p in pairs], "starts", np.int64),
        b.constant(ends, "ends", np.int64),
        b.constant(range(2, x.rank), "axes", np.int64),
    ]
    return Value(shape_of(layer, x), first=b.node("Slice", inputs, named=True))


@writes("UpSampling1D", "UpSampling2D", "UpSampling3D")
def _up_sampling(b: Builder, layer: Any, x: Value) -> Value:
    refuse_channels_first(layer)
    factors = as_tuple(layer.size, x.rank - 2)
    method = getattr(layer, "interpolation", "nearest")
    refuse_unless(method in ("nearest", "bilinear"), f"interpolation '{method}'")
    scales = b.constant([1, 1, *factors], "scales")
    attributes = (
        {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
        if method == "bilinear"
        else {
            "mode": "nearest",
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        }
    )
    out = b.node("Resize", [b.first(x), "", scales], named=True, **attributes)
    return Value(shape_of(layer, x), first=out)


@writes("Resizing")
def _resizing(b: Builder, layer: Any, x: Value) -> Value:
    refuse_channels_first(layer)
    refuse_unless(x.rank == 4, "pictures without a batch")
    refuse_unless(not (layer.crop_to_aspect_ratio or layer.pad_to_aspect_ratio), "aspect ratios")
    refuse_unless(not getattr(layer, "antialias", False), "antialias")
    method = layer.interpolation
    refuse_unless(method in ("nearest", "bilinear"), f"interpolation '{method}'")
    refuse_unless(x.shape[1] is not None and x.shape[2] is not None, "pictures of unknown size")
    sizes = b.constant([layer.height, layer.width], "sizes", np.int64)
    attributes: dict[str, Any] = {"coordinate_transformation_mode": "half_pixel", "axes": [2, 3]}
    if method == "bilinear":
        attributes["mode"] = "linear"
    else:
        attributes |= {"mode": "nearest", "nearest_mode": "round_prefer_ceil"}
    inputs = [b.first(x), "", "", sizes]
    return Value(shape_of(layer, x), first=b.node("Resize", inputs, named=True, **attributes))
