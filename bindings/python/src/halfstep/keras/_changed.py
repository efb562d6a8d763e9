# SPDX-License-Identifier: Apache-2.0
# What an algorithm of the engine made of a Keras model's weights.
"""Reads the engine's changed graph in terms of the layers that it was described from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from ..errors import UnsupportedOperatorError
from ..model import Model
from ._builder import Parameter
from ._network import Network

#: Operators whose second input is a weight and whose third one is a bias.
_LINEAR = ("Conv", "ConvTranspose", "Gemm")


class Changed:
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
