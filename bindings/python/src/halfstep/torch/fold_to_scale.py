# SPDX-License-Identifier: Apache-2.0
# Folds batch norms into the layers of a trained simulation, and into the scales of their weights.
"""Batch-norm folding after quantized training."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import InvalidStateError
from ._trace import Call
from .folding import FoldedPair, fold_all_batch_norms
from .quantizer import Quantizer

if TYPE_CHECKING:
    from .simulation import QuantizationSimModel


def fold_all_batch_norms_to_scale(sim: QuantizationSimModel) -> list[FoldedPair]:
    """Fold the batch norms of a trained simulation; codes of weights stay what training made them.

    With σ the batch norm's deviation, a layer's weight is multiplied by γ/σ, and so are the ends of
    its quantizer's range, channel by channel: every weight keeps its code (its negative, where γ is
    negative). The quantizer of a batch norm's result goes over to the layer's. Re-estimate the
    statistics first (`reestimate_bn_stats`). Afterwards `sim.model` is a new module; a model that
    the simulation was built on in place keeps its batch norms.

    Parameters
    ----------
    sim : QuantizationSimModel
        Trained, with batch norms; unchanged if the call fails.

    Returns
    -------
    list of FoldedPair
        Layers of the new `sim.model` with the batch norms that they took in.

    Raises
    ------
    InvalidStateError
        If what is quantized cannot stay so: a layer's result before its batch norm, a parameter
        of a batch norm, a weight with one range for channels that fold by different factors. The
        message names the layer.
    """
    folded, pairs = _folded(sim)
    before = _by_name(sim)
    for layer, norm, _ in pairs:
        _refuse(before, f"{layer}.output_quantizers.", f"the result of layer '{layer}'")
        _refuse(before, f"{norm}.param_quantizers.", f"a parameter of batch norm '{norm}'")
    _move(_sources(before, pairs), _by_name(folded), pairs)
    device = next((p.device for p in sim.model.parameters()), torch.device("cpu"))
    folded.model.to(device).train(sim.model.training)
    result = [FoldedPair(folded.model.get_submodule(layer), norm) for layer, _, norm in pairs]
    sim.__dict__ = folded.__dict__
    return result


#: Layer and batch norm by name, and the batch norm itself.
Pairs = list[tuple[str, str, nn.Module]]


def _folded(sim: QuantizationSimModel) -> tuple[QuantizationSimModel, Pairs]:
    """Return a simulation of the network with its batch norms folded, and what folded."""
    model = sim.get_original_model().cpu()
    names = {module: name for name, module in model.named_modules()}
    example = Call(*sim._network.example)
    pairs = [
        (names[layer], names[norm], norm)
        for layer, norm in fold_all_batch_norms(model, dummy_input=example)
    ]
    options = sim._options
    folded = type(sim)(
        model,
        example,
        quant_scheme=options["quant_scheme"],
        default_output_bw=options["activation_bits"],
        default_param_bw=options["param_bits"],
        in_place=True,
        config_file=options["config"],
        percentile=options["percentile"],
    )
    return folded, pairs


def _by_name(sim: QuantizationSimModel) -> dict[str, Quantizer]:
    """Return quantizers by names that folding keeps: operators are counted kind by kind."""
    counts: dict[str, int] = {}
    result = {}
    for name, quantizer in sim.named_quantizers():
        if "functional_quantizers." in name:
            name = re.sub(r"_\d+$", "", name)
            counts[name] = counts.get(name, -1) + 1
            name = f"{name}_{counts[name]}"
        result[name] = quantizer
    return result


def _sources(before: dict[str, Quantizer], pairs: Pairs) -> dict[str, Quantizer]:
    """Return the quantizers by the names that they have after folding."""
    sources = dict(before)
    for layer, norm, _ in pairs:
        own = [key for key in before if key.startswith(f"{layer}.output_quantizers.")]
        results = [key for key in before if key.startswith(f"{norm}.output_quantizers.")]
        for key in own + results:
            del sources[key]
        for key in results:
            sources[key.replace(f"{norm}.", f"{layer}.", 1)] = before[key]
    return sources


def _refuse(before: dict[str, Quantizer], prefix: str, what: str) -> None:
    if any(key.startswith(prefix) and quantizer.enabled for key, quantizer in before.items()):
        raise InvalidStateError(
            f"{what} is quantized, so that the batch norm cannot fold: switch the quantizer off"
            " before calibration"
        )


def _factors(norm: nn.Module) -> torch.Tensor:
    deviation = (norm.running_var.double() + norm.eps).sqrt()
    gamma = torch.ones_like(deviation) if norm.weight is None else norm.weight.detach().double()
    return gamma / deviation


@torch.no_grad()
def _move(sources: dict[str, Quantizer], after: dict[str, Quantizer], pairs: Pairs) -> None:
    """Give the quantizers of the folded network the states of the unfolded one's."""
    factors = {f"{layer}.param_quantizers.weight": _factors(norm) for layer, _, norm in pairs}
    for key, quantizer in after.items():
        source = sources.get(key)
        if source is None:
            if quantizer.enabled:
                raise InvalidStateError(f"quantizer '{key}' has no counterpart before folding")
            continue
        low, high = source.minimum.detach().cpu(), source.maximum.detach().cpu()
        if key in factors:
            factor = factors[key]
            if low.dim() != 1 or low.numel() != factor.numel():
                raise InvalidStateError(
                    f"'{key}': one range serves several channels, and cannot be scaled by channel"
                )
            ends = torch.stack([low.double() * factor, high.double() * factor]).float()
            low, high = ends.amin(0), ends.amax(0)
        quantizer.minimum.copy_(low)
        quantizer.maximum.copy_(high)
        quantizer.set_extra_state(source.get_extra_state())
