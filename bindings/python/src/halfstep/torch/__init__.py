# SPDX-License-Identifier: Apache-2.0
# PyTorch face of the package.
"""Quantization simulation and training of live PyTorch modules."""

from .errors import DeviceMismatchError, UntraceableModelError
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
]
