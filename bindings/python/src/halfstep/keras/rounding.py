# SPDX-License-Identifier: Apache-2.0
# Rounding of weights and correction of biases for Keras models.
"""AdaRound, sequential MSE and bias correction, as the engine does them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import keras
import numpy as np

from .. import simulation as engine
from .._faces import scheme_name
from ..errors import EmptyStatisticsError
from ..model import Model
from ..rounding import RoundedLayer
from ._apply import applied
from ._changed import Changed
from ._data import batches_of
from ._lending import Lending
from ._network import Network


class Rounded(NamedTuple):
    """A rounded model, what was done to it, and the grids that it was rounded for."""

    #: A new model whose layers have the names that they had.
    model: keras.Model
    #: What became of each layer, in the order in which they run.
    layers: tuple[RoundedLayer, ...]
    #: Encodings of weights and activations; `QuantizationSimModel.load_encodings` takes them.
    encodings: dict[str, Any]


def _arrays(network: Network, data: Any) -> dict[str, np.ndarray]:
    parts = list(batches_of(network, data))
    if not parts:
        raise EmptyStatisticsError("data: no batches")
    return {
        name: np.concatenate([np.atleast_1d(part[name]) for part in parts])
        for name in network.inputs
    }


def _rounded(
    model: keras.Model,
    method: str,
    data: Any,
    param_bits: int,
    in_place: bool,
    options: dict[str, Any],
) -> Rounded:
    options["quant_scheme"] = scheme_name(options.get("quant_scheme"))
    network = Network(model)
    values = _arrays(network, data)
    with Lending(network) if in_place else nullcontext() as lending:
        bound = network.bound(lending=lending)
        layers = getattr(bound, method)(values, param_bits=param_bits, **options)
        encodings = _encodings(bound, values, param_bits, options)
        return Rounded(applied(model, Changed(network, bound), set(), lending), layers, encodings)


def _encodings(
    bound: Model, values: dict[str, np.ndarray], param_bits: int, options: dict[str, Any]
) -> dict[str, Any]:
    sim = engine.QuantizationSimModel(
        bound,
        param_bits=param_bits,
        # Layers may be rounded with float activations; the encodings have some nevertheless.
        activation_bits=options.get("activation_bits") or 8,
        quant_scheme=options["quant_scheme"],
        config=options.get("config"),
        percentile=options.get("percentile", 100.0),
    )
    sim.compute_encodings([values])
    return sim.encodings()


def apply_adaround(
    model: keras.Model,
    data: Any,
    param_bits: int = 4,
    *,
    method: str = "auto",
    in_place: bool = False,
    **options: Any,
) -> Rounded:
    """Round weights so that the network's outputs change least, with unlabeled data.

    Fold batch norms first. Make the simulation of the result with the same widths and load the
    encodings that come with it after `compute_encodings`, which would choose grids of its own.

    Parameters
    ----------
    model : keras.Model
        A functional or sequential model, built; it is not changed unless `in_place`.
    data : array, dict of arrays, or iterable of batches
        Inputs, ``[N, ...]``; of a tuple, such as a dataset's, the first item counts.
    param_bits : int
        Width of weights, 2 to 16.
    method : str
        ``"auto"``, ``"gram"``, ``"gradient"`` or ``"sequential_mse"``.
    in_place : bool
        As for `fold_all_batch_norms`.
    **options
        As `halfstep.Model.adaround` takes them, such as ``excluded_layers`` or ``seed``.

    Raises
    ------
    UnsupportedOperatorError, EmptyStatisticsError, NonFiniteValueError, ShapeMismatchError
    InvalidArgumentError, UnknownNameError, InvalidConfigurationError

    References
    ----------
    Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020,
    arXiv:2004.10568.
    """
    return _rounded(model, "adaround", data, param_bits, in_place, {**options, "method": method})


def apply_seq_mse(
    model: keras.Model, data: Any, param_bits: int = 4, *, in_place: bool = False, **options: Any
) -> Rounded:
    """Search weight scales for the least error of each layer's output, layer after layer.

    Arguments, result and errors are those of `apply_adaround`.
    """
    options["method"] = "sequential_mse"
    return _rounded(model, "adaround", data, param_bits, in_place, options)


def correct_bias(
    model: keras.Model, data: Any, param_bits: int = 8, *, in_place: bool = False, **options: Any
) -> Rounded:
    """Correct biases for what rounding weights to nearest does to the means of outputs.

    Arguments, result and errors are those of `apply_adaround`, options those of
    `halfstep.Model.correct_biases`. Layers without a bias may get one.
    """
    return _rounded(model, "correct_biases", data, param_bits, in_place, options)
