# SPDX-License-Identifier: Apache-2.0
# Finds the modules of an untraceable network that can be traced each for itself.
"""Module by module: what is left when Python code defeats tracing."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from torch import nn

from ._part import Part
from ._program import InPlaceForward
from ._simulated import strip
from ._trace import Call, as_arguments, evaluating
from .errors import UntraceableModelError

#: Different calls of a module that its graph is made to serve.
_MOST = 4


def find(
    original: nn.Module, dummy_input: Any, options: dict[str, Any], obstacle: UntraceableModelError
) -> tuple[Part, ...]:
    """Simulate the largest modules of a network that can be traced, and warn.

    The network runs once, to see what its modules are called with.

    Parameters
    ----------
    original : torch.nn.Module
        Its modules get quantizers, and run their graphs from now on.
    dummy_input : torch.Tensor, or tuple or dict of them
        Inputs that the network accepts.
    options : dict
        Of the engine's simulations.
    obstacle : UntraceableModelError
        Why the network cannot be traced.

    Raises
    ------
    UntraceableModelError
        If no module can be traced.
    """
    calls = _observe(original, dummy_input)
    parts: list[Part] = []
    left: list[str] = []
    _search(original, "", calls, options, parts, left, set())
    if not parts:
        raise UntraceableModelError(f"{obstacle}; no module of it can be traced, either")
    for part in parts:
        InPlaceForward(part.original, part.program, part.refresh).install()
    message = f"{obstacle}; {len(parts)} of its modules are simulated each for itself"
    if left:
        message += f", these are not: {', '.join(left)}"
    warnings.warn(message, stacklevel=3)
    return tuple(parts)


def _observe(original: nn.Module, dummy_input: Any) -> dict[nn.Module, Call]:
    calls: dict[nn.Module, Call] = {}

    def record(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        call = Call(args, keywords)
        first = calls.setdefault(module, call)
        seen = [_kind(first), *(_kind(Call(*other)) for other in first.others)]
        if _kind(call) not in seen and len(seen) < _MOST:
            calls[module] = first._replace(others=(*first.others, (args, keywords)))

    args, keywords = as_arguments(dummy_input)
    with contextlib.ExitStack() as hooks, evaluating(original), torch.no_grad():
        for module in original.modules():
            if module is not original:
                handle = module.register_forward_pre_hook(record, with_kwargs=True)
                hooks.callback(handle.remove)
        original(*args, **keywords)
    return calls


def _kind(call: Call) -> list[Any]:
    leaves = torch.utils._pytree.tree_leaves((call.args, call.keywords))
    return [
        (leaf.dtype, leaf.shape[1:]) if isinstance(leaf, torch.Tensor) else repr(leaf)
        for leaf in leaves
    ]


def _search(
    module: nn.Module,
    place: str,
    calls: dict[nn.Module, Call],
    options: dict[str, Any],
    parts: list[Part],
    left: list[str],
    seen: set[nn.Module],
) -> None:
    """Add the parts in a module, and the modules with parameters that are left out."""
    if module in seen:
        return
    seen.add(module)
    known = calls.get(module)
    if known is not None:
        try:
            part = Part(module, known, options, place)
        except UntraceableModelError:
            strip(module)
        else:
            seen.update(module.modules())
            if part.quantizers:
                parts.append(part)
            return
    for name, child in module.named_children():
        _search(child, f"{place}.{name}" if place else name, calls, options, parts, left, seen)
    if next(module.parameters(recurse=False), None) is not None:
        left.append(place or type(module).__name__)
