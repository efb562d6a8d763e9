# SPDX-License-Identifier: Apache-2.0
# PyTorch face of the package.
"""Quantization simulation and training of live PyTorch modules."""

from .bn_reestimation import reestimate_bn_stats
from .checkpoints import load_checkpoint, save_checkpoint
from .errors import DeviceMismatchError, UntraceableModelError
from .fold_to_scale import fold_all_batch_norms_to_scale
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
    "equalize_model",
    "fold_all_batch_norms",
    "fold_all_batch_norms_to_scale",
    "load_checkpoint",
    "reestimate_bn_stats",
    "save_checkpoint",
]
