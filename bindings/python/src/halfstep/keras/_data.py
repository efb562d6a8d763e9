# SPDX-License-Identifier: Apache-2.0
# What users give as data, as arrays for the engine.
"""Turns batches of Keras users into arrays by input name, with errors that name the input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from keras import tree

from ..errors import InvalidArgumentError, TypeMismatchError, UnknownNameError
from ._network import Network


def _inputs_of(batch: Any, count: int) -> Any:
    """Return a batch without its labels: of a tuple, such as a dataset's, the first item."""
    if isinstance(batch, (tuple, list)) and batch:
        if count == 1 or isinstance(batch[0], (tuple, list, Mapping)):
            return batch[0]
    return batch


def arrays(network: Network, batch: Any) -> dict[str, np.ndarray]:
    """Return a batch's arrays by input name, in the types that the network takes.

    Raises
    ------
    UnknownNameError
        For a dictionary without one of the inputs.
    InvalidArgumentError
        For another number of arrays than the network has inputs.
    TypeMismatchError
        For what is no array of numbers, or fractions where the network takes integers.
    """
    names = network.inputs
    if isinstance(batch, Mapping):
        for name in names:
            if name not in batch:
                raise UnknownNameError(f"input '{name}': the batch has only {sorted(batch)}")
        values = [batch[name] for name in names]
    else:
        values = tree.flatten(batch)
    if len(values) != len(names):
        raise InvalidArgumentError(
            f"expected {len(names)} arrays for the inputs {list(names)}, got {len(values)}"
        )
    types = (dtype for _, _, dtype in network.builder.inputs)
    return {
        name: _converted(name, value, np.dtype(dtype))
        for name, value, dtype in zip(names, values, types, strict=True)
    }


def _converted(name: str, value: Any, dtype: np.dtype) -> np.ndarray:
    try:
        given = np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise TypeMismatchError(f"input '{name}': no array of numbers: {error}") from None
    if given.dtype.kind not in "biuf" and given.dtype.name != "bfloat16":
        raise TypeMismatchError(f"input '{name}': expected numbers, got {given.dtype}")
    if dtype.kind in "iu" and given.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            whole = given.astype(dtype)
        if not np.array_equal(whole, given):
            raise TypeMismatchError(f"input '{name}': expected {dtype}, got fractions")
        return whole
    return given.astype(dtype, copy=False)


def batches_of(network: Network, data: Any, rows: int | None = None) -> Iterator[dict[str, Any]]:
    """Go through data batch by batch, as arrays by input name.

    Parameters
    ----------
    network : Network
        Whose inputs they are.
    data : array, dict of arrays, or iterable of batches
        Inputs; of a tuple, such as a dataset's, the first item counts.
    rows : int, optional
        Rows a batch, where all rows come at once; by default they stay together.

    Raises
    ------
    TypeMismatchError
        For what is none of these, and as `arrays`.
    UnknownNameError, InvalidArgumentError
    """
    is_whole = hasattr(data, "__array__") or isinstance(data, Mapping)
    try:
        batches = iter([data] if is_whole else data)
    except TypeError:
        raise TypeMismatchError(
            f"data: expected an array, a dict of arrays or batches, got {type(data).__name__}"
        ) from None
    for batch in batches:
        given = arrays(network, _inputs_of(batch, len(network.inputs)))
        if rows is None or not is_whole or any(value.ndim == 0 for value in given.values()):
            yield given
            continue
        for start in range(0, max(map(len, given.values())), rows):
            yield {name: value[start : start + rows] for name, value in given.items()}
