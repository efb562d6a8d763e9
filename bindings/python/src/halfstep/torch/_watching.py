# SPDX-License-Identifier: Apache-2.0
# What a simulation does while its network runs: watching tensors, following weights.
"""Observers of a calibration, statistics of several processes, and grids that follow weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import simulation as engine
from ..errors import InvalidStateError
from ._encodings import from_raw, set_encoding
from ._kernels import in_memory_order
from ._network import as_array, on_cpu
from .quantizer import Quantizer

if TYPE_CHECKING:
    from ._part import Part


class Observer:
    """Hands the values of one tensor to the engine's statistics."""

    def __init__(self, sim: engine.QuantizationSimModel, tensor: str) -> None:
        self.sim, self.tensor = sim, tensor

    def __call__(self, value: torch.Tensor) -> None:
        if value.numel():
            # Statistics do not ask in which order values come: memory is read as it lies.
            values = in_memory_order(on_cpu(value))
            self.sim._handle.observe_value(self.tensor, values.contiguous().numpy())


def ignore(value: torch.Tensor) -> None:
    """Watch nothing."""


class Refresh:
    """Keeps the grids of parameters that training does not learn on the present weights.

    Called before each run of a part. A copy of the part looks at its own weights.
    """

    def __init__(self, part: Part) -> None:
        self.part = part
        #: Whether grids follow; not while a calibration runs.
        self.active = True
        self.forget()

    def forget(self) -> None:
        """Look at rules and weights anew."""
        self.rules: engine.QuantizationSimModel | None = None
        self.seen: dict[str, tuple[int, int]] = {}
        self.pairs: list[tuple[str, Quantizer, nn.Module, str]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"part": self.part, "active": self.active}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.forget()

    def _find(self) -> list[tuple[str, Quantizer, nn.Module, str]]:
        pairs = []
        for name, quantizer in self.part.quantizers.items():
            if self.part.roles[name]:
                owner, _, key = name.rpartition(".")
                pairs.append((name, quantizer, self.part.original.get_submodule(owner), key))
        return pairs

    @torch.compiler.disable
    def __call__(self) -> None:
        if not self.active:
            return
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
                self.rules = self.part.engine(keeps_ranges=False)
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


def share(mine: Any, group: Any) -> list[Any]:
    """Return what the other processes of a group observed, or the text of what they failed with.

    A process that has failed takes part as well, so that none waits for ever.
    """
    import torch.distributed as distributed

    chosen = None if group is True else group
    everyone: list[Any] = [None] * distributed.get_world_size(chosen)
    distributed.all_gather_object(everyone, mine, group=chosen)
    del everyone[distributed.get_rank(chosen)]
    return everyone


def merge(sims: list[engine.QuantizationSimModel], others: list[Any]) -> None:
    """Add what other processes observed, of each part."""
    for other in others:
        if isinstance(other, str):
            raise InvalidStateError(f"calibration failed in another process: {other}")
        for sim, statistics in zip(sims, other, strict=True):
            sim.merge_statistics(statistics)
