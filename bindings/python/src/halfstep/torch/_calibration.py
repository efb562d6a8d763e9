# SPDX-License-Identifier: Apache-2.0
# What a data loader and a forward function feed to a module, as arrays for the engine.
"""Turns calibration data of a training script into inputs of the engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import EmptyStatisticsError, InvalidArgumentError
from ._network import Network, as_array

#: Runs a module on what a data loader gave.
Forward = Callable[[nn.Module, Any], Any]


class _Reached(BaseException):
    """Ends a forward function when the module is called; no handler of a script catches it."""


def gather(
    network: Network,
    model: nn.Module,
    batches: Iterable[Any],
    limit: int | None,
    forward: Forward | None,
) -> dict[str, np.ndarray]:
    """Return the inputs that a module gets from batches, by name.

    Parameters
    ----------
    network : Network
        The module's graph.
    model : torch.nn.Module
        Handed to the forward function; it does not run.
    batches : iterable
        Such as a `DataLoader`.
    limit : int, optional
        Batches to take at most.
    forward : callable, optional
        Called with the module and a batch. By default, of a tuple or list the first item goes in if
        the network has one input, otherwise all; a dict goes in by name.

    Raises
    ------
    EmptyStatisticsError
        Without batches.
    InvalidArgumentError
        If the module gets other inputs than its graph has, or none.
    """
    names = network.exported.inputs
    parts: list[list[np.ndarray]] = []
    for number, batch in enumerate(batches):
        if limit is not None and number >= limit:
            break
        values = _flat(network, model, *_caught(model, batch, forward, len(names) == 1))
        if len(values) != len(names):
            raise InvalidArgumentError(
                f"batch {number}: expected {len(names)} inputs ({', '.join(names)}),"
                f" got {len(values)}"
            )
        # A data loader may fill the same memory again.
        parts.append([np.array(as_array(value)) for value in values])
    if not parts:
        raise EmptyStatisticsError("data_loader: no batches")
    try:
        return {n: np.concatenate(c) for n, c in zip(names, zip(*parts, strict=True), strict=True)}
    except ValueError as error:
        raise InvalidArgumentError(f"data_loader: batches do not fit together: {error}") from None


def _caught(
    model: nn.Module, batch: Any, forward: Forward | None, single: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that a module is called with for a batch."""
    if forward is None:
        if isinstance(batch, Mapping):
            return (), dict(batch)
        if isinstance(batch, (tuple, list)):
            return tuple(batch[:1] if single else batch), {}
        return (batch,), {}
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Reached

    handle = model.register_forward_pre_hook(catch, with_kwargs=True, prepend=True)
    try:
        with torch.no_grad():
            forward(model, batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    if not found:
        raise InvalidArgumentError("forward_fn: it did not call the model")
    return found[0]


def _flat(
    network: Network, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[torch.Tensor]:
    """Return the tensors among arguments in the order of the graph's inputs."""
    example = network.example
    if example is not None and set(kwargs) != set(example[1]):
        # Some are given by name here and by position there.
        try:
            bound = inspect.signature(model.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise InvalidArgumentError(
                f"data_loader: the model does not take it: {error}"
            ) from None
        leading = list(bound.arguments.values())[: len(example[0])]
        rest = {k: v for k, v in bound.arguments.items() if k in example[1]}
        args, kwargs = tuple(leading), rest
    if example is not None and list(kwargs) != list(example[1]):
        kwargs = {name: kwargs[name] for name in example[1]}
    leaves = pytree.tree_leaves((args, kwargs))
    arrays = (torch.as_tensor(x) if isinstance(x, np.ndarray) else x for x in leaves)
    return [value for value in arrays if isinstance(value, torch.Tensor)]
