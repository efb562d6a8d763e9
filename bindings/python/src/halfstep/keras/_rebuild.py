# SPDX-License-Identifier: Apache-2.0
# New Keras models with the layers and names of another one.
"""Copies Keras models, with some layers left out or changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import tree

from ._walk import Walk, functional


def clone(operation: Any, name: str | None = None, **changes: Any) -> Any:
    """Return a layer or operation of the same configuration, not built yet."""
    config = {**operation.get_config(), **changes}
    if name is not None:
        config["name"] = name
    return type(operation).from_config(config)


def copy_weights(source: Any, target: Any) -> None:
    """Give a built layer the weights of the one that it is a copy of; a bias may be new."""
    # A bias comes last in every layer that can be given one.
    for before, after in zip(source.weights, target.weights, strict=False):
        after.assign(before)


def rebuild(model: keras.Model, call: Callable[..., Any]) -> keras.Model:
    """Return a model that does what `call` does with each call of a layer.

    Nested models come out flat.

    Parameters
    ----------
    call : callable
        Gets layer, label and arguments as symbolic tensors, and returns symbolic tensors.
    """
    graph = functional(model)
    inputs = [
        keras.Input(batch_shape=x.shape, dtype=x.dtype, name=x._keras_history.operation.name)
        for x in graph.inputs
    ]
    outputs = Walk(call).run(model, inputs)
    structure = tree.pack_sequence_as(graph._inputs_struct, inputs)
    return keras.Model(structure, outputs, name=model.name)


class Names:
    """Names for layers of a flat model: their own, or the label's where that is taken."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def take(self, layer: Any, label: str) -> str:
        """Return a name that no other layer has."""
        name = layer.name
        if name in self._taken:
            name = label.replace("/", "_").replace(":", "_")
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name
