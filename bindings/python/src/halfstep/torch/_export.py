# SPDX-License-Identifier: Apache-2.0
# Files that a simulation writes besides its encodings.
"""ONNX models with quantizers, and where files go."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ..errors import FileAccessError, InvalidArgumentError

if TYPE_CHECKING:
    from .simulation import QuantizationSimModel


class ONNX:
    """What `QuantizationSimModel.onnx` offers."""

    def __init__(self, sim: QuantizationSimModel) -> None:
        self._sim = sim

    def export(
        self,
        args: Any,
        f: str | os.PathLike[str] | None = None,
        *,
        export_int32_bias: bool = False,
        prequantize_constants: bool = False,
    ) -> None:
        """Write an ONNX model whose QuantizeLinear and DequantizeLinear pairs carry the encodings.

        Parameters
        ----------
        args : path, or inputs
            The file to write. Or inputs, as AIMET has it: then `f` is the file.
        f : path, optional
            The file to write.
        export_int32_bias : bool
            Whether biases become 32-bit integers.
        prequantize_constants : bool
            Whether constants are stored as integers.

        Raises
        ------
        FileAccessError, InvalidStateError
        UntraceableModelError
            If the network is simulated by modules.
        """
        path = args if f is None else f
        self._sim._engine(keeps_ranges=True).export_qdq(
            path, prequantize_constants=prequantize_constants, int32_bias=export_int32_bias
        )


def make_folder(path: str | os.PathLike[str]) -> None:
    """Create a folder whose parent exists, unless it is there."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise FileAccessError(f"cannot create '{os.fspath(path)}': {error.strerror}") from error


def file_name(prefix: str) -> str:
    """Return a file's name without folders, as it is."""
    if not prefix or os.path.basename(prefix) != prefix:
        raise InvalidArgumentError(f"filename_prefix '{prefix}': expected a name without folders")
    return prefix
