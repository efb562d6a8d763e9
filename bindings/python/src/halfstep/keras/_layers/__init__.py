# SPDX-License-Identifier: Apache-2.0
# What each Keras layer is in ONNX.
"""Writes the calls of layers, one file for each family of them.

Convolutions, pooling and batch norms work with channels behind the batch, as in ONNX; what follows
stays in that layout as long as it can, so that the graph is the one that PyTorch exports.
"""

from . import activation, attention, linear, normalization, pooling, recurrent, shape
from ._writers import WRITERS, aligned, placed, refuse_unless, reshaped, scaled

#: Where the writers are.
FAMILIES = (activation, attention, linear, normalization, pooling, recurrent, shape)

__all__ = ["FAMILIES", "WRITERS", "aligned", "placed", "refuse_unless", "reshaped", "scaled"]
