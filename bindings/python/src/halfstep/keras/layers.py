# SPDX-License-Identifier: Apache-2.0
# Keras layers that algorithms put into models.
"""Layers that Keras lacks."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np


@keras.saving.register_keras_serializable(package="halfstep")
class BoundedReLU(keras.layers.Layer):
    """ReLU with an upper bound for each channel.

    Cross-layer equalization turns ``ReLU(max_value=6)`` into this.

    Parameters
    ----------
    channels : int
        Extent of the last axis.

    Examples
    --------
    >>> layer = BoundedReLU(2)
    >>> layer.set_bounds([1.0, 2.0])
    >>> layer(np.array([[-1.0, 5.0]], np.float32)).numpy()
    array([[0., 2.]], dtype=float32)
    """

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.channels = channels
        self.maximum = self.add_weight(
            shape=(channels,), initializer="ones", trainable=False, name="maximum"
        )
        self.built = True

    def set_bounds(self, maximum: Any) -> None:
        """Set the bounds, ``[channels]``."""
        self.maximum.assign(np.asarray(maximum, np.float32).reshape(self.channels))

    def call(self, inputs: Any) -> Any:
        """Return the bounded values."""
        return keras.ops.minimum(keras.ops.relu(inputs), self.maximum)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return {**super().get_config(), "channels": self.channels}
