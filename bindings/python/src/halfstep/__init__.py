# SPDX-License-Identifier: Apache-2.0
# The package as users import it.
"""Makes trained networks fit for integer hardware.

Load an ONNX network, fold its batch norms, equalize its layers, simulate it on integers, and export
it with its encodings:

>>> import halfstep, numpy as np
>>> model = halfstep.Model.load("net.onnx")
>>> folds = model.fold_batch_norms()
>>> report = model.equalize()
>>> sim = halfstep.QuantizationSimModel(model)
>>> data = np.random.default_rng(0).standard_normal((16, 3, 8, 8), np.float32)
>>> sim.compute_encodings(data, progress=False)
>>> sim.export("out", "net")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _threads as _threads  # First: it loads the native module.
from . import errors as errors
from ._core import set_thread_count as _set_thread_count
from ._core import thread_count as _thread_count
from ._core import version as _version
from .compression import (
    CompressedLayer,
    CompressibleLayer,
    CompressionStats,
    LayerCost,
    ModelCompressor,
)
from .errors import (
    CancelledError,
    EmptyStatisticsError,
    EncodingMismatchError,
    FileAccessError,
    HalfstepError,
    InternalError,
    InvalidArgumentError,
    InvalidConfigurationError,
    InvalidGraphError,
    InvalidStateError,
    MalformedFileError,
    NonFiniteValueError,
    NumericFailureError,
    OutOfMemoryError,
    ShapeMismatchError,
    TypeMismatchError,
    UnknownNameError,
    UnsafePathError,
    UnsupportedOperatorError,
    UnsupportedVersionError,
)
from .model import Model
from .quantizers import Encoding, LoadReport, Quantizer
from .records import EqualizationReport, EqualizedSet, Fold, Layer, TensorInfo
from .rounding import RoundedLayer, RoundingProgress
from .simulation import QuantizationSimModel

if TYPE_CHECKING:
    import numpy as np

__version__: str = _version()

__all__ = [
    "CancelledError",
    "CompressedLayer",
    "CompressibleLayer",
    "CompressionStats",
    "EmptyStatisticsError",
    "Encoding",
    "EncodingMismatchError",
    "EqualizationReport",
    "EqualizedSet",
    "FileAccessError",
    "Fold",
    "HalfstepError",
    "InternalError",
    "InvalidArgumentError",
    "InvalidConfigurationError",
    "InvalidGraphError",
    "InvalidStateError",
    "Layer",
    "LayerCost",
    "LoadReport",
    "MalformedFileError",
    "Model",
    "ModelCompressor",
    "NonFiniteValueError",
    "NumericFailureError",
    "OutOfMemoryError",
    "QuantizationSimModel",
    "Quantizer",
    "RoundedLayer",
    "RoundingProgress",
    "ShapeMismatchError",
    "TensorInfo",
    "TypeMismatchError",
    "UnknownNameError",
    "UnsafePathError",
    "UnsupportedOperatorError",
    "UnsupportedVersionError",
    "fake_quantize",
    "set_thread_count",
    "thread_count",
]


def fake_quantize(
    array: Any,
    scale: Any,
    zero_point: Any,
    bits: int = 8,
    signed: bool = False,
    axis: int | None = None,
    out: np.ndarray | None = None,
    *,
    block_axis: int | None = None,
    block_size: int = 0,
    strict: bool = False,
) -> np.ndarray:
    """Round floats to an integer grid and back, half to even.

    ``scale * (clamp(round(array / scale) + zero_point) - zero_point)``.

    Parameters
    ----------
    array : array_like
        float32 values of any layout.
    scale : float or array_like
        Positive steps: one, one a channel, or one a channel and block (row-major).
    zero_point : int or array_like
        Codes that stand for 0; one for all, or as many as scales.
    bits : int
        Width of the codes, 2 to 16.
    signed : bool
        Whether codes start at ``-2**(bits - 1)``, not at 0.
    axis : int, optional
        Channel axis; by default one scale serves all.
    out : numpy.ndarray, optional
        Row-major float32 array of the same shape for the result; may be `array` itself.
    block_axis : int, optional
        Axis that is cut into blocks; `axis` stays the channel axis.
    block_size : int
        Elements of a block along `block_axis`.
    strict : bool
        Whether the lowest signed code is left out.

    Returns
    -------
    numpy.ndarray

    Raises
    ------
    InvalidArgumentError, ShapeMismatchError, TypeMismatchError

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([-1.0, 0.05, 0.15, 0.25, 99.0], np.float32)
    >>> fake_quantize(x, scale=0.5, zero_point=1, bits=2)
    array([-0.5,  0. ,  0. ,  0. ,  1. ], dtype=float32)
    """
    from . import _arrays

    return _arrays.fake_quantize(
        array, scale, zero_point, bits, signed, axis, block_axis, block_size, strict, out
    )


def set_thread_count(count: int) -> None:
    """Set how many threads Halfstep uses from now on, in every thread of the process.

    Parameters
    ----------
    count : int
        1 to 1024, or 0 for one a core (or what OMP_NUM_THREADS says).
    """
    _set_thread_count(count)


def thread_count() -> int:
    """Return how many threads a call from this thread would use."""
    return _thread_count()
