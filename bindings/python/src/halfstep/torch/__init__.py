# SPDX-License-Identifier: Apache-2.0
# PyTorch face of the package.
"""Quantization simulation and training of live PyTorch modules."""

from .bn_reestimation import reestimate_bn_stats
from .errors import DeviceMismatchError, UntraceableModelError
from .fold_to_scale import defer_batch_norms, fold_all_batch_norms_to_scale
from .folding import BoundedReLU, FoldedPair, equalize_model, fold_all_batch_norms
from .quantizer import Quantizer
from .simulation import QuantizationSimModel

__all__ = [
    "BoundedReLU",
    "DeviceMismatchError",
    "FoldedPair",
    "QuantizationSimModel",
    "Quantizer",
    "UntraceableModelError",
    "defer_batch_norms",
    "equalize_model",
    "fold_all_batch_norms",
    "fold_all_batch_norms_to_scale",
    "reestimate_bn_stats",
]
