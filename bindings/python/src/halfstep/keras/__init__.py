# SPDX-License-Identifier: Apache-2.0
# Keras models in process.
"""The engine on live Keras models (TensorFlow backend); `import halfstep` does not load this.

>>> import halfstep.keras
>>> folded, folds = halfstep.keras.fold_all_batch_norms(model)  # doctest: +SKIP
>>> equalized = halfstep.keras.equalize_model(model)  # doctest: +SKIP
"""

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
from .bn_reestimation import reestimate_bn_stats
from .compress import ModelCompressor
from .fold_to_scale import fold_all_batch_norms_to_scale
from .folding import equalize_model, fold_all_batch_norms
from .layers import BoundedReLU
from .quantizer import QuantizedLayer, Quantizer
from .rounding import Rounded, apply_adaround, apply_seq_mse, correct_bias
from .simulation import QuantizationSimModel

__all__ = [
    "AutomaticSelectionParameters",
    "ChannelPruningParameters",
    "BoundedReLU",
    "CompressionScheme",
    "CompressionStats",
    "CostMetric",
    "GreedySelectionParameters",
    "ModelCompressor",
    "ModuleCompRatioPair",
    "QuantizationSimModel",
    "QuantizedLayer",
    "Quantizer",
    "RankSelectScheme",
    "Rounded",
    "SpatialSvdParameters",
    "WeightSvdParameters",
    "apply_adaround",
    "apply_seq_mse",
    "correct_bias",
    "equalize_model",
    "fold_all_batch_norms",
    "fold_all_batch_norms_to_scale",
    "reestimate_bn_stats",
]
