# SPDX-License-Identifier: Apache-2.0
# What a model tells of its tensors and layers, and of what algorithms did.
"""Answers of `halfstep.Model` as named tuples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np


class TensorInfo(NamedTuple):
    """Declared name, type and shape of an input or output."""

    #: Name of the tensor.
    name: str
    #: Element type as NumPy names it; None if not declared.
    dtype: str | None
    #: Extents, None where an extent is not fixed; None if not even their number is declared.
    shape: tuple[int | None, ...] | None


class Layer(NamedTuple):
    """A convolution or matrix product and the range of its weights."""

    #: Node name, or operator and first output if the node has no name.
    name: str
    #: Operator, such as ``"Conv"``.
    op_type: str
    #: Name of the weight.
    weight: str
    #: Least weight of each output channel, ``[K]``.
    channel_minimum: np.ndarray
    #: Largest weight of each output channel, ``[K]``.
    channel_maximum: np.ndarray
    #: Elements of the weight.
    weight_count: int


class Fold(NamedTuple):
    """A batch norm that a layer took in."""

    #: The layer.
    layer: str
    #: The batch norm that is gone.
    batch_norm: str
    #: Whether the batch norm came before the layer.
    is_forward: bool


class EqualizedSet(NamedTuple):
    """Layers that were equalized together."""

    #: Layers in the order in which they run.
    layers: tuple[str, ...]
    #: What each tensor between two layers was divided by, ``[C]`` each.
    factors: tuple[np.ndarray, ...]


class EqualizationReport(NamedTuple):
    """What equalization did."""

    #: Passes that were made over the model.
    iterations: int
    #: Sets of layers.
    sets: tuple[EqualizedSet, ...]


def tensor_infos(
    items: Iterable[tuple[str, int, tuple[int, ...] | None]],
) -> tuple[TensorInfo, ...]:
    from ._arrays import TYPE_NAMES

    return tuple(
        TensorInfo(
            name,
            TYPE_NAMES.get(dtype),
            None if shape is None else tuple(None if n < 0 else n for n in shape),
        )
        for name, dtype, shape in items
    )
