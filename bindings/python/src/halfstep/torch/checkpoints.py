# SPDX-License-Identifier: Apache-2.0
# Simulations as files, to go on with later.
"""Checkpoints of simulations."""

from __future__ import annotations

import os
import pickle
from typing import Any

from ..errors import FileAccessError, InvalidArgumentError, MalformedFileError
from ._encodings import write
from .simulation import QuantizationSimModel


def save_checkpoint(quant_sim_model: QuantizationSimModel, file_path: str | os.PathLike) -> None:
    """Write a simulation with its weights, ranges and switches to a file.

    The file is a pickle, and appears whole or not at all. Classes of the network are written by
    name, as `torch.save` writes them. ``pickle`` and ``torch.save`` do the same.

    Parameters
    ----------
    quant_sim_model : QuantizationSimModel
        The simulation.
    file_path : path
        The file to write.

    Raises
    ------
    FileAccessError
    InvalidArgumentError
        If the network holds something that cannot be pickled, such as a class of a function's.
    """
    try:
        data = pickle.dumps(quant_sim_model)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InvalidArgumentError(f"the network cannot be pickled: {error}") from error
    write(os.fspath(file_path), lambda file: file.write(data))


def load_checkpoint(file_path: str | os.PathLike) -> QuantizationSimModel:
    """Read a simulation that `save_checkpoint` wrote, by the same version of the package.

    A pickle can run any code: load only files that you trust.

    Parameters
    ----------
    file_path : path
        The file.

    Returns
    -------
    QuantizationSimModel
        On the devices that it was on.

    Raises
    ------
    FileAccessError, MalformedFileError
    """
    name = os.fspath(file_path)
    try:
        with open(name, "rb") as file:
            result: Any = pickle.load(file)
    except OSError as error:
        raise FileAccessError(f"cannot read '{name}': {error.strerror}") from error
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
        raise MalformedFileError(f"'{name}' is no checkpoint: {error}") from error
    if not isinstance(result, QuantizationSimModel):
        raise MalformedFileError(f"'{name}' holds a {type(result).__name__}, not a simulation")
    return result
