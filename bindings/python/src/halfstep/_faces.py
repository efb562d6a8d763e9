# SPDX-License-Identifier: Apache-2.0
# What the faces for training frameworks share.
"""Names of range schemes and ends of integer grids, for `halfstep.torch` and `halfstep.keras`."""

from __future__ import annotations

from typing import Any

from .errors import UnknownNameError

#: Names of range schemes, AIMET's among them, as the engine knows them.
_SCHEMES = {
    None: "min_max",
    "min_max": "min_max",
    "tf": "min_max",
    "post_training_tf": "min_max",
    "training_range_learning_with_tf_init": "min_max",
    "tf_enhanced": "sqnr",
    "sqnr": "sqnr",
    "post_training_tf_enhanced": "sqnr",
    "training_range_learning_with_tf_enhanced_init": "sqnr",
    "percentile": "percentile",
    "post_training_percentile": "percentile",
    "mse": "mse",
    "entropy": "entropy",
}


def scheme_name(quant_scheme: Any) -> str:
    """Return the engine's name of a range scheme.

    Parameters
    ----------
    quant_scheme : str, enumeration or None
        A name of the engine's or AIMET's, or a member of AIMET's enumeration; None is min-max.

    Raises
    ------
    UnknownNameError
    """
    for given in (quant_scheme, *(getattr(quant_scheme, a, None) for a in ("value", "name"))):
        if isinstance(given, str) and given in _SCHEMES:
            return _SCHEMES[given]
    if quant_scheme is None:
        return _SCHEMES[None]
    known = ", ".join(name for name in _SCHEMES if name)
    raise UnknownNameError(f"quant_scheme {quant_scheme!r}: expected one of {known}")


def lowest_code(bits: int, signed: bool, strict: bool) -> int:
    """Return the lowest code of an integer grid; a strict one leaves out the lowest signed code."""
    return -(1 << (bits - 1)) + int(strict) if signed else 0


def highest_code(bits: int, signed: bool) -> int:
    """Return the highest code of an integer grid."""
    return (1 << (bits - 1)) - 1 if signed else (1 << bits) - 1
