# SPDX-License-Identifier: Apache-2.0
# Measures the statistics of batch norms anew, after quantized training.
"""Batch-norm re-estimation: statistics that fit the quantized network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._undo import Handle
from ..errors import EmptyStatisticsError, InvalidArgumentError, NonFiniteValueError


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


@contextmanager
def _only_norms_train(model: nn.Module, norms: Iterable[_BatchNorm]) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    momenta = {module: module.momentum for module in norms}
    model.eval()
    try:
        for module in momenta:
            module.training = True
            module.momentum = 1.0  # running statistics are then those of the last batch
        yield
    finally:
        for module, momentum in momenta.items():
            module.momentum = momentum
        for module, training in modes.items():
            module.training = training


def _run(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def reestimate_bn_stats(
    model: Any,
    dataloader: Iterable[Any],
    num_batches: int = 100,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
) -> Handle:
    """Replace the running statistics of all batch norms by those of the given data.

    Mean and variance become the averages of the batches' own, each batch counting alike, summed in
    float64. Of a batch norm that runs several times in a batch, the last time counts. All but
    the batch norms is in evaluation mode meanwhile. If anything raises, the statistics stay as they
    were.

    Parameters
    ----------
    model : torch.nn.Module or QuantizationSimModel
        The network, usually a simulation after training.
    dataloader : iterable
        Batches; of a tuple or list, the first item goes into the network.
    num_batches : int
        Batches to use, at least 1; fewer if the data ends.
    forward_fn : callable, optional
        Called with the network and a batch instead of ``network(batch)``.

    Returns
    -------
    Handle
        Its `remove` brings the former statistics back.

    Raises
    ------
    InvalidArgumentError
        For a number of batches below 1.
    EmptyStatisticsError
        If there is no batch, or a batch norm saw none.
    NonFiniteValueError
        Naming a batch norm whose statistics became NaN or infinite.
    """
    network: nn.Module = model if isinstance(model, nn.Module) else model.model
    if num_batches < 1:
        raise InvalidArgumentError(f"num_batches: expected 1 or more, got {num_batches}")
    norms = _norms(network)
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    before = {
        (module, key): getattr(module, key).clone()
        for module in norms.values()
        for key in buffers
        if getattr(module, key) is not None
    }

    @torch.no_grad()
    def undo() -> None:
        for (module, key), value in before.items():
            getattr(module, key).copy_(value)

    sums: dict[str, list[torch.Tensor]] = {}
    calls = dict.fromkeys(norms, 0)

    def add(name: str, module: _BatchNorm) -> None:
        # The counter tells whether the batch has come by; a simulation may run a batch norm
        # without calling the module, so that hooks would not.
        if int(module.num_batches_tracked) == 0:
            return
        module.num_batches_tracked.zero_()
        found = [module.running_mean.to(torch.float64), module.running_var.to(torch.float64)]
        sums[name] = (
            [a + b for a, b in zip(sums[name], found, strict=True)] if calls[name] else found
        )
        calls[name] += 1

    try:
        with torch.no_grad(), _only_norms_train(network, norms.values()):
            for module in norms.values():
                module.num_batches_tracked.zero_()
            for count, batch in enumerate(dataloader):
                if count == num_batches:
                    break
                (forward_fn or _run)(network, batch)
                for name, module in norms.items():
                    add(name, module)
        with torch.no_grad():
            for name, module in norms.items():
                if not calls[name]:
                    raise EmptyStatisticsError(f"batch norm '{name}' has seen no data")
                mean, variance = (total / calls[name] for total in sums[name])
                if not bool(mean.isfinite().all() and variance.isfinite().all()):
                    raise NonFiniteValueError(f"batch norm '{name}': statistics are not finite")
                module.running_mean.copy_(mean)
                module.running_var.copy_(variance)
                module.num_batches_tracked.copy_(before[module, "num_batches_tracked"])
    except BaseException:
        undo()
        raise
    return Handle(undo)
