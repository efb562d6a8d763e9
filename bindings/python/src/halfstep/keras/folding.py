# SPDX-License-Identifier: Apache-2.0
# Batch norm folding and cross-layer equalization of Keras models.
"""Algorithms that change the weights of a Keras model and keep its function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import onnx

from ..errors import UnsupportedOperatorError
from ..model import Model
from ..records import Fold
from ._builder import Parameter
from ._network import Network
from ._rebuild import Names, clone, rebuild
from .layers import BoundedReLU

#: Operators whose second input is a weight and whose third one is a bias.
_LINEAR = ("Conv", "ConvTranspose", "Gemm")


class _Changed:
    """What an algorithm of the engine left of a network's nodes and constants.

    Takes the constants out of the engine's model, so that each of them can go once it is used.
    """

    def __init__(self, network: Network, model: Model) -> None:
        self.network = network
        names = list(model.initializers)
        self.constants = {name: model.take_initializer(name) for name in names}
        graph = onnx.load_from_string(model.to_bytes()).graph
        self.by_name = {node.name: node for node in graph.node}
        self.by_output = {name: node for node in graph.node for name in node.output}
        self._nodes: dict[str, list[Any]] = {}
        #: Labels of the calls that read a constant.
        self._readers: dict[str, set[str]] = {}
        for node in network.builder.nodes:
            self._nodes.setdefault(node.label, []).append(node)
            after = self.by_name.get(node.name)
            for name in (*node.inputs, *(after.input if after is not None else ())):
                self._readers.setdefault(name, set()).add(node.label)
        for name, value in network.builder.constants.items():
            after = self.constants.get(name)
            if after is None or np.array_equal(after, value):
                continue
            if name.rsplit("/", 1)[-1] not in ("gamma", "beta"):
                raise UnsupportedOperatorError(
                    f"layer '{name.rsplit('/', 1)[0]}': its constants would have to change"
                )

    def values(self, label: str) -> dict[int, Callable[[], np.ndarray]]:
        """Return how to get the new values of a call's variables, by the variable's identity."""
        result: dict[int, Callable[[], np.ndarray]] = {}
        for node in self._nodes.get(label, ()):
            after = self.by_name.get(node.name)
            for index, name in enumerate(node.inputs):
                parameter = self.network.parameters.get(name)
                if parameter is None:
                    continue
                replaced = node.op in (*_LINEAR, "Min")
                if replaced and after is not None and len(after.input) > index:
                    name = after.input[index]
                if name in self.constants:
                    result[id(parameter.variable)] = functools.partial(self._value, parameter, name)
        return result

    def _value(self, parameter: Parameter, name: str) -> np.ndarray:
        return parameter.value(self.constants[name])

    def forget(self, label: str) -> None:
        """Let go of what a call's layer, and no other, reads: it has it now."""
        for name, readers in self._readers.items():
            if readers == {label}:
                self.constants.pop(name, None)

    def new_scale(self, label: str) -> dict[str, np.ndarray]:
        """Return the scale and shift that a batch norm without them has now."""
        found = {}
        for node in self._nodes.get(label, ()):
            if node.op != "BatchNormalization" or node.name not in self.by_name:
                continue
            for key, name in zip(("gamma", "beta"), node.inputs[1:3], strict=True):
                given = self.network.builder.constants.get(name)
                after = self.constants.get(name)
                if given is not None and after is not None and not np.array_equal(given, after):
                    found[key] = after
        return found

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


def _fill(changed: _Changed, before: Any, after: Any, label: str) -> None:
    """Give a layer its weights: the engine's, or those of the layer that it is a copy of."""
    values, bias, scale = changed.values(label), changed.new_bias(label), changed.new_scale(label)
    if scale:
        known = {variable.name: variable for variable in before.weights}
        pairs = [(known.get(variable.name), variable) for variable in after.weights]
    else:
        # A bias comes last in every layer that can be given one.
        pairs = list(zip(before.weights, after.weights, strict=False))
    for old, new in pairs:
        if old is None:
            new.assign(scale[new.name])
        else:
            new.assign(values[id(old)]() if id(old) in values else old)
    if bias is not None:
        after.bias.assign(bias)


def _applied(model: keras.Model, changed: _Changed, dropped: set[str]) -> keras.Model:
    names = Names()
    made: dict[tuple[int, str], Any] = {}
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
        key = (id(operation), label if dropped and changed.values(label) else "")
        if uses[id(operation)] == 1 or bounds is not None:
            key = (id(operation), label)
        if key in made:
            result = made[key](*args, **kwargs)
        elif bounds is not None and isinstance(operation, keras.layers.ReLU):
            made[key] = layer = BoundedReLU(len(bounds), name=names.take(operation, label))
            layer.set_bounds(bounds)
            return layer(*args, **kwargs)
        else:
            changes: dict[str, Any] = {} if bias is None else {"use_bias": True}
            changes |= {
                {"gamma": "scale", "beta": "center"}[key]: True for key in changed.new_scale(label)
            }
            if bounds is not None:
                changes["activation"] = "linear"
            made[key] = layer = clone(operation, names.take(operation, label), **changes)
            result = layer(*args, **kwargs)
            # At once, so that no weight is held twice for longer than its layer takes.
            _fill(changed, operation, layer, label)
            if uses[id(operation)] == 1:
                changed.forget(label)
        if bounds is None:
            return result
        if not hasattr(operation, "activation"):
            raise UnsupportedOperatorError(f"layer '{label}': bounds by channel")
        if type(operation).__name__ == "Activation":
            made[key].activation = keras.activations.linear
        extra = BoundedReLU(len(bounds), name=f"{made[key].name}_bounded")
        extra.set_bounds(bounds)
        return extra(result)

    return rebuild(model, call)


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
    network = Network(model)
    bound = network.bound()
    folds = bound.fold_batch_norms()
    bound.equalize(absorb_high_biases=absorb_high_biases, max_iterations=max_iterations)
    return _applied(model, _Changed(network, bound), {fold.batch_norm for fold in folds})
