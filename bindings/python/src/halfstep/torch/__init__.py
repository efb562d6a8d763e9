# SPDX-License-Identifier: Apache-2.0
# PyTorch face of the package.
"""Quantization simulation, training and compression of live PyTorch modules."""

from .._compress_parameters import (
    AutomaticSelectionParameters,
    ChannelPruningParameters,
    CompressionScheme,
    CompressionStats,
    CostMetric,
    GreedySelectionParameters,
    ModuleCompRatioPair,
    RankSelectScheme,
    SpatialSvdParameters,
    WeightSvdParameters,
)
from ._memory import empty_cache
from .bn_reestimation import reestimate_bn_stats
from .checkpoints import load_checkpoint, save_checkpoint
from .compress import ModelCompressor
from .errors import DeviceMismatchError, UntraceableModelError
from .fold_to_scale import fold_all_batch_norms_to_scale
from .folding import BoundedReLU, FoldedPair, equalize_model, fold_all_batch_norms
from .quantizer import Quantizer
from .rounding import (
    AdaroundParameters,
    QuantParams,
    apply_adaround,
    apply_seq_mse,
    correct_bias,
)
from .simulation import QuantizationSimModel

__all__ = [
    "AdaroundParameters",
    "AutomaticSelectionParameters",
    "BoundedReLU",
    "ChannelPruningParameters",
    "CompressionScheme",
    "CompressionStats",
    "CostMetric",
    "DeviceMismatchError",
    "FoldedPair",
    "GreedySelectionParameters",
    "ModelCompressor",
    "ModuleCompRatioPair",
    "QuantizationSimModel",
    "QuantParams",
    "Quantizer",
    "RankSelectScheme",
    "SpatialSvdParameters",
    "UntraceableModelError",
    "WeightSvdParameters",
    "apply_adaround",
    "apply_seq_mse",
    "correct_bias",
    "empty_cache",
    "equalize_model",
    "fold_all_batch_norms",
    "fold_all_batch_norms_to_scale",
    "load_checkpoint",
    "reestimate_bn_stats",
    "save_checkpoint",
]
