# SPDX-License-Identifier: Apache-2.0
# Modules and functions that a simulation puts where the original's code called functions.
"""What stands in a traced network for functional calls, constants and quantized batch norms."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class Holder(nn.ModuleDict):
    """Submodules by name; as in AIMET, they can be asked for by their position, too."""

    def __getitem__(self, key: str | int) -> nn.Module:
        if isinstance(key, int):
            return list(self.values())[key]
        return super().__getitem__(key)


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
