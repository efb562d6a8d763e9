# SPDX-License-Identifier: Apache-2.0
# What a simulation does while its network runs: watching tensors, following weights.
"""Observers of a calibration, statistics of several processes, and grids that follow weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import simulation as engine
from ..errors import InvalidStateError
from ._encodings import from_raw, set_encoding
from ._network import as_array
from .quantizer import Quantizer

if TYPE_CHECKING:
    from .simulation import QuantizationSimModel


class Observer:
    """Hands the values of one tensor to the engine's statistics."""

    def __init__(self, sim: engine.QuantizationSimModel, tensor: str) -> None:
        self.sim, self.tensor = sim, tensor

    def __call__(self, value: torch.Tensor) -> None:
        if value.numel():
            self.sim._handle.observe_value(self.tensor, as_array(value))


def ignore(value: torch.Tensor) -> None:
    """Watch nothing."""


class Refresh:
    """Keeps the grids of parameters that training does not learn on the present weights.

    Called before each run. A copy of the network shares the engine's rules, and looks at its own
    weights.
    """

    def __init__(self, sim: QuantizationSimModel) -> None:
        self.sim = sim
        self.model = sim.model
        self.rules: engine.QuantizationSimModel | None = None
        self.seen: dict[str, tuple[int, int]] = {}
        self.pairs: list[tuple[str, Quantizer, nn.Module, str]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Refresh:
        clone = object.__new__(Refresh)
        clone.sim, clone.rules = self.sim, self.rules
        clone.model = copy.deepcopy(self.model, memo)
        clone.seen, clone.pairs = dict(self.seen), None
        return clone

    def _find(self) -> list[tuple[str, Quantizer, nn.Module, str]]:
        pairs = []
        for name, role in self.sim._roles.items():
            owner, _, key = name.rpartition(".")
            if not role or name not in self.sim._quantizers:
                continue
            module = self.model.get_submodule(owner)
            pairs.append((name, module.param_quantizers[key], module, key))
        return pairs

    @torch.compiler.disable
    def __call__(self) -> None:
        if self.pairs is None:
            self.pairs = self._find()
        for name, quantizer, module, key in self.pairs:
            if quantizer.learnable or quantizer.frozen or not quantizer.enabled:
                continue
            weight = getattr(module, key)
            version = (weight._version, weight.data_ptr())
            if self.seen.get(name) == version:
                continue
            if self.rules is None:
                self.rules = self.sim._engine(keeps_ranges=False)
            raw = self.rules._handle.parameter_encoding(name, as_array(weight))
            set_encoding(quantizer, from_raw(raw))
            self.seen[name] = version


class Range:
    """The range of a quantizer, to be put back."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.state = quantizer.get_extra_state()
        self.minimum = quantizer.minimum.detach().clone()
        self.maximum = quantizer.maximum.detach().clone()

    def restore(self, quantizer: Quantizer) -> None:
        with torch.no_grad():
            quantizer.minimum.copy_(self.minimum)
            quantizer.maximum.copy_(self.maximum)
        quantizer.set_extra_state(self.state)


def share(mine: bytes | str, group: Any) -> list[bytes | str]:
    """Return what the other processes of a group observed, or what they failed with.

    A process that has failed takes part as well, so that none waits for ever.
    """
    import torch.distributed as distributed

    chosen = None if group is True else group
    everyone: list[Any] = [None] * distributed.get_world_size(chosen)
    distributed.all_gather_object(everyone, mine, group=chosen)
    del everyone[distributed.get_rank(chosen)]
    return everyone


def merge(sim: engine.QuantizationSimModel, others: list[bytes | str]) -> None:
    """Add what other processes observed."""
    for other in others:
        if isinstance(other, str):
            raise InvalidStateError(f"calibration failed in another process: {other}")
        sim.merge_statistics(other)
