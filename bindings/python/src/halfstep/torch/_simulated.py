# SPDX-License-Identifier: Apache-2.0
# The trainable module with quantizers: the user's modules around a traced graph.
"""Builds the module that a simulation runs and trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import InvalidStateError
from ..quantizers import Quantizer as Site
from . import _trace
from ._onnx import Exported
from .errors import DeviceMismatchError
from .quantizer import Quantizer

#: Names under which modules hold quantizers: of parameters, of what they compute, of what operators
#: between modules compute, and of the network's inputs.
HOLDERS = ("param_quantizers", "output_quantizers", "functional_quantizers", "input_quantizers")


class SimulatedModule(nn.Module):
    """A network with quantizers: the modules of the original, with its names, around a graph.

    It runs the traced graph; the modules of the original hold parameters, buffers, mode and
    quantizers, and keep their names, so that state dicts of the original fit (``strict=False``).
    Batch norms and dropouts follow the mode. It can be trained, copied and compiled; the original's
    other methods are not there.
    """

    def __init__(self, original: nn.Module, graph: fx.Graph) -> None:
        super().__init__()
        self._original_name = type(original).__name__
        for name, parameter in original.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        kept = original._non_persistent_buffers_set
        for name, buffer in original.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name not in kept)
        for name, child in original.named_children():
            self.add_module(name, child)
        self.training = original.training
        self._before_forward: Callable[[], None] | None = None
        self._take(graph)

    def _take(self, graph: fx.Graph) -> None:
        info = getattr(graph._codegen, "pytree_info", None)
        if info is not None:
            self._in_spec, self._out_spec = info.in_spec, info.out_spec
        code = graph.python_code("self")
        names = dict(code.globals)
        exec(compile(code.src, f"<simulation of {self._original_name}>", "exec"), names)
        #: The code of the graph, as Python source.
        self.code = code.src
        self._run = names["forward"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network with quantizers."""
        if self._before_forward is not None:
            self._before_forward()
        return self._run(self, *args, **kwargs)

    def _get_name(self) -> str:
        return f"Simulated{self._original_name}"

    def __getstate__(self) -> dict[str, Any]:
        raise InvalidStateError(
            f"{self._get_name()} cannot be pickled: save its state_dict(), or use sim.export"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> SimulatedModule:
        import copy

        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        for name, value in self.__dict__.items():
            clone.__dict__[name] = copy.deepcopy(value, memo)
        return clone


def device_of(module: nn.Module) -> torch.device | None:
    """Return the device of all parameters and buffers, None if there are none.

    Raises
    ------
    DeviceMismatchError
        Naming the first that lies elsewhere.
    """
    first: tuple[str, torch.device] | None = None
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if first is None:
            first = (name, tensor.device)
        elif tensor.device != first[1]:
            raise DeviceMismatchError(
                f"'{name}' is on {tensor.device}, but '{first[0]}' on {first[1]}:"
                " move the simulation as a whole, sim.model.to(device)"
            )
    return first[1] if first else None


class Holder(nn.ModuleDict):
    """Submodules by name; those that are numbered can be asked for by number, as in AIMET."""

    def __getitem__(self, key: str | int) -> nn.Module:
        return super().__getitem__(str(key))


class TracedConstants(nn.Module):
    """Tensors that the original's code made, as buffers, so that they move with the network."""


class FunctionalDropout(nn.Module):
    """What `torch.nn.functional.dropout` and its kin did in the original."""

    def __init__(self, p: float, kind: str) -> None:
        super().__init__()
        self.p, self.kind = p, kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop values, rows or channels while training."""
        return getattr(torch, self.kind)(x, self.p, self.training)

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"p={self.p}, kind={self.kind!r}"


class FunctionalBatchNorm(nn.Module):
    """What `torch.nn.functional.batch_norm` did in the original."""

    def __init__(self, momentum: float, eps: float) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps

    def forward(self, x, weight, bias, mean, variance):  # type: ignore[no-untyped-def]
        """Normalize, by the batch while training."""
        return nn.functional.batch_norm(
            x, mean, variance, weight, bias, self.training, self.momentum, self.eps
        )


def batch_norm(
    module: _BatchNorm, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """Do what a batch norm does, with parameters from outside, such as quantized ones."""
    factor = 0.0 if module.momentum is None else module.momentum
    training = module.training or module.running_mean is None
    if module.training and module.track_running_stats and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:
            factor = 1.0 / float(module.num_batches_tracked)
    return nn.functional.batch_norm(
        x, module.running_mean, module.running_var, weight, bias, training, factor, module.eps
    )


def build(
    original: nn.Module,
    exported: Exported,
    sites: Iterable[Site],
    make: Callable[[Site], Quantizer],
) -> tuple[SimulatedModule, dict[str, Quantizer], tuple[str, ...]]:
    """Put quantizers into a traced network.

    Parameters
    ----------
    original : torch.nn.Module
        Its modules become the result's; they get quantizers as submodules.
    exported : Exported
        The traced network.
    sites : iterable of halfstep.Quantizer
        Where the engine quantizes.
    make : callable
        Gives the module for a site.

    Returns
    -------
    SimulatedModule, dict of str to Quantizer, tuple of str
        The module, its quantizers by tensor, and the tensors that have no place in the graph.
    """
    unlifted = exported.program.module(check_guards=False)
    graph = unlifted.graph
    graph.owning_module = original
    _adopt_constants(original, unlifted, graph)
    nodes = _nodes_by_tensor(graph, exported)
    wanted = {site.tensor: site for site in sites}
    _restore_layers(original, graph, {name for name in exported.state if name in wanted})

    quantizers: dict[str, Quantizer] = {}
    missing: list[str] = []
    for tensor, site in wanted.items():
        places = nodes.get(tensor, [])
        if not places:
            missing.append(tensor)
            continue
        quantizer = make(site)
        target = _attach(original, places[0], tensor, quantizer)
        for node in places:
            with graph.inserting_after(node):
                after = graph.create_node("call_module", target, (node,))
            node.replace_all_uses_with(after, delete_user_cb=lambda user, a=after: user is not a)
        quantizers[tensor] = quantizer
    graph.eliminate_dead_code()
    return SimulatedModule(original, graph), quantizers, tuple(missing)


def _nodes_by_tensor(graph: fx.Graph, exported: Exported) -> dict[str, list[fx.Node]]:
    nodes: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            nodes.setdefault(str(node.target), []).append(node)
            nodes.setdefault(node.name, []).append(node)
        elif node.op in ("call_function", "call_module"):
            nodes[node.name] = [node]
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for name, node in zip(exported.inputs, placeholders, strict=False):
        nodes[name] = [node]
    return nodes


def _adopt_constants(original: nn.Module, unlifted: nn.Module, graph: fx.Graph) -> None:
    """Make tensors that the tracer lifted, and constant results, buffers of the network."""
    for node in list(graph.nodes):
        if node.op == "call_module" and str(node.target).startswith("_guards"):
            graph.erase_node(node)
        elif node.op == "call_function" and node.target is _trace.aten.full.default:
            shape, value = node.args[:2]
            if any(isinstance(item, fx.Node) for item in (*shape, value)):
                continue
            like = node.meta["val"]
            constant = torch.full(shape, value, dtype=like.dtype)
            target = _register_constant(original, node.name, constant)
            node.op, node.target, node.args, node.kwargs = "get_attr", target, (), {}
        elif node.op == "get_attr" and not _has(original, str(node.target)):
            value = unlifted
            for part in str(node.target).split("."):
                value = getattr(value, part)
            name = str(node.target).replace(".", "_")
            node.target = _register_constant(original, name, value.detach().clone())


def _register_constant(original: nn.Module, name: str, value: torch.Tensor) -> str:
    reference = next((t for t in original.parameters()), None)
    if reference is not None:
        value = value.to(reference.device)
        if value.is_floating_point() and reference.is_floating_point():
            value = value.to(reference.dtype)
    if not hasattr(original, "traced_constants"):
        original.add_module("traced_constants", TracedConstants())
    original.traced_constants.register_buffer(name, value, persistent=False)
    return f"traced_constants.{name}"


def _has(module: nn.Module, target: str) -> bool:
    *path, last = target.split(".")
    for part in path:
        module = getattr(module, part, None)  # type: ignore[assignment]
    return hasattr(module, last)


def _restore_layers(original: nn.Module, graph: fx.Graph, quantized: set[str]) -> None:
    """Call the original's own batch norms and dropouts again."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is _trace.DROPOUT:
            _restore_dropout(original, graph, node)
        elif node.target is _trace.BATCH_NORM:
            x, weight, bias, mean, variance, momentum, epsilon = node.args
            owner = str(mean.target).rpartition(".")[0]
            module = original.get_submodule(owner) if _has_module(original, owner) else None
            if not isinstance(module, _BatchNorm):
                holder = _hold(original, "", "functional_layers")
                holder[node.name] = FunctionalBatchNorm(momentum, epsilon)
                holder[node.name].train(original.training)
                node.op, node.target = "call_module", f"functional_layers.{node.name}"
                node.args = (x, weight, bias, mean, variance)
            elif any(p is not None and p.target in quantized for p in (weight, bias)):
                with graph.inserting_before(node):
                    held = graph.create_node("get_attr", owner)
                node.target, node.args = batch_norm, (held, x, weight, bias)
            else:
                node.op, node.target, node.args = "call_module", owner, (x,)


def _restore_dropout(original: nn.Module, graph: fx.Graph, node: fx.Node) -> None:
    x, p, kind = node.args
    owner = kind.removeprefix("module:") if kind.startswith("module:") else _owner(original, node)
    module = original.get_submodule(owner) if owner else None
    is_layer = isinstance(module, nn.modules.dropout._DropoutNd) or kind.startswith("module:")
    if not is_layer:
        holder = _hold(original, "", "functional_layers")
        holder[node.name] = FunctionalDropout(p, kind)
        holder[node.name].train(original.training)
        owner = f"functional_layers.{node.name}"
    node.op, node.target, node.args = "call_module", owner, (x,)


def _has_module(original: nn.Module, name: str) -> bool:
    try:
        original.get_submodule(name)
    except AttributeError:
        return False
    return bool(name)


def _owner(original: nn.Module, node: fx.Node) -> str:
    """Name of the innermost module that a node belongs to."""
    stack = node.meta.get("nn_module_stack") or {}
    for name, _ in reversed(list(stack.values())):
        name = str(name).split("@")[0]
        if _has_module(original, name):
            return name
    return ""


def _hold(original: nn.Module, owner: str, kind: str) -> Holder:
    module = original.get_submodule(owner)
    if not hasattr(module, kind):
        module.add_module(kind, Holder())
    return getattr(module, kind)


def _attach(original: nn.Module, node: fx.Node, tensor: str, quantizer: Quantizer) -> str:
    """Put a quantizer beside what it quantizes, and return its name."""
    if node.op == "get_attr":
        owner, _, key = str(node.target).rpartition(".")
        kind = "param_quantizers"
    elif node.op == "placeholder":
        owner, kind, key = "", "input_quantizers", node.name
    else:
        owner = str(node.target) if node.op == "call_module" else _owner(original, node)
        if node.target is batch_norm:
            owner = str(node.args[0].target)  # type: ignore[union-attr]
        if owner.startswith("functional_layers"):
            owner = ""
        leaf = not any(
            name not in HOLDERS for name, _ in original.get_submodule(owner).named_children()
        )
        kind = "output_quantizers" if owner and leaf else "functional_quantizers"
        key = node.name
    holder = _hold(original, owner, kind)
    if kind == "output_quantizers":
        key = str(len(holder))
    holder[key] = quantizer
    quantizer.train(original.training)
    return ".".join(part for part in (owner, kind, key) if part)


def strip(module: nn.Module) -> None:
    """Take everything away that `build` put into the original."""
    for part in list(module.modules()):
        for name in (*HOLDERS, "functional_layers", "traced_constants"):
            if isinstance(part._modules.get(name), (Holder, TracedConstants)):
                del part._modules[name]


def quantizers_of(module: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Quantizers with their names as submodules."""
    for name, part in module.named_modules():
        if isinstance(part, Quantizer):
            yield name, part
