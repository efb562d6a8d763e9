# SPDX-License-Identifier: Apache-2.0
# Which tensors of a traced graph nobody else can see, so that they may be overwritten.
"""Finds operators that may write over their input while no gradients are recorded.

A tensor is overwritten only if an operator of the list below has just made it, in memory of its
own, and the graph hands it to one reader: then no name, view, hook or saved tensor can refer to it.
Where gradients are recorded, or while something watches torch's calls, nothing is overwritten.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import fx
from torch.nn.modules import module as modules

aten = torch.ops.aten

#: Operators whose result is memory of its own, whatever their arguments are.
_FRESH = frozenset(
    {
        aten.add.Tensor,
        aten.addmm.default,
        aten.avg_pool2d.default,
        aten.bmm.default,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        aten.convolution.default,
        aten.conv_transpose1d.default,
        aten.conv_transpose2d.input,
        aten.conv_transpose3d.input,
        aten.div.Tensor,
        aten.elu.default,
        aten.gelu.default,
        aten.hardsigmoid.default,
        aten.hardswish.default,
        aten.hardtanh.default,
        aten.layer_norm.default,
        aten.leaky_relu.default,
        aten.linear.default,
        aten.max_pool2d.default,
        aten.mean.dim,
        aten.mm.default,
        aten.mul.Tensor,
        aten.relu.default,
        aten.relu6.default,
        aten.sigmoid.default,
        aten.silu.default,
        aten.softmax.int,
        aten.sub.Tensor,
        aten.tanh.default,
    }
)

#: Activation functions, and what computes the same bits in place.
_IN_PLACE = {
    aten.hardsigmoid.default: aten.hardsigmoid_.default,
    aten.hardswish.default: aten.hardswish_.default,
    aten.hardtanh.default: aten.hardtanh_.default,
    aten.leaky_relu.default: aten.leaky_relu_.default,
    aten.relu.default: aten.relu_.default,
    aten.relu6.default: aten.relu6_.default,
    aten.sigmoid.default: aten.sigmoid_.default,
    aten.silu.default: aten.silu_.default,
    aten.tanh.default: aten.tanh_.default,
}


def may_overwrite(x: torch.Tensor) -> bool:
    """Return whether a tensor that only its reader knows may be overwritten at this moment."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(x) is torch.Tensor
        and not x.requires_grad
        and not modules._has_any_global_hook()
        and torch._C._len_torch_function_stack() == 0
        and torch._C._len_torch_dispatch_stack() == 0
    )


class InPlaceWhereSafe:
    """An activation function that overwrites its input where that is safe."""

    def __init__(self, function: Any) -> None:
        self.function, self.in_place = function, _IN_PLACE[function]
        self.__name__ = self.__qualname__ = f"{function._schema.name.split('::')[-1]}_where_safe"
        self.__module__ = __name__

    def __reduce__(self) -> Any:
        return _where_safe, (self.function._schema.name,)

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the function."""
        return (self.in_place if may_overwrite(x) else self.function)(x, *args, **kwargs)


_WHERE_SAFE = {function: InPlaceWhereSafe(function) for function in _IN_PLACE}
_FUNCTION: dict[Any, Any] = {wrapper: function for function, wrapper in _WHERE_SAFE.items()}


def _where_safe(name: str) -> InPlaceWhereSafe:
    return next(w for f, w in _WHERE_SAFE.items() if f._schema.name == name)


def relu_unless_covered(x: torch.Tensor, quantizer: Any) -> torch.Tensor:
    """Compute ReLU of a tensor that only a quantizer reads, unless that makes no difference.

    A grid whose lowest code stands for 0 takes all that is below 0 to 0 itself, with the same bits.
    """
    if not may_overwrite(x):
        return aten.relu.default(x)
    return x if quantizer.takes_negatives_to_zero(x) else aten.relu_.default(x)


def mark(graph: fx.Graph, quantizers: Container[str]) -> None:
    """Let readers of tensors that nobody else sees overwrite them.

    Parameters
    ----------
    graph : torch.fx.Graph
        Changed in place.
    quantizers : container of str
        The ``call_module`` targets that are quantizers; they get ``owned=True``, and ReLUs before
        them are left out where they make no difference.
    """
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or list(source.users) != [node]:
            continue
        fresh = _FUNCTION.get(source.target, source.target)
        if source.op != "call_function" or fresh not in _FRESH:
            continue
        if node.op == "call_function" and node.target in _IN_PLACE:
            node.target = _WHERE_SAFE[node.target]
        elif node.op == "call_module" and node.target in quantizers:
            node.kwargs = {**node.kwargs, "owned": True}
            if source.target is _WHERE_SAFE[aten.relu.default]:
                with graph.inserting_before(source):
                    quantizer = graph.create_node("get_attr", node.target)
                source.target, source.args = relu_unless_covered, (source.args[0], quantizer)
