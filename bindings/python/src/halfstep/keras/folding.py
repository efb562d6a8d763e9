# SPDX-License-Identifier: Apache-2.0
# Batch norm folding and cross-layer equalization of Keras models.
"""Algorithms that change the weights of a Keras model and keep its function."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import onnx

from ..errors import UnsupportedOperatorError
from ..model import Fold, Model
from ._network import Network
from ._rebuild import Names, clone, copy_weights, rebuild
from .layers import BoundedReLU

#: Operators whose second input is a weight and whose third one is a bias.
_LINEAR = ("Conv", "ConvTranspose", "Gemm")


class _Changed:
    """What an algorithm of the engine left of a network's nodes and constants."""

    def __init__(self, network: Network, model: Model) -> None:
        self.network = network
        self.constants = dict(model.initializers)
        graph = onnx.load_from_string(model.to_bytes()).graph
        self.by_name = {node.name: node for node in graph.node}
        self.by_output = {name: node for node in graph.node for name in node.output}
        self._nodes: dict[str, list[Any]] = {}
        for node in network.builder.nodes:
            self._nodes.setdefault(node.label, []).append(node)
        for name, value in network.builder.constants.items():
            after = self.constants.get(name)
            if after is not None and not np.array_equal(after, value):
                raise UnsupportedOperatorError(
                    f"layer '{name.rsplit('/', 1)[0]}': its constants would have to change"
                )

    def values(self, label: str) -> dict[int, np.ndarray]:
        """Return the new values of a call's variables, by the variable's identity."""
        result: dict[int, np.ndarray] = {}
        for node in self._nodes.get(label, ()):
            after = self.by_name.get(node.name)
            for index, name in enumerate(node.inputs):
                parameter = self.network.parameters.get(name)
                if parameter is None:
                    continue
                if node.op in _LINEAR and after is not None and len(after.input) > index:
                    name = after.input[index]
                if name in self.constants:
                    result[id(parameter.variable)] = parameter.value(self.constants[name])
        return result

    def new_bias(self, label: str) -> np.ndarray | None:
        """Return the bias of a layer that had none, if it has one now."""
        for node in reversed(self._nodes.get(label, ())):
            after = self.by_name.get(node.name)
            if node.op in _LINEAR and after is not None and len(node.inputs) < 3:
                if len(after.input) > 2 and after.input[2]:
                    return self.constants[after.input[2]]
                return None
            if node.op in _LINEAR:
                return None
        return None

    def bounds(self, label: str) -> np.ndarray | None:
        """Return the bounds by channel that a call's Clip has become, if it has."""
        for node in self._nodes.get(label, ()):
            after = self.by_output.get(node.outputs[0])
            if node.op == "Clip" and after is not None and after.op_type == "Min":
                constant = next(name for name in after.input if name in self.constants)
                return self.constants[constant].reshape(-1)
        return None


def _applied(model: keras.Model, changed: _Changed, dropped: set[str]) -> keras.Model:
    names = Names()
    made: dict[tuple[int, str], Any] = {}
    weights: list[tuple[Any, Any, str]] = []
    extras: list[tuple[Any, np.ndarray]] = []
    uses: dict[int, int] = {}
    for operation in changed.network.layers.values():
        uses[id(operation)] = uses.get(id(operation), 0) + 1

    def call(operation: Any, label: str, *args: Any, **kwargs: Any) -> Any:
        if label in dropped:
            return args[0]
        if not isinstance(operation, keras.layers.Layer):
            return clone(operation)(*args, **kwargs)
        bias, bounds = changed.new_bias(label), changed.bounds(label)
        # Calls of a shared layer need layers of their own once their weights may differ.
        key = (id(operation), label if changed.values(label) and dropped else "")
        if uses[id(operation)] == 1 or bounds is not None:
            key = (id(operation), label)
        if key not in made:
            changes: dict[str, Any] = {} if bias is None else {"use_bias": True}
            if bounds is not None and isinstance(operation, keras.layers.ReLU):
                layer: Any = BoundedReLU(len(bounds), name=names.take(operation, label))
                extras.append((layer, bounds))
                made[key] = layer
                return layer(*args, **kwargs)
            if bounds is not None:
                changes["activation"] = "linear"
            layer = clone(operation, names.take(operation, label), **changes)
            made[key] = layer
            weights.append((operation, layer, label))
        result = made[key](*args, **kwargs)
        if bounds is None:
            return result
        if not hasattr(operation, "activation"):
            raise UnsupportedOperatorError(f"layer '{label}': bounds by channel")
        if type(operation).__name__ == "Activation":
            made[key].activation = keras.activations.linear
        extra = BoundedReLU(len(bounds), name=f"{made[key].name}_bounded")
        extras.append((extra, bounds))
        return extra(result)

    result = rebuild(model, call)
    for before, after, label in weights:
        copy_weights(before, after)
        values = changed.values(label)
        for old, new in zip(before.weights, after.weights, strict=False):
            if id(old) in values:
                new.assign(values[id(old)])
        bias = changed.new_bias(label)
        if bias is not None:
            after.bias.assign(bias)
    for layer, bounds in extras:
        layer.set_bounds(bounds)
    return result


def fold_all_batch_norms(model: keras.Model) -> tuple[keras.Model, tuple[Fold, ...]]:
    """Fold batch norms into the layers beside them.

    Parameters
    ----------
    model : keras.Model
        A functional or sequential model, built; it is not changed.

    Returns
    -------
    keras.Model
        A model of the same function without the batch norms that were folded. Layers keep their
        names; nested models come out flat.
    tuple of Fold
        The folds that were made, with the names of the layers.

    Raises
    ------
    UnsupportedOperatorError
        Naming every layer that cannot be described to the engine, or a subclassed model.
    InvalidArgumentError, NonFiniteValueError

    Examples
    --------
    >>> net = keras.Sequential(
    ...     [
    ...         keras.Input((8, 8, 3)),
    ...         keras.layers.Conv2D(4, 3, name="conv"),
    ...         keras.layers.BatchNormalization(name="norm"),
    ...     ]
    ... )
    >>> folded, folds = fold_all_batch_norms(net)
    >>> [(fold.layer, fold.batch_norm) for fold in folds]
    [('conv', 'norm')]
    >>> [layer.name for layer in folded.layers][1:]
    ['conv']
    """
    network = Network(model)
    bound = network.bound()
    folds = bound.fold_batch_norms()
    changed = _Changed(network, bound)
    return _applied(model, changed, {fold.batch_norm for fold in folds}), folds


def equalize_model(
    model: keras.Model, *, absorb_high_biases: bool = False, max_iterations: int = 50
) -> keras.Model:
    """Fold batch norms and balance the weight ranges of consecutive layers.

    Parameters
    ----------
    model : keras.Model
        A functional or sequential model, built; it is not changed.
    absorb_high_biases : bool
        Whether the next layer absorbs high biases, which may change the function.
    max_iterations : int
        Passes over the model at most, 1 or more.

    Returns
    -------
    keras.Model
        A model of the same function. Layers keep their names; ``ReLU(max_value=6)`` between
        equalized layers becomes `BoundedReLU`, under its name.

    Raises
    ------
    UnsupportedOperatorError, InvalidArgumentError, NonFiniteValueError

    References
    ----------
    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019.
    arXiv:1906.04721
    """
    folded, _ = fold_all_batch_norms(model)
    network = Network(folded)
    bound = network.bound()
    bound.equalize(absorb_high_biases=absorb_high_biases, max_iterations=max_iterations)
    return _applied(folded, _Changed(network, bound), set())
