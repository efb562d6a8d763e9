# SPDX-License-Identifier: Apache-2.0
# What each Keras layer is in ONNX.
"""Writes the calls of layers.

Convolutions, pooling and batch norms work with channels behind the batch, as in ONNX; what follows
stays in that layout as long as it can, so that the graph is the one that PyTorch exports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from ..errors import UnsupportedOperatorError
from . import _activations
from ._builder import Builder, Value

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


def _channels_last(layer: Any) -> None:
    refuse_unless(
        getattr(layer, "data_format", "channels_last") == "channels_last",
        "data_format 'channels_first'",
    )


def _tuple(value: Any, count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value)


def _window(
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


def _finish(b: Builder, kind: str, value: Value) -> Value:
    return _activations.apply(b, kind, value)


# -------------------------------------------------------------------------------------------------
# Convolutions and matrix products


@writes("Conv1D", "Conv2D", "Conv3D")
def _conv(b: Builder, layer: Any, x: Value) -> Value:
    _channels_last(layer)
    rank = layer.rank
    kind = _activations.name_of(layer.activation)
    suffix = None if kind == "linear" else "linear"
    source = b.first(x)
    shape = shape_of(layer, x)
    strides, dilations = _tuple(layer.strides, rank), _tuple(layer.dilation_rate, rank)
    attributes: dict[str, Any] = {}
    if layer.padding == "causal":
        attributes["pads"] = [(layer.kernel_size[0] - 1) * dilations[0], 0]
    else:
        attributes = _window(layer.padding, x.shape, layer.kernel_size, strides, dilations)
    inputs = [source, b.parameter(layer._kernel, "kernel", (rank + 1, rank, *range(rank)))]
    if layer.use_bias:
        inputs.append(b.parameter(layer.bias, "bias"))
    out = b.node(
        "Conv",
        inputs,
        suffix,
        named=True,
        kernel_shape=list(layer.kernel_size),
        strides=list(strides),
        dilations=list(dilations),
        group=layer.groups,
        **attributes,
    )
    return _finish(b, kind, Value(shape, first=out))


def _depthwise_node(b: Builder, layer: Any, x: Value, variable: Any, bias: Any, suffix: Any) -> str:
    rank = layer.rank
    kernel = _tuple(layer.kernel_size, rank)
    strides, dilations = _tuple(layer.strides, rank), _tuple(layer.dilation_rate, rank)
    channels, multiplier = (int(n) for n in variable.shape[-2:])
    name = "kernel" if bias is not False else "depthwise_kernel"
    weight = b.parameter(
        variable, name, (rank, rank + 1, *range(rank)), (channels * multiplier, 1, *kernel)
    )
    inputs = [b.first(x), weight]
    if bias is not None and bias is not False:
        inputs.append(b.parameter(bias, "bias"))
    return b.node(
        "Conv",
        inputs,
        suffix,
        named=bias is not False,
        kernel_shape=list(kernel),
        strides=list(strides),
        dilations=list(dilations),
        group=channels,
        **_window(layer.padding, x.shape, kernel, strides, dilations),
    )


@writes("DepthwiseConv1D", "DepthwiseConv2D")
def _depthwise(b: Builder, layer: Any, x: Value) -> Value:
    _channels_last(layer)
    kind = _activations.name_of(layer.activation)
    suffix = None if kind == "linear" else "linear"
    bias = layer.bias if layer.use_bias else None
    out = _depthwise_node(b, layer, x, layer.kernel, bias, suffix)
    return _finish(b, kind, Value(shape_of(layer, x), first=out))


@writes("SeparableConv1D", "SeparableConv2D")
def _separable(b: Builder, layer: Any, x: Value) -> Value:
    _channels_last(layer)
    rank = layer.rank
    kind = _activations.name_of(layer.activation)
    inner = _depthwise_node(b, layer, x, layer.depthwise_kernel, False, "depthwise")
    kernel = b.parameter(layer.pointwise_kernel, "pointwise_kernel", (rank + 1, rank, *range(rank)))
    inputs = [inner, kernel]
    if layer.use_bias:
        inputs.append(b.parameter(layer.bias, "bias"))
    suffix = None if kind == "linear" else "linear"
    out = b.node("Conv", inputs, suffix, named=True, kernel_shape=[1] * rank)
    return _finish(b, kind, Value(shape_of(layer, x), first=out))


@writes("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")
def _conv_transpose(b: Builder, layer: Any, x: Value) -> Value:
    _channels_last(layer)
    refuse_unless(layer.output_padding is None, "output_padding")
    rank = layer.rank
    kind = _activations.name_of(layer.activation)
    strides, dilations = _tuple(layer.strides, rank), _tuple(layer.dilation_rate, rank)
    before, after, beyond = [], [], []
    for size, stride, dilation in zip(layer.kernel_size, strides, dilations, strict=True):
        spare = (size - 1) * dilation + 1 - stride
        total = max(spare, 0) if layer.padding == "same" else 0
        before.append(total // 2)
        after.append(total - total // 2)
        beyond.append(max(-spare, 0))
    inputs = [b.first(x), b.parameter(layer.kernel, "kernel", (rank + 1, rank, *range(rank)))]
    if layer.use_bias:
        inputs.append(b.parameter(layer.bias, "bias"))
    out = b.node(
        "ConvTranspose",
        inputs,
        None if kind == "linear" else "linear",
        named=True,
        kernel_shape=list(layer.kernel_size),
        strides=list(strides),
        dilations=list(dilations),
        pads=before + after,
        output_padding=beyond,
    )
    return _finish(b, kind, Value(shape_of(layer, x), first=out))


@writes("Dense")
def _dense(b: Builder, layer: Any, x: Value) -> Value:
    refuse_unless(getattr(layer, "lora_rank", None) is None, "LoRA")
    refuse_unless(getattr(layer, "quantization_mode", None) is None, "Keras's own quantization")
    kind = _activations.name_of(layer.activation)
    suffix = None if kind == "linear" else "linear"
    kernel = b.parameter(layer._kernel, "kernel")
    shape = shape_of(layer, x)
    source = b.last(x)
    if x.rank == 2:
        inputs = [source, kernel]
        if layer.use_bias:
            inputs.append(b.parameter(layer.bias, "bias"))
        out = b.node("Gemm", inputs, suffix, named=True)
    elif layer.use_bias:
        product = b.node("MatMul", [source, kernel], "product", named=True)
        out = b.node("Add", [product, b.parameter(layer.bias, "bias")], suffix)
    else:
        out = b.node("MatMul", [source, kernel], suffix, named=True)
    return _finish(b, kind, Value(shape, last=out))


@writes("MultiHeadAttention")
def _attention(
    b: Builder, layer: Any, query: Value, value: Value, key: Any = None, **rest: Any
) -> Value:
    refuse_unless(
        all(item is None or item is False for item in rest.values()),
        "masks, attention scores as an output",
    )
    key = value if key is None else key
    refuse_unless(query.rank == value.rank == key.rank == 3, "inputs that are not [N, T, C]")
    heads = layer.num_heads

    def project(source: Value, dense: Any, what: str) -> str:
        channels, size = int(dense._kernel.shape[0]), int(np.prod(dense._kernel.shape[1:]))
        weight = b.parameter(dense._kernel, f"{what}/kernel", None, (channels, size))
        out = b.node("MatMul", [b.last(source), weight], f"{what}/product")
        if dense.bias is not None:
            out = b.node("Add", [out, b.parameter(dense.bias, f"{what}/bias", None, (size,))], what)
        shape = b.constant([0, 0, heads, size // heads], f"{what}/shape", np.int64)
        return b.node("Reshape", [out, shape], f"{what}/heads")

    def turned(source: str, what: str, perm: Sequence[int]) -> str:
        return b.node("Transpose", [source], what, perm=list(perm))

    q = turned(project(query, layer._query_dense, "query"), "query/turned", (0, 2, 1, 3))
    k = turned(project(key, layer._key_dense, "key"), "key/turned", (0, 2, 3, 1))
    v = turned(project(value, layer._value_dense, "value"), "value/turned", (0, 2, 1, 3))
    q = b.node("Mul", [q, b.constant(layer.key_dim**-0.5, "scale")], "query/scaled")
    weights = b.node("Softmax", [b.node("MatMul", [q, k], "scores")], "weights", axis=-1)
    mixed = turned(b.node("MatMul", [weights, v], "mixed"), "mixed/turned", (0, 2, 1, 3))
    size = heads * (layer._value_dim or layer.key_dim)
    mixed = b.node("Reshape", [mixed, b.constant([0, 0, size], "mixed/shape", np.int64)], "joined")
    dense = layer._output_dense
    target = int(dense._kernel.shape[-1])
    refuse_unless(len(dense._kernel.shape) == 3, "output_shape of several axes")
    weight = b.parameter(dense._kernel, "output/kernel", None, (size, target))
    if dense.bias is None:
        out = b.node("MatMul", [mixed, weight], named=True)
    else:
        product = b.node("MatMul", [mixed, weight], "output/product", named=True)
        out = b.node("Add", [product, b.parameter(dense.bias, "output/bias", None, (target,))])
    return Value((*query.shape[:-1], target), last=out)


@writes("Embedding")
def _embedding(b: Builder, layer: Any, x: Value) -> Value:
    refuse_unless(not layer.mask_zero, "mask_zero")
    index = b.node("Cast", [b.last(x)], "indices", to=7)
    table = b.parameter(layer._embeddings, "embeddings")
    return Value(shape_of(layer, x), last=b.node("Gather", [table, index], named=True, axis=0))


# -------------------------------------------------------------------------------------------------
# Normalization


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


# -------------------------------------------------------------------------------------------------
# Pooling, padding, sizes


@writes("MaxPooling1D", "MaxPooling2D", "MaxPooling3D")
@writes("AveragePooling1D", "AveragePooling2D", "AveragePooling3D")
def _pooling(b: Builder, layer: Any, x: Value) -> Value:
    _channels_last(layer)
    rank = x.rank - 2
    size, strides = _tuple(layer.pool_size, rank), _tuple(layer.strides, rank)
    op = "MaxPool" if "Max" in type(layer).__name__ else "AveragePool"
    padding = _window(layer.padding, x.shape, size, strides, (1,) * rank)
    out = b.node(
        op, [b.first(x)], named=True, kernel_shape=list(size), strides=list(strides), **padding
    )
    return Value(shape_of(layer, x), first=out)


@writes("GlobalAveragePooling1D", "GlobalAveragePooling2D", "GlobalAveragePooling3D")
@writes("GlobalMaxPooling1D", "GlobalMaxPooling2D", "GlobalMaxPooling3D")
def _global_pooling(b: Builder, layer: Any, x: Value, **rest: Any) -> Value:
    _channels_last(layer)
    refuse_unless(rest.get("mask") is None, "masks")
    op = "GlobalMaxPool" if "Max" in type(layer).__name__ else "GlobalAveragePool"
    shape = shape_of(layer, x)
    if layer.keepdims:
        return Value(shape, first=b.node(op, [b.first(x)], named=True))
    pooled = b.node(op, [b.first(x)], "pooled", named=True)
    return Value(shape, last=b.node("Flatten", [pooled], axis=1))


def _pairs(value: Any, rank: int) -> list[tuple[int, int]]:
    if isinstance(value, int):
        return [(value, value)] * rank
    if rank == 1 and len(value) == 2 and isinstance(value[0], int):
        return [tuple(value)]
    return [(one, one) if isinstance(one, int) else tuple(one) for one in value]


@writes("ZeroPadding1D", "ZeroPadding2D", "ZeroPadding3D")
def _zero_padding(b: Builder, layer: Any, x: Value) -> Value:
    _channels_last(layer)
    pairs = _pairs(layer.padding, x.rank - 2)
    amounts = [0, 0, *(p[0] for p in pairs), 0, 0, *(p[1] for p in pairs)]
    out = b.node("Pad", [b.first(x), b.constant(amounts, "padding", np.int64)], named=True)
    return Value(shape_of(layer, x), first=out)


@writes("Cropping1D", "Cropping2D", "Cropping3D")
def _cropping(b: Builder, layer: Any, x: Value) -> Value:
    _channels_last(layer)
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
    _channels_last(layer)
    factors = _tuple(layer.size, x.rank - 2)
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
    _channels_last(layer)
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


# -------------------------------------------------------------------------------------------------
# Activations


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
@writes("GaussianDropout", "GaussianNoise", "StochasticDepth", "ActivityRegularization", "Identity")
def _identity(b: Builder, layer: Any, x: Value) -> Value:
    return x


# -------------------------------------------------------------------------------------------------
# Shapes


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


# -------------------------------------------------------------------------------------------------
# Merging


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


@writes("BoundedReLU")
def _bounded_relu(b: Builder, layer: Any, x: Value) -> Value:
    bounds = keras.ops.convert_to_numpy(layer.maximum)
    rest = _activations.in_place(b, x, lambda one: b.node("Relu", [one], "relu"))
    return scaled(b, rest, "Min", bounds, None, "maximum")
