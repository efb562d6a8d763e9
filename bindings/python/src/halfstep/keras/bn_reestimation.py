# SPDX-License-Identifier: Apache-2.0
# Measures the statistics of batch norms anew, after quantized training.
"""Batch-norm re-estimation: statistics that fit the quantized network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from .._undo import Handle
from ..errors import (
    EmptyStatisticsError,
    InvalidArgumentError,
    InvalidStateError,
    NonFiniteValueError,
)

_TRACED = "forward_fn: it ran the model in tf.function: run it eagerly"


def _norms(model: keras.Model) -> list[Any]:
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]


class _Statistics:
    """Sums of the batches' own means and variances, for each batch norm."""

    def __init__(self, norms: list[Any]) -> None:
        self._norms = norms
        self._sums: dict[int, list[np.ndarray]] = {}
        self._last: dict[int, tuple[Any, Any]] = {}
        self._counts: dict[int, int] = {}
        self.is_traced = False

    def watch(self, norm: Any) -> Callable[..., Any]:
        """Return what takes the place of a batch norm's call: a batch's own statistics."""

        def call(inputs: Any, training: Any = None, mask: Any = None) -> Any:
            axes = [
                axis for axis in range(inputs.shape.rank) if axis != norm.axis % inputs.shape.rank
            ]
            mean, variance = tf.nn.moments(inputs, axes)
            if not hasattr(mean, "numpy"):
                self.is_traced = True
                raise InvalidStateError(_TRACED)
            self._last[id(norm)] = mean, variance
            shape = [1] * inputs.shape.rank
            shape[norm.axis] = -1
            scale = tf.math.rsqrt(variance + norm.epsilon)
            if norm.scale:
                scale *= norm.gamma
            shift = -mean * scale
            if norm.center:
                shift += norm.beta
            return inputs * tf.reshape(scale, shape) + tf.reshape(shift, shape)

        return call

    def end_batch(self) -> None:
        """Add what the batch's last call of each batch norm has found."""
        for key, pair in self._last.items():
            found = [np.asarray(one.numpy(), np.float64) for one in pair]
            known = self._sums.get(key)
            self._sums[key] = (
                found if known is None else [a + b for a, b in zip(known, found, strict=True)]
            )
            self._counts[key] = self._counts.get(key, 0) + 1
        self._last.clear()

    def averages(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return mean and variance for each batch norm."""
        result = []
        for norm in self._norms:
            if id(norm) not in self._sums:
                raise EmptyStatisticsError(f"batch norm '{norm.name}' has seen no data")
            mean, variance = (total / self._counts[id(norm)] for total in self._sums[id(norm)])
            if not (np.isfinite(mean).all() and np.isfinite(variance).all()):
                raise NonFiniteValueError(f"batch norm '{norm.name}': statistics are not finite")
            result.append((mean, variance))
        return result


def reestimate_bn_stats(
    model: Any,
    dataset: Iterable[Any],
    num_batches: int = 100,
    forward_fn: Callable[[keras.Model, Any], Any] | None = None,
) -> Handle:
    """Replace the moving statistics of all batch norms by those of the given data.

    Mean and variance become the averages of the batches' own, each batch counting alike, summed in
    float64; within a batch, batch norms work with the batch's statistics. Of a batch norm that runs
    several times in a batch, the last time counts. All but the batch norms does what it does in
    inference. If anything raises, the statistics stay as they were.

    Parameters
    ----------
    model : keras.Model or QuantizationSimModel
        The network, usually a simulation after training.
    dataset : iterable
        Batches; of a tuple or list, the first item goes into the network.
    num_batches : int
        Batches to use, at least 1; fewer if the data ends.
    forward_fn : callable, optional
        Called with the network and a batch instead of ``network(batch)``; it runs eagerly.

    Returns
    -------
    Handle
        Its `remove` brings the former statistics back.

    Raises
    ------
    InvalidArgumentError
        For a number of batches below 1.
    InvalidStateError
        If `forward_fn` runs the model in `tf.function`.
    EmptyStatisticsError
        If there is no batch, or a batch norm saw none.
    NonFiniteValueError
        Naming a batch norm whose statistics became NaN or infinite.

    Examples
    --------
    >>> net = keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization(name="norm")])
    >>> batch = np.array([[1.0, 2.0], [3.0, 6.0]], np.float32)
    >>> handle = reestimate_bn_stats(net, [batch])
    >>> net.get_layer("norm").moving_mean.numpy()
    array([2., 4.], dtype=float32)
    >>> handle.remove()
    >>> net.get_layer("norm").moving_mean.numpy()
    array([0., 0.], dtype=float32)
    """
    network: keras.Model = model if isinstance(model, keras.Model) else model.model
    if num_batches < 1:
        raise InvalidArgumentError(f"num_batches: expected 1 or more, got {num_batches}")
    norms = _norms(network)
    before = [(norm.moving_mean.numpy(), norm.moving_variance.numpy()) for norm in norms]
    statistics = _Statistics(norms)

    def undo() -> None:
        for norm, (mean, variance) in zip(norms, before, strict=True):
            norm.moving_mean.assign(mean)
            norm.moving_variance.assign(variance)

    try:
        for norm in norms:
            norm.call = statistics.watch(norm)
        for count, batch in enumerate(dataset):
            if count == num_batches:
                break
            if forward_fn is not None:
                forward_fn(network, batch)
            else:
                inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
                network(tree.map_structure(tf.convert_to_tensor, inputs), training=False)
            statistics.end_batch()
    except Exception:
        # TensorFlow wraps what is raised while it traces.
        if statistics.is_traced:
            raise InvalidStateError(_TRACED) from None
        raise
    finally:
        for norm in norms:
            if "call" in norm.__dict__:
                del norm.call
    for norm, (mean, variance) in zip(norms, statistics.averages(), strict=True):
        norm.moving_mean.assign(mean.astype(np.float32))
        norm.moving_variance.assign(variance.astype(np.float32))
    return Handle(undo)
