# SPDX-License-Identifier: Apache-2.0
# What a simulation says about its quantizers.
"""Plain values that describe quantizers, their grids, and what loading encodings found."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

#: Names of the granularities, by the library's numbers.
GRANULARITIES: tuple[str, ...] = ("per_tensor", "per_channel", "per_block")


class Quantizer(NamedTuple):
    """A tensor that is quantized."""

    #: Name of the tensor.
    tensor: str
    #: Tensor whose grid this one shares, or its own name.
    tied_to: str
    #: Whether the tensor is a constant, not computed.
    is_parameter: bool
    #: Width of the codes.
    bits: int
    #: Whether zero sits in the middle of the grid.
    is_symmetric: bool
    #: Whether it takes part; values pass through one that does not.
    is_enabled: bool
    #: Whether its grid may not change.
    is_frozen: bool
    #: Whether its grid is known.
    has_encoding: bool


class Encoding(NamedTuple):
    """The integer grid of a tensor: ``real = scale * (code - zero_point)``."""

    #: Positive scales, float32: one, one a channel, or one a channel and block (row-major).
    scales: np.ndarray
    #: Codes that stand for 0, int32, as many.
    zero_points: np.ndarray
    #: "per_tensor", "per_channel" or "per_block".
    granularity: str
    #: Channel axis; 0 if per tensor.
    axis: int
    #: Per block only; else 0.
    block_axis: int
    #: Per block only; else 0.
    block_size: int
    #: 2 to 16, or 32 for biases.
    bits: int
    #: Whether codes start at ``-2**(bits - 1)``, not at 0.
    is_signed: bool
    #: Whether the quantizer was asked to be symmetric.
    is_symmetric: bool
    #: Whether the lowest signed code is left out.
    is_strict: bool


class LoadReport(NamedTuple):
    """What did not match when encodings were loaded."""

    #: Tensors that the file names and that have no quantizer here.
    unknown: tuple[str, ...]
    #: Quantizers here that the file does not name.
    missing: tuple[str, ...]
    #: Tensor, property, expected, got.
    different: tuple[str, ...]
