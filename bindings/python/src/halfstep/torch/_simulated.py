# SPDX-License-Identifier: Apache-2.0
# Puts quantizers into the user's modules, around a traced graph.
"""Puts quantizers into a module, and makes the program that a simulation runs and trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import InvalidStateError
from ..quantizers import Quantizer as Site
from . import _trace
from ._layers import FunctionalBatchNorm, FunctionalDropout, Holder, TracedConstants, batch_norm
from ._memory_format import choose_format
from ._onnx import Exported
from ._ownership import mark
from ._program import ITSELF, Program, uninstall
from .errors import DeviceMismatchError
from .quantizer import Quantizer

#: Names under which modules hold quantizers: of parameters, of what they compute, of what operators
#: between modules compute, and of the network's inputs.
HOLDERS = ("param_quantizers", "output_quantizers", "functional_quantizers", "input_quantizers")
#: Names of what else is put into the original.
OWN = ("functional_layers", "traced_constants")


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


def build(
    original: nn.Module,
    exported: Exported,
    sites: Iterable[Site],
    make: Callable[[Site], Quantizer],
    in_place: bool = False,
) -> tuple[Program, dict[str, Quantizer], tuple[str, ...]]:
    """Put quantizers into a traced network.

    Parameters
    ----------
    original : torch.nn.Module
        It and its modules get quantizers as submodules.
    exported : Exported
        The traced network.
    sites : iterable of halfstep.Quantizer
        Where the engine quantizes.
    make : callable
        Gives the module for a site.
    in_place : bool
        Whether the program will run on the original itself, as its `forward`.

    Returns
    -------
    Program, dict of str to Quantizer, tuple of str
        What to run on the original, its quantizers by tensor, and the tensors that have no place in
        the graph.
    """
    unlifted = exported.program.module(check_guards=False)
    graph = unlifted.graph
    graph.owning_module = original
    _adopt_constants(original, unlifted, graph)
    nodes = _nodes_by_tensor(graph, exported)
    wanted = {site.tensor: site for site in sites}
    _restore_layers(original, graph, wanted.keys() & set(exported.state), in_place)

    quantizers: dict[str, Quantizer] = {}
    missing: list[str] = []
    targets: set[str] = set()
    for tensor, site in wanted.items():
        places = nodes.get(tensor, [])
        if not places:
            missing.append(tensor)
            continue
        quantizer = make(site)
        target = _attach(original, places[0], quantizer, in_place)
        targets.add(target)
        for node in places:
            with graph.inserting_after(node):
                after = graph.create_node("call_module", target, (node,))
            node.replace_all_uses_with(after, delete_user_cb=lambda user, a=after: user is not a)
        quantizers[tensor] = quantizer
    original.__dict__[ITSELF] = original  # the graph is checked against its module
    try:
        graph.eliminate_dead_code()
    finally:
        del original.__dict__[ITSELF]
    mark(graph, targets)
    if not in_place:
        choose_format(graph)
    return Program(graph, type(original).__name__), quantizers, tuple(missing)


def _nodes_by_tensor(graph: fx.Graph, exported: Exported) -> dict[str, list[fx.Node]]:
    nodes: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            nodes.setdefault(str(node.target), []).append(node)
            nodes.setdefault(node.name, []).append(node)
        elif node.op in ("call_function", "call_module"):
            nodes[node.name] = [node]
    # torch.fx calls the nodes of a graph's inputs placeholders.
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for name, node in zip(exported.inputs, inputs, strict=False):
        nodes[name] = [node]
    return nodes


def _adopt_constants(original: nn.Module, unlifted: nn.Module, graph: fx.Graph) -> None:
    """Make tensors that the tracer lifted, and constant results, buffers of the network."""
    values: dict[fx.Node, torch.Tensor] = {}
    for node in list(graph.nodes):
        if node.op == "call_module" and str(node.target).startswith("_guards"):
            graph.erase_node(node)
        elif node.op == "get_attr" and not _has(original, str(node.target)):
            value = unlifted
            for part in str(node.target).split("."):
                value = getattr(value, part)
            values[node] = value.detach().clone()
        elif _is_constant(node, values):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs | _on_cpu(kwargs))
    needed = {node for node in values if any(user not in values for user in node.users)}
    for node, value in reversed(values.items()):
        if node not in needed:
            node.args, node.kwargs = (), {}  # only what follows from it is needed
            continue
        name = str(node.target).replace(".", "_") if node.op == "get_attr" else node.name
        target = _register_constant(original, name, value)
        node.op, node.target, node.args, node.kwargs = "get_attr", target, (), {}
    for node in values.keys() - needed:
        graph.erase_node(node)


def _is_constant(node: fx.Node, values: dict[fx.Node, torch.Tensor]) -> bool:
    """Whether an operator has one tensor as its result, the same in every run."""
    made = node.meta.get("val")
    return (
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and node.target.namespace == "aten"
        and not node.target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in node.target.tags
        and isinstance(made, torch.Tensor)
        and not any(isinstance(extent, torch.SymInt) for extent in made.shape)
        and all(source in values for source in node.all_input_nodes)
    )


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"device": torch.device("cpu")} if kwargs.get("device") is not None else {}


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


def _restore_layers(
    original: nn.Module, graph: fx.Graph, quantized: set[str], in_place: bool
) -> None:
    """Call the original's own batch norms and dropouts again."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is _trace.DROPOUT:
            _restore_dropout(original, graph, node)
        elif node.target is _trace.BATCH_NORM:
            x, weight, bias, mean, variance, momentum, epsilon = node.args
            owner = str(mean.target).rpartition(".")[0]
            module = _module(original, owner)
            if not isinstance(module, _BatchNorm) or not (owner or in_place):
                holder = _hold(original, "", "functional_layers")
                holder[node.name] = FunctionalBatchNorm(momentum, epsilon)
                holder[node.name].train(original.training)
                node.op, node.target = "call_module", f"functional_layers.{node.name}"
                node.args = (x, weight, bias, mean, variance)
            elif not owner or any(p is not None and p.target in quantized for p in (weight, bias)):
                with graph.inserting_before(node):
                    held = graph.create_node("get_attr", owner or ITSELF)
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


def _module(original: nn.Module, name: str) -> nn.Module | None:
    try:
        return original.get_submodule(name)
    except AttributeError:
        return None


def _owner(original: nn.Module, node: fx.Node) -> str:
    """Name of the innermost module that a node belongs to."""
    stack = node.meta.get("nn_module_stack") or {}
    for name, _ in reversed(list(stack.values())):
        name = str(name).split("@")[0]
        if name and _module(original, name) is not None:
            return name
    return ""


def _hold(original: nn.Module, owner: str, kind: str) -> Holder:
    module = original.get_submodule(owner)
    if not hasattr(module, kind):
        module.add_module(kind, Holder())
    return getattr(module, kind)


def _attach(original: nn.Module, node: fx.Node, quantizer: Quantizer, in_place: bool) -> str:
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
        if owner.startswith("functional_layers") or owner == ITSELF:
            owner = ""
        leaf = not any(
            name not in HOLDERS and name not in OWN
            for name, _ in original.get_submodule(owner).named_children()
        )
        kind = "output_quantizers" if leaf and (owner or in_place) else "functional_quantizers"
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
        uninstall(part)
        for name in (*HOLDERS, *OWN):
            if isinstance(part._modules.get(name), (Holder, TracedConstants)):
                del part._modules[name]


def quantizers_of(module: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Quantizers with their names as submodules."""
    for name, part in module.named_modules():
        if isinstance(part, Quantizer):
            yield name, part


def fold_parameters(module: nn.Module) -> None:
    """Round parameters to the grids of their quantizers, and freeze these.

    Raises
    ------
    InvalidStateError
        Naming a quantizer that has no range; nothing changes then.
    """
    found = []
    for name, quantizer in quantizers_of(module):
        holder, _, key = name.rpartition(".")
        owner, _, kind = holder.rpartition(".")
        if kind != "param_quantizers" or not quantizer.enabled:
            continue
        if not quantizer.has_range:
            raise InvalidStateError(f"quantizer '{quantizer.name}' has no range to fold")
        found.append((getattr(module.get_submodule(owner), key), quantizer))
    with torch.no_grad():
        for parameter, quantizer in found:
            parameter.copy_(quantizer(parameter))
            quantizer.frozen = True
