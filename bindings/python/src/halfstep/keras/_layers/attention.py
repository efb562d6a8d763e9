# SPDX-License-Identifier: Apache-2.0
# Attention.
"""Writes attention, with the tensors inside under names of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._builder import Builder, Value
from ._writers import refuse_unless, writes


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
