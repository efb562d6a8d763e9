# SPDX-License-Identifier: Apache-2.0
# In which memory format a simulation's convolutions run where no gradients are recorded.
"""Lets passes without gradients run channels-last on a CPU, where torch's convolutions are faster.

The decision is made once a pass, from the inputs and the weights, so that the same call gives the
same bits. A caller notices nothing but speed: results come back in the format that the float module
would give, and operators of the graph that read memory as it lies get what they can read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from ._program import ITSELF

aten = torch.ops.aten

#: Operators that refuse memory in another order, and what copies there instead.
_AS_COPY = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
}
#: Operators whose results depend on how memory lies; operators from elsewhere may be such, too.
_BY_STRIDE = frozenset(
    {
        aten.as_strided.default,
        aten.as_strided_copy.default,
        aten.view.dtype,
        aten.view_as_complex.default,
    }
)


def channels_last(
    module: nn.Module, inputs: Sequence[Any], weights: Sequence[torch.Tensor]
) -> bool:
    """Return whether the convolutions of a pass that begins are to run channels-last.

    Parameters
    ----------
    module : torch.nn.Module
        The simulated network, whose `channels_last` switches it off.
    inputs : sequence
        Of the network.
    weights : sequence of torch.Tensor
        Of its convolutions. Where they or an input are channels-last already, the caller has
        chosen, and results come in that format.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return (
        getattr(module, "channels_last", False)
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and all(_is_row_major(x) for x in inputs if isinstance(x, torch.Tensor))
        and all(_is_row_major(weight) for weight in weights)
    )


def _is_row_major(x: torch.Tensor) -> bool:
    if x.device.type != "cpu" or x.is_floating_point() and x.dtype != torch.float32:
        return False
    return x.dim() != 4 or x.is_contiguous()


def conv2d(chosen: bool, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Convolve; the result has the format of the input."""
    if chosen and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return aten.conv2d.default(x, *args, **kwargs)


def restored(chosen: bool, x: Any, order: Sequence[int]) -> Any:
    """Return a result with its axes in an order in memory, outermost first; others as they are."""
    if not chosen or not isinstance(x, torch.Tensor) or x.dim() != len(order):
        return x
    strides = [x.stride(axis) for axis in order if x.shape[axis] > 1]
    if x.numel() == 0 or strides == sorted(strides, reverse=True):
        return x
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return x.permute(*order).contiguous().permute(inverse)


def choose_format(graph: fx.Graph) -> None:
    """Let a graph choose the format of its convolutions.

    Parameters
    ----------
    graph : torch.fx.Graph
        Of a whole network; changed in place. One without convolutions, or with operators that
        depend on how memory lies, stays as it is.
    """
    called = [node for node in graph.nodes if node.op == "call_function"]
    convolutions = [node for node in called if node.target is aten.conv2d.default]
    if not convolutions or any(map(_reads_memory, called)):
        return
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    weights = {_source(node.args[1]): None for node in convolutions}
    known = [node for node in weights if node.op == "get_attr"]
    last = [*inputs, *known]
    place = max(last, key=list(graph.nodes).index)
    with graph.inserting_after(place):
        itself = graph.create_node("get_attr", ITSELF)
    with graph.inserting_after(itself):
        chosen = graph.call_function(channels_last, (itself, tuple(inputs), tuple(known)))
    for node in convolutions:
        node.target, node.args = conv2d, (chosen, *node.args)
    for node in called:
        node.target = _AS_COPY.get(node.target, node.target)
    output = next(node for node in reversed(graph.nodes) if node.op == "output")

    def back(node: fx.Node) -> fx.Node:
        order = _order(node)
        if order is None:
            return node
        with graph.inserting_before(output):
            return graph.call_function(restored, (chosen, node, order))

    output.args = fx.map_arg(output.args, back)


def _reads_memory(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target.namespace != "aten" or target in _BY_STRIDE


def _source(node: Any) -> Any:
    """The tensor that a quantizer rounds."""
    return node.args[0] if node.op == "call_module" else node


def _order(node: fx.Node) -> tuple[int, ...] | None:
    """The order of axes in memory that a tensor had when the graph was made, outermost first."""
    while node.op == "call_module":  # quantizers and dropouts keep the order
        node = node.args[0]  # type: ignore[assignment]
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() not in (3, 4, 5):
        return None
    strides = [_number(stride) for stride in value.stride()]
    if None in strides:
        return None
    return tuple(sorted(range(value.dim()), key=lambda axis: (-strides[axis], axis)))


def _number(extent: Any) -> int | None:
    """A stride in the run that made the graph."""
    return extent.node.hint if isinstance(extent, torch.SymInt) else extent
