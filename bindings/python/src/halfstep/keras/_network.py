# SPDX-License-Identifier: Apache-2.0
# A Keras model as the engine sees it: its graph as ONNX, its variables bound by name.
"""Hands a Keras model's graph and weights to the engine, and changed weights back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import tree

from ..errors import HalfstepError, UnsupportedOperatorError
from ..model import Model
from . import _layers, _operations
from ._builder import Builder, Parameter, Value
from ._walk import Walk, functional

if TYPE_CHECKING:
    from ._lending import Lending


_MASKS = "masks are not simulated: cut or pad the data so that the model needs none"
#: What to do about layers that have no writer.
_ADVICE = {
    "Masking": _MASKS,
    "TimeDistributed": "call the layer itself: Dense and its like work on the last axis",
    "RNN": "SimpleRNN, LSTM and GRU are the recurrent layers that it has",
    "Lambda": "call functions of keras.ops between the layers",
}
_OTHERWISE = "build it of built-in layers and of keras.ops functions between them"


class Network:
    """The graph of a Keras model; variables are read whenever the engine needs them.

    Attributes
    ----------
    builder : Builder
        Nodes, parameters and names.
    values : dict of str to Value
        What each call of a layer gives, by label; what else it gives, by ``label#1`` and so on.
    layers : dict of str to layer
        The layer or operation of each label.
    outputs : tuple of str
        Names of the model's outputs in the graph.
    """

    def __init__(self, model: keras.Model) -> None:
        graph = functional(model)
        self.builder = b = Builder()
        self.layers: dict[str, Any] = {}
        self.values: dict[str, Value] = {}
        self._problems: list[str] = []
        inputs = []
        for symbol in graph.inputs:
            name = b.fresh(symbol._keras_history.operation.name)
            dtype = keras.backend.standardize_dtype(symbol.dtype)
            b.inputs.append((name, tuple(symbol.shape), dtype))
            inputs.append(Value(symbol.shape, last=name))
            self.values[name] = inputs[-1]
        results = Walk(self._call).run(model, inputs)
        if self._problems:
            raise UnsupportedOperatorError(
                f"model '{model.name}' has layers that cannot be described to the engine: "
                + "; ".join(self._problems)
            )
        b.label = "output"
        for value in tree.flatten(results):
            name = b.last(value)
            if any(name == known for known, *_ in (*b.outputs, *b.inputs)):
                name = b.node("Identity", [name])
            b.outputs.append((name, value.shape))
        self.inputs = tuple(name for name, *_ in b.inputs)
        self.outputs = tuple(name for name, _ in b.outputs)
        self._bytes = b.to_bytes()

    def _call(self, operation: Any, label: str, *args: Any, **kwargs: Any) -> Any:
        b = self.builder
        b.label = label
        kind = type(operation).__name__
        is_layer = isinstance(operation, keras.layers.Layer)
        writer = (_layers if is_layer else _operations).WRITERS.get(kind)
        self.layers[label] = operation
        # Training is what a layer does there; the graph is that of inference.
        kwargs.pop("training", None)
        symbols = [
            keras.KerasTensor(x.shape) if isinstance(x, Value) else x
            for x in tree.flatten((args, kwargs))
        ]
        try:
            if writer is None:
                advice = _ADVICE.get(kind, _OTHERWISE)
                raise UnsupportedOperatorError(f"no such layer in Halfstep ({advice})")
            if is_layer and operation.compute_dtype != "float32":
                raise UnsupportedOperatorError(
                    f"computes in {operation.compute_dtype}: expected float32"
                )
            result = writer(b, operation, *args, **kwargs)
        except UnsupportedOperatorError as error:
            self._problems.append(f"layer '{label}' ({kind}): {error}")
            # Whatever follows is still looked at, so that the error names all layers.
            args, kwargs = tree.pack_sequence_as((args, kwargs), symbols)
            try:
                spec = operation.compute_output_spec(*args, **kwargs)
                made = tree.map_structure(lambda x: Value(x.shape, last=b.fresh(label)), spec)
            except Exception:
                raise UnsupportedOperatorError("; ".join(self._problems)) from error
            return made
        for index, value in enumerate(tree.flatten(result)):
            self.values[label if index == 0 else f"{label}#{index}"] = value
        return result

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Constants of the graph that are variables of the model."""
        return self.builder.parameters

    def bound(
        self, parameters: dict[str, Any] | None = None, lending: Lending | None = None
    ) -> Model:
        """Return the engine's model with the variables' present values.

        The engine reads a variable where it is if that has ONNX's order of axes; a kernel that has
        not is packed once, from where it is.

        Parameters
        ----------
        parameters : dict of str to array, optional
            Values to use in place of variables, by the constant's name.
        lending : Lending, optional
            Takes variables' memory, for the engine to change it.
        """
        model = Model.load(self._bytes)
        for name, parameter in self.parameters.items():
            lent = None if lending is None else lending.take(parameter)
            try:
                if lent is not None:
                    model._handle.set_initializer_lent(name, lent)
                    continue
                value = parameter.constant() if parameters is None else np.asarray(parameters[name])
                if value.flags.c_contiguous:
                    model._handle.set_initializer_borrowed(name, value)
                else:
                    model.set_initializer(name, value)
            except HalfstepError as error:
                raise type(error)(f"weight '{parameter.variable.path}': {error}") from None
        return model
