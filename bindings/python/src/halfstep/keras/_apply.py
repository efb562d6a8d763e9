# SPDX-License-Identifier: Apache-2.0
# Makes Keras models of what algorithms of the engine changed.
"""New models with changed weights, of copies of a model's layers or of these layers themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import keras

from ..errors import UnsupportedOperatorError
from ._changed import Changed
from ._lending import Lending
from ._rebuild import Names, clone, rebuild
from ._walk import TAKEN, is_model, taken
from .layers import BoundedReLU


class _Copies:
    """Layers of the result are copies, so that the model that was given stays as it is."""

    def __init__(self, changed: Changed) -> None:
        self._changed = changed

    def layer(
        self, operation: Any, label: str, name: str, is_alone: bool, **changes: Any
    ) -> tuple[Any, Callable[[], object]]:
        """Return a layer, and what gives it its weights once it was called."""
        layer = clone(operation, name, **changes)

        def fill() -> None:
            _fill(self._changed, operation, layer, label)
            if is_alone:
                self._changed.forget(label)

        return layer, fill

    def finish(self, given: keras.Model) -> None:
        """Do what can only be done once the result exists."""


class _Takes(_Copies):
    """Layers of the result are those of the model that was given, with their variables."""

    def __init__(self, changed: Changed, lending: Lending) -> None:
        super().__init__(changed)
        self._lending = lending
        self._fills: list[Callable[[], object]] = []

    def layer(
        self, operation: Any, label: str, name: str, is_alone: bool, **changes: Any
    ) -> tuple[Any, Callable[[], object]]:
        """Return the layer itself where nothing but a bias is new."""
        if not is_alone or changes.keys() - {"use_bias", "activation"}:
            layer, fill = super().layer(operation, label, name, is_alone, **changes)
            return layer, lambda: self._fills.append(fill)
        nodes, known = list(operation._inbound_nodes), operation.name

        def restore() -> None:
            operation._inbound_nodes[:] = nodes
            operation.name = known

        self._lending.on_failure(restore)
        # What the layer's output is, is a question about the new model from now on.
        operation._inbound_nodes.clear()
        operation.name = name

        def fill() -> None:
            if "activation" in changes:
                before = operation.activation
                self._lending.on_failure(lambda: setattr(operation, "activation", before))
                operation.activation = keras.activations.get(changes["activation"])
            values, bias = self._changed.values(label), self._changed.new_bias(label)
            for variable in operation.weights:
                if id(variable) in values:
                    self._lending.assign(variable, values[id(variable)]())
            if bias is not None:
                self._add_bias(operation, bias)
            self._changed.forget(label)

        # Only the whole graph shows that there will be a result.
        return operation, lambda: self._fills.append(fill)

    def _add_bias(self, layer: Any, value: Any) -> None:
        def remove() -> None:
            layer._tracker.unlock()
            layer._untrack_variable(layer.bias)
            layer.bias, layer.use_bias = None, False
            layer._tracker.lock()

        layer.use_bias = True
        layer._tracker.unlock()
        layer.bias = layer.add_weight(
            name="bias",
            shape=value.shape,
            initializer="zeros",
            regularizer=layer.bias_regularizer,
            constraint=layer.bias_constraint,
        )
        layer._tracker.lock()
        self._lending.on_failure(remove)
        layer.bias.assign(value)

    def finish(self, given: keras.Model) -> None:
        """Write the weights, and let nobody use the model that was given by mistake."""
        # Each of them, with the constants that it holds, can go once it ran.
        self._fills.reverse()
        while self._fills:
            self._fills.pop()()
        for model in (given, *filter(is_model, given._flatten_layers(include_self=False))):
            setattr(model, TAKEN, True)
            model.call = _refuse(model.name)
            for name in ("train_function", "test_function", "predict_function"):
                setattr(model, name, None)


def _refuse(name: str) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise taken(name)

    return call


def _fill(changed: Changed, before: Any, after: Any, label: str) -> None:
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


def applied(
    model: keras.Model, changed: Changed, dropped: set[str], lending: Lending | None = None
) -> keras.Model:
    """Return a model with the changed weights.

    Parameters
    ----------
    model : keras.Model
        The model that the engine was given.
    changed : Changed
        What the engine left of it.
    dropped : set of str
        Labels of layers that are no longer there.
    lending : Lending, optional
        If given, the result takes over the layers of `model`, which is used up.
    """
    layers = _Copies(changed) if lending is None else _Takes(changed, lending)
    names = Names()
    made: dict[tuple[int, str], Any] = {}
    uses = Counter(id(operation) for operation in changed.network.layers.values())

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
                if not hasattr(operation, "activation"):
                    raise UnsupportedOperatorError(f"layer '{label}': bounds by channel")
                changes["activation"] = "linear"
            name = names.take(operation, label)
            is_alone = uses[id(operation)] == 1 or key[1] == ""
            made[key], fill = layers.layer(operation, label, name, is_alone, **changes)
            result = made[key](*args, **kwargs)
            # At once, so that no weight is held twice for longer than its layer takes.
            fill()
        if bounds is None:
            return result
        extra = BoundedReLU(len(bounds), name=f"{made[key].name}_bounded")
        extra.set_bounds(bounds)
        return extra(result)

    result = rebuild(model, call)
    layers.finish(model)
    return result
