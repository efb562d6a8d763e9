# SPDX-License-Identifier: Apache-2.0
# Keras models with fewer channels.
"""Builds a copy of a Keras model around parameters that lost channels."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np

from .._prune import new_values
from ..compression import CompressionStats
from ..errors import UnsupportedOperatorError
from ..model import Model
from ._builder import Parameter
from ._network import Network
from ._rebuild import Names, clone, rebuild

#: What a layer's configuration calls its output channels.
_OUTPUTS = {"Dense": "units", **{f"Conv{n}D": "filters" for n in (1, 2, 3)}}
_OUTPUTS |= {f"Conv{n}DTranspose": "filters" for n in (1, 2, 3)}
_OUTPUTS |= {f"SeparableConv{n}D": "filters" for n in (1, 2)}


def pruned(
    model: keras.Model,
    network: Network,
    layers: dict[str, str],
    smaller: Model,
    stats: CompressionStats,
) -> keras.Model:
    """Return a model with the channels that the engine left.

    Parameters
    ----------
    model : keras.Model
        The model.
    network : Network
        The model as the engine sees it.
    layers : dict of str to str
        Labels of layers by weight.
    smaller : Model
        The engine's pruned model.
    stats : CompressionStats
        What pruning did.

    Raises
    ------
    UnsupportedOperatorError
        If a constant that is no variable lost channels.
    """
    values: dict[int, np.ndarray] = {}
    for name, value in new_values(smaller, stats).items():
        known = network.parameters.get(name)
        if known is None:
            raise UnsupportedOperatorError(f"constant '{name}' is no variable of the model")
        values[id(known.variable)] = _variable(known, value)
    constants = smaller.initializers
    biases = {
        layers[layer.weight]: constants[layer.bias].reshape(-1)
        for layer in stats.layers
        if layer.bias is not None and layer.weight in layers
    }
    names = Names()
    made: dict[int, Any] = {}

    def call(operation: Any, label: str, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(operation, keras.layers.Layer):
            return clone(operation)(*args, **kwargs)
        layer = made.get(id(operation))
        if layer is not None:
            return layer(*args, **kwargs)
        bias = biases.get(label)
        changes = _settings(operation, values)
        if bias is not None:
            changes["use_bias"] = True
        layer = clone(operation, names.take(operation, label), **changes)
        made[id(operation)] = layer
        result = layer(*args, **kwargs)
        # A bias comes last in every layer that can be given one.
        for before, after in zip(operation.weights, layer.weights, strict=False):
            after.assign(values.get(id(before), before))
        if bias is not None:
            layer.bias.assign(bias)
        return result

    return rebuild(model, call)


def _variable(known: Parameter, constant: np.ndarray) -> np.ndarray:
    """What the variable of a constant that lost channels has to be."""
    if known.blocks or known.zeros:
        raise UnsupportedOperatorError(f"weight '{known.variable.path}' is packed")
    full = [int(known.variable.shape[axis]) for axis in known.order]
    if len(full) == constant.ndim and tuple(full) == known.shape:
        full = list(constant.shape)
    else:
        # Channels are the first of the axes that the constant has as one.
        full[0] = constant.size // math.prod(full[1:])
    return constant.reshape(full).transpose(np.argsort(known.order))


def _settings(layer: Any, values: dict[int, np.ndarray]) -> dict[str, Any]:
    """What changes in a layer's configuration when its kernel becomes another one."""
    kind = type(layer).__name__
    what = _OUTPUTS.get(kind)
    kernel = layer.pointwise_kernel if "Separable" in kind else getattr(layer, "kernel", None)
    value = values.get(id(kernel))
    if what is None or value is None:
        return {}
    # Kernels end with [inputs, outputs], those of transposed convolutions with [outputs, inputs].
    outputs = value.shape[-2 if "Transpose" in kind else -1]
    changes = {what: outputs}
    groups = getattr(layer, "groups", 1)
    if groups > 1 and "Separable" not in kind:
        inputs, before = (int(n) for n in kernel.shape[-2:])
        if inputs == 1 or before == groups:
            # Such groups go as a whole.
            changes["groups"] = outputs * groups // before
    return changes
