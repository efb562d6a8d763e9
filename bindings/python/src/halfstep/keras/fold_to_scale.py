# SPDX-License-Identifier: Apache-2.0
# Folds batch norms into the layers of a trained simulation, and into the scales of their weights.
"""Batch-norm folding after quantized training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InvalidStateError
from ..records import Fold
from ._network import Network
from .folding import fold_all_batch_norms

if TYPE_CHECKING:
    from .quantizer import Quantizer
    from .simulation import QuantizationSimModel


def fold_all_batch_norms_to_scale(sim: QuantizationSimModel) -> tuple[Fold, ...]:
    """Fold the batch norms of a trained simulation; codes of weights stay what training made them.

    With σ the batch norm's deviation, a layer's weight is multiplied by γ/σ, and so are the ends of
    its quantizer's range, channel by channel: every weight keeps its code (its negative, where γ is
    negative). The quantizer of a batch norm's result goes over to the layer's. Re-estimate the
    statistics first (`reestimate_bn_stats`). Afterwards `sim.model` is a new model, to be compiled.

    Parameters
    ----------
    sim : QuantizationSimModel
        Trained, with batch norms; unchanged if the call fails.

    Returns
    -------
    tuple of Fold
        The folds that were made, with the names of the layers.

    Raises
    ------
    InvalidStateError
        If what is quantized cannot stay so: a layer's result before its batch norm, a parameter
        of a batch norm, a weight with one range for channels that fold by different factors, a
        batch norm that folds into the layer behind it. The message names the layer.
    """
    original = sim.float_model()
    before = Network(original)
    model, folds = fold_all_batch_norms(original)
    folded = type(sim)(model, **sim._arguments)
    nodes = {node.name: node for node in before.builder.nodes}
    after = {node.name: node for node in folded._network.builder.nodes}
    sources: dict[str, str] = {}
    factors: dict[str, np.ndarray] = {}
    for fold in folds:
        if fold.is_forward:
            raise InvalidStateError(
                f"batch norm '{fold.batch_norm}' folds into layer '{fold.layer}' behind it, by"
                " input channel: no range of the weight can follow"
            )
        layer, norm = nodes[fold.layer], nodes[fold.batch_norm]
        _refuse(sim, layer.outputs[0], f"the result of layer '{fold.layer}'")
        for name in norm.inputs[1:]:
            _refuse(sim, name, f"a parameter of batch norm '{fold.batch_norm}'")
        sources[after[fold.layer].outputs[0]] = norm.outputs[0]
        weight = after[fold.layer].inputs[1]
        factors[weight] = factors.get(weight, 1.0) * _factors(before.layers[fold.batch_norm])
    moved = []
    for name in sorted(folded._used):
        quantizer, source = folded._quantizers[name], sim._quantizers.get(sources.get(name, name))
        if source is None:
            if quantizer.enabled:
                raise InvalidStateError(f"quantizer '{name}' has no counterpart before folding")
            continue
        moved.append((quantizer, source, _ends(folded, name, quantizer, source, factors.get(name))))
    for quantizer, source, (low, high) in moved:
        quantizer.bits, quantizer.signed = source.bits, source.signed
        quantizer.symmetric, quantizer.strict = source.symmetric, source.strict
        quantizer.enabled, quantizer.trainable = source.enabled, source.trainable
        if source.has_range:
            quantizer.set_range(low, high)
        else:
            quantizer.has_range = False
    folded._forget_functions()
    sim.__dict__ = folded.__dict__
    return folds


def _refuse(sim: QuantizationSimModel, tensor: str, what: str) -> None:
    quantizer = sim._quantizers.get(tensor)
    if quantizer is not None and quantizer.enabled:
        raise InvalidStateError(
            f"{what} is quantized, so that the batch norm cannot fold: switch the quantizer off"
            " before calibration"
        )


def _factors(norm: Any) -> np.ndarray:
    deviation = np.sqrt(norm.moving_variance.numpy().astype(np.float64) + norm.epsilon)
    return (norm.gamma.numpy().astype(np.float64) if norm.scale else 1.0) / deviation


def _ends(
    sim: QuantizationSimModel,
    name: str,
    quantizer: Quantizer,
    source: Quantizer,
    factors: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of a quantizer's range after folding."""
    low, high = source.minimum.numpy(), source.maximum.numpy()
    if low.shape != quantizer.range_shape:
        raise InvalidStateError(f"quantizer '{name}' has another granularity after folding")
    if factors is None:
        return low, high
    groups = sim._groups.get(name)
    if groups is None or groups.max() + 1 != len(factors):
        if len(set(factors)) > 1:
            raise InvalidStateError(
                f"'{name}': one range serves several channels, and cannot be scaled by channel"
            )
        factor: Any = factors[0]
    else:
        factor = factors[groups]
    ends = np.stack([low * factor, high * factor]).astype(np.float32)
    return ends.min(0), ends.max(0)
