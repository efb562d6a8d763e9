# SPDX-License-Identifier: Apache-2.0
# The graph of a Keras model, one call after the other.
"""Goes through the calls of a functional or sequential Keras model, nested models included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import tree

from ..errors import InvalidArgumentError, InvalidStateError, UnsupportedOperatorError

#: Gets a layer or operation, its label, and the arguments of the call; returns what the call does.
CallFunction = Callable[..., Any]

#: Attribute of models whose layers went over to another one.
TAKEN = "_halfstep_taken"


def taken(name: str) -> InvalidStateError:
    """Return the error for a model that was changed in place."""
    return InvalidStateError(
        f"model '{name}' was changed in place and is used up: use the model that came back"
    )


def functional(model: Any) -> keras.Model:
    """Return the functional form of a model.

    Raises
    ------
    TypeError
        For what is no Keras model.
    InvalidArgumentError
        For a sequential model that is not built.
    UnsupportedOperatorError
        For a subclassed model, whose Python code hides the graph.
    InvalidStateError
        For a model that was changed in place.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model: expected a keras.Model, got {type(model).__name__}")
    if hasattr(model, TAKEN):
        raise taken(model.name)
    if isinstance(model, keras.Sequential):
        # A sequential model holds its graph in a functional one, once its input is known.
        graph = getattr(model, "_functional", None)
        if graph is None:
            raise InvalidArgumentError(
                f"model '{model.name}' is not built: give it a keras.Input, or call it once"
            )
        return graph
    if not hasattr(model, "_run_through_graph"):
        raise UnsupportedOperatorError(
            f"model '{model.name}' ({type(model).__name__}) is a subclassed model, whose graph is"
            " hidden in its call(): build it with keras.Model(inputs, outputs), or wrap the"
            " layers that it calls in a functional model"
        )
    return model


def is_model(operation: Any) -> bool:
    """Return whether a called layer is itself a model."""
    return isinstance(operation, keras.Model)


class Walk:
    """Goes through a model's calls in running order and gives each of them a unique label.

    Labels are layer names, those of nested models with the model's label before them, and with
    ``:1``, ``:2`` ... from the second call of the same layer on.
    """

    def __init__(self, call: CallFunction) -> None:
        self._call = call
        self._counts: dict[str, int] = {}

    def run(self, model: Any, inputs: Any, prefix: str = "") -> Any:
        """Return what the outputs of a model are when `inputs` go in, in the model's structure."""
        graph = functional(model)
        known: dict[int, Any] = {}
        for symbol, value in zip(graph.inputs, tree.flatten(inputs), strict=True):
            known[id(symbol)] = value
        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                if node.is_input or any(id(x) not in known for x in node.input_tensors):
                    continue
                args, kwargs = node.arguments.fill_in(known)
                results = self._one(node.operation, prefix, args, kwargs)
                for symbol, value in zip(node.outputs, tree.flatten(results), strict=True):
                    known[id(symbol)] = value
        outputs = [known[id(x)] for x in graph.outputs]
        return tree.pack_sequence_as(graph._outputs_struct, outputs)

    def _one(self, operation: Any, prefix: str, args: Any, kwargs: Any) -> Any:
        base = f"{prefix}{operation.name}"
        count = self._counts.get(base, 0)
        self._counts[base] = count + 1
        label = f"{base}:{count}" if count else base
        if is_model(operation):
            return self.run(operation, args[0], f"{label}/")
        return self._call(operation, label, *args, **kwargs)
