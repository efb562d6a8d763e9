# SPDX-License-Identifier: Apache-2.0
# Convolutions, matrix products and tables.
"""Writes layers that multiply by weights."""

from __future__ import annotations

from typing import Any

from .. import _activations
from .._builder import Builder, Value
from ._writers import (
    as_tuple,
    finish,
    refuse_channels_first,
    refuse_unless,
    shape_of,
    window,
    writes,
)


@writes("Conv1D", "Conv2D", "Conv3D")
def _conv(b: Builder, layer: Any, x: Value) -> Value:
    refuse_channels_first(layer)
    rank = layer.rank
    kind = _activations.name_of(layer.activation)
    suffix = None if kind == "linear" else "linear"
    source = b.first(x)
    shape = shape_of(layer, x)
    strides, dilations = as_tuple(layer.strides, rank), as_tuple(layer.dilation_rate, rank)
    attributes: dict[str, Any] = {}
    if layer.padding == "causal":
        attributes["pads"] = [(layer.kernel_size[0] - 1) * dilations[0], 0]
    else:
        attributes = window(layer.padding, x.shape, layer.kernel_size, strides, dilations)
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
    return finish(b, kind, Value(shape, first=out))


def _depthwise_node(b: Builder, layer: Any, x: Value, variable: Any, bias: Any, suffix: Any) -> str:
    rank = layer.rank
    kernel = as_tuple(layer.kernel_size, rank)
    strides, dilations = as_tuple(layer.strides, rank), as_tuple(layer.dilation_rate, rank)
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
        **window(layer.padding, x.shape, kernel, strides, dilations),
    )


@writes("DepthwiseConv1D", "DepthwiseConv2D")
def _depthwise(b: Builder, layer: Any, x: Value) -> Value:
    refuse_channels_first(layer)
    kind = _activations.name_of(layer.activation)
    suffix = None if kind == "linear" else "linear"
    bias = layer.bias if layer.use_bias else None
    out = _depthwise_node(b, layer, x, layer.kernel, bias, suffix)
    return finish(b, kind, Value(shape_of(layer, x), first=out))


@writes("SeparableConv1D", "SeparableConv2D")
def _separable(b: Builder, layer: Any, x: Value) -> Value:
    refuse_channels_first(layer)
    rank = layer.rank
    kind = _activations.name_of(layer.activation)
    inner = _depthwise_node(b, layer, x, layer.depthwise_kernel, False, "depthwise")
    kernel = b.parameter(layer.pointwise_kernel, "pointwise_kernel", (rank + 1, rank, *range(rank)))
    inputs = [inner, kernel]
    if layer.use_bias:
        inputs.append(b.parameter(layer.bias, "bias"))
    suffix = None if kind == "linear" else "linear"
    out = b.node("Conv", inputs, suffix, named=True, kernel_shape=[1] * rank)
    return finish(b, kind, Value(shape_of(layer, x), first=out))


@writes("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")
def _conv_transpose(b: Builder, layer: Any, x: Value) -> Value:
    refuse_channels_first(layer)
    refuse_unless(layer.output_padding is None, "output_padding")
    rank = layer.rank
    kind = _activations.name_of(layer.activation)
    strides, dilations = as_tuple(layer.strides, rank), as_tuple(layer.dilation_rate, rank)
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
    return finish(b, kind, Value(shape_of(layer, x), first=out))


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
    return finish(b, kind, Value(shape, last=out))


@writes("Embedding")
def _embedding(b: Builder, layer: Any, x: Value) -> Value:
    refuse_unless(not layer.mask_zero, "mask_zero: masks are not simulated")
    index = b.node("Cast", [b.last(x)], "indices", to=7)
    table = b.parameter(layer._embeddings, "embeddings")
    return Value(shape_of(layer, x), last=b.node("Gather", [table, index], named=True, axis=0))
