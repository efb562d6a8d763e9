# SPDX-License-Identifier: Apache-2.0
# Layers that consist of several operators, with quantizers between these.
"""Runs composite layers operator by operator, as the graph that the engine sees has them.

A runner gets the layer, a function that quantizes a tensor inside by the suffix of its name, and
the arguments of the call. Everything is an operation of Keras on the layer's own variables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

#: Quantizes what the engine quantizes inside the layer; other tensors pass.
Quantize = Callable[[str, Any], Any]

RUNNERS: dict[str, Callable[..., Any]] = {}


def _runs(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(runner: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            RUNNERS[name] = runner
        return runner

    return register


@_runs("SeparableConv1D", "SeparableConv2D")
def _separable(layer: Any, quantize: Quantize, x: Any) -> Any:
    x = ops.depthwise_conv(
        x,
        layer.depthwise_kernel,
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
    )
    x = quantize("depthwise", x)
    x = ops.conv(x, layer.pointwise_kernel, padding="valid", data_format=layer.data_format)
    if layer.use_bias:
        x = ops.add(x, ops.convert_to_tensor(layer.bias))
    return layer.activation(x)


@_runs("MultiHeadAttention")
def _attention(
    layer: Any, quantize: Quantize, query: Any, value: Any, key: Any = None, training: Any = None
) -> Any:
    heads = layer.num_heads

    def affine(x: Any, dense: Any, what: str, last: str | None) -> Any:
        kernel = ops.convert_to_tensor(dense._kernel)
        inner = kernel.shape[0] if what != "output" else int(np.prod(kernel.shape[:2]))
        x = ops.matmul(x, ops.reshape(kernel, (inner, -1)))
        if dense.bias is None:
            return x if last is None and what == "output" else quantize(f"{what}/product", x)
        x = quantize(f"{what}/product", x)
        x = ops.add(x, ops.reshape(ops.convert_to_tensor(dense.bias), (-1,)))
        return x if last is None else quantize(last, x)

    def split(x: Any) -> Any:
        shape = ops.shape(x)
        return ops.transpose(
            ops.reshape(x, (-1, shape[1], heads, x.shape[-1] // heads)), (0, 2, 1, 3)
        )

    key = value if key is None else key
    q = split(affine(query, layer._query_dense, "query", "query"))
    k = split(affine(key, layer._key_dense, "key", "key"))
    v = split(affine(value, layer._value_dense, "value", "value"))
    scale = quantize("scale", ops.convert_to_tensor(np.float32(layer.key_dim**-0.5)))
    q = quantize("query/scaled", ops.multiply(q, scale))
    scores = quantize("scores", ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))))
    weights = quantize("weights", ops.softmax(scores, -1))
    if layer._dropout > 0.0:
        weights = layer._dropout_layer(weights, training=training)
    mixed = quantize("mixed", ops.matmul(weights, v))
    size = mixed.shape[1] * mixed.shape[3]
    mixed = ops.reshape(ops.transpose(mixed, (0, 2, 1, 3)), (-1, ops.shape(mixed)[2], size))
    return affine(mixed, layer._output_dense, "output", None)


@_runs("Bidirectional")
def _bidirectional(layer: Any, quantize: Quantize, x: Any, training: Any = None) -> Any:
    results = []
    for one, prefix in ((layer.forward_layer, "forward"), (layer.backward_layer, "backward")):
        result = one(x, training=training)
        if one.return_sequences and one.go_backwards:
            result = ops.flip(result, 1)
        which = 0 if one.return_sequences else 1
        results.append(quantize(f"{prefix}/states:{which}", result))
    there, back = results
    if layer.merge_mode is None:
        return results
    if layer.merge_mode == "concat":
        return ops.concatenate(results, -1)
    if layer.merge_mode == "ave":
        half = quantize("half", ops.convert_to_tensor(np.float32(0.5)))
        return ops.multiply(quantize("total", ops.add(there, back)), half)
    return (ops.add if layer.merge_mode == "sum" else ops.multiply)(there, back)


@_runs("Rescaling")
def _rescaling(layer: Any, quantize: Quantize, x: Any) -> Any:
    scale = quantize("scale", ops.convert_to_tensor(np.asarray(layer.scale, np.float32)))
    offset = np.asarray(layer.offset, np.float32)
    x = ops.multiply(ops.cast(x, "float32"), scale)
    if not offset.any():
        return x
    return ops.add(quantize("scaled", x), quantize("offset", ops.convert_to_tensor(offset)))


@_runs("Normalization")
def _normalization(layer: Any, quantize: Quantize, x: Any) -> Any:
    mean = quantize("mean", ops.convert_to_tensor(layer.mean))
    deviation = ops.maximum(ops.sqrt(layer.variance), keras.backend.epsilon())
    deviation = quantize("scale", ops.cast(deviation, "float32"))
    if layer.invert:
        return ops.add(quantize("scaled", ops.multiply(x, deviation)), mean)
    return ops.divide(quantize("centered", ops.subtract(x, mean)), deviation)


_MERGES = {"Add": ops.add, "Multiply": ops.multiply, "Maximum": ops.maximum, "Minimum": ops.minimum}


@_runs("Average", *_MERGES)
def _merge(layer: Any, quantize: Quantize, xs: Sequence[Any]) -> Any:
    merge, is_mean = _MERGES.get(type(layer).__name__, ops.add), "Average" in type(layer).__name__
    result = xs[0]
    for index, x in enumerate(xs[1:], 2):
        result = merge(result, x)
        if index < len(xs) or is_mean:
            result = quantize(f"partial{index}", result)
    if is_mean:
        share = quantize("scale", ops.convert_to_tensor(np.float32(1 / len(xs))))
        result = ops.multiply(result, share)
    return result


@_runs("ReLU")
def _relu(layer: Any, quantize: Quantize, x: Any) -> Any:
    x = quantize("leaky", ops.leaky_relu(x, float(layer.negative_slope)))
    return ops.minimum(x, float(layer.max_value))


@_runs("Activation")
def _activation(layer: Any, quantize: Quantize, x: Any) -> Any:
    kind = layer.activation.__name__
    if kind == "log_sigmoid":
        return ops.negative(
            quantize("softplus", ops.softplus(quantize("negated", ops.negative(x))))
        )
    if kind == "tanh_shrink":
        return ops.subtract(x, quantize("tanh", ops.tanh(x)))

    def constant(value: float, suffix: str) -> Any:
        return quantize(suffix, ops.convert_to_tensor(np.float32(value)))

    if kind == "squareplus":
        square = quantize("square", ops.multiply(x, x))
        shifted = quantize("shifted", ops.add(square, constant(4.0, "four")))
        total = quantize("total", ops.add(x, quantize("root", ops.sqrt(shifted))))
        return ops.multiply(total, constant(0.5, "half"))
    if kind == "sparse_plus":
        less = quantize("less", ops.subtract(x, constant(1.0, "one")))
        above = quantize("above", ops.relu(less))
        middle = quantize("middle", ops.clip(x, -1.0, 1.0))
        bent = quantize("bent", ops.add(middle, constant(1.0, "shift")))
        square = quantize("square", ops.multiply(bent, bent))
        return ops.add(above, quantize("bow", ops.multiply(square, constant(0.25, "quarter"))))
    return layer.activation(x)
