# SPDX-License-Identifier: Apache-2.0
# Batch norm folding and cross-layer equalization of Keras models.
"""Algorithms that change the weights of a Keras model and keep its function."""

from __future__ import annotations

from contextlib import nullcontext

import keras

from .._progress import Progress
from ..records import Fold
from ._apply import applied
from ._changed import Changed
from ._lending import Lending
from ._network import Network


def fold_all_batch_norms(
    model: keras.Model, *, in_place: bool = False
) -> tuple[keras.Model, tuple[Fold, ...]]:
    """Fold batch norms into the layers beside them.

    Parameters
    ----------
    model : keras.Model
        A functional or sequential model, built; it is not changed unless `in_place`.
    in_place : bool
        Whether the result takes over the layers and variables of `model`, so that no weight exists
        twice. `model` is used up then: calling it raises `InvalidStateError`. If anything else
        raises, it is as it was.

    Returns
    -------
    keras.Model
        A model of the same function without the batch norms that were folded. Layers keep their
        names; nested models come out flat.
    tuple of Fold
        The folds that were made, with the names of the layers.

    Raises
    ------
    UnsupportedOperatorError
        Naming every layer that cannot be described to the engine, or a subclassed model.
    InvalidArgumentError, NonFiniteValueError

    Examples
    --------
    >>> net = keras.Sequential(
    ...     [
    ...         keras.Input((8, 8, 3)),
    ...         keras.layers.Conv2D(4, 3, name="conv"),
    ...         keras.layers.BatchNormalization(name="norm"),
    ...     ]
    ... )
    >>> folded, folds = fold_all_batch_norms(net)
    >>> [(fold.layer, fold.batch_norm) for fold in folds]
    [('conv', 'norm')]
    >>> [layer.name for layer in folded.layers][1:]
    ['conv']
    """
    network = Network(model)
    with Lending(network) if in_place else nullcontext() as lending:
        bound = network.bound(lending=lending)
        folds = bound.fold_batch_norms()
        dropped = {fold.batch_norm for fold in folds}
        return applied(model, Changed(network, bound), dropped, lending), folds


def equalize_model(
    model: keras.Model,
    *,
    absorb_high_biases: bool = False,
    max_iterations: int = 50,
    in_place: bool = False,
    progress: bool | Progress = False,
) -> keras.Model:
    """Fold batch norms and balance the weight ranges of consecutive layers.

    Parameters
    ----------
    model : keras.Model
        A functional or sequential model, built; it is not changed unless `in_place`.
    absorb_high_biases : bool
        Whether the next layer absorbs high biases, which may change the function.
    max_iterations : int
        Passes over the model at most, 1 or more.
    in_place : bool
        As for `fold_all_batch_norms`.
    progress : bool or callable
        Whether to show a bar, or a function that gets passes done and passes at most; it cancels
        by returning False.

    Returns
    -------
    keras.Model
        A model of the same function. Layers keep their names; ``ReLU(max_value=6)`` between
        equalized layers becomes `BoundedReLU`, under its name.

    Raises
    ------
    UnsupportedOperatorError, InvalidArgumentError, NonFiniteValueError
    CancelledError
        If `progress` returned False.

    References
    ----------
    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019.
    arXiv:1906.04721
    """
    network = Network(model)
    with Lending(network) if in_place else nullcontext() as lending:
        bound = network.bound(lending=lending)
        dropped = {fold.batch_norm for fold in bound.fold_batch_norms()}
        bound.equalize(
            absorb_high_biases=absorb_high_biases,
            max_iterations=max_iterations,
            progress=progress,
        )
        return applied(model, Changed(network, bound), dropped, lending)
