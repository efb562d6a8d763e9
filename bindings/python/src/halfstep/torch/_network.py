# SPDX-License-Identifier: Apache-2.0
# A module as the engine sees it: its graph as ONNX, its weights bound by name.
"""Hands a module's graph and weights to the engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from ..model import Model
from . import _onnx, _trace


class Node(NamedTuple):
    """An operator of a graph."""

    op_type: str
    inputs: list[str]
    outputs: list[str]


def nodes(data: bytes) -> dict[str, Node]:
    """Operators of an ONNX model by name."""
    import onnx

    graph = onnx.load_from_string(data).graph
    return {n.name: Node(n.op_type, list(n.input), list(n.output)) for n in graph.node}


class Network:
    """The graph of a module; weights are read from a module whenever the engine needs them."""

    def __init__(self, model: torch.nn.Module, dummy_input: Any) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        half = any(t.is_floating_point() and t.dtype != torch.float32 for t in tensors)
        if half or any(t.device.type != "cpu" for t in tensors):
            # The graph is made on the CPU and in float32, whatever the module is trained in.
            import copy

            model = copy.deepcopy(model).to("cpu", torch.float32)
            dummy_input = torch.utils._pytree.tree_map(on_cpu, dummy_input)
        self.exported = _onnx.export(_trace.trace(model, dummy_input))
        #: Inputs that the graph was made with: positional and by keyword.
        self.example = self.exported.program.example_inputs

    def release(self) -> None:
        """Let go of the traced program, which is no longer needed once a simulation is built."""
        self.exported = self.exported._replace(program=None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        return self

    def bound(self, model: torch.nn.Module) -> Model:
        """Return the engine's model with the weights that a module has now.

        Float32 tensors on the CPU are read where they are, not copied: the engine's model is to be
        used before the module trains on.
        """
        return bound(self.exported.data, self.exported.state, model)


def bound(data: bytes, names: Iterable[str], model: torch.nn.Module) -> Model:
    """Return the engine's model of ONNX bytes, some inputs of it bound to a module's tensors."""
    result = Model.load(data)
    state = dict(model.named_parameters(remove_duplicate=False))
    state.update(model.named_buffers(remove_duplicate=False))
    for name in names:
        result._handle.set_initializer_borrowed(name, as_array(state[name]))
    return result


def on_cpu(value: Any) -> Any:
    """Return a tensor on the CPU, in float32 if it is a floating-point tensor."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    return value.float() if value.is_floating_point() else value


def as_array(value: torch.Tensor) -> Any:
    """Return a dense NumPy array, over the tensor's own memory where that is float32 on the CPU."""
    return on_cpu(value).contiguous().numpy()
