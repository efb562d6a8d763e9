# SPDX-License-Identifier: Apache-2.0
# Fake quantization as Keras layers, with gradients for values and ranges.
"""Quantizers of simulated Keras models.

Everything is TensorFlow operations that follow the engine's arithmetic one rounding at a time, so
that results are the same bits, and the model runs eagerly, in `tf.function`, and on other devices,
and can be written as a SavedModel.
"""

from __future__ import annotations

import inspect
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from .. import _core
from .._faces import highest_code, lowest_code
from ..errors import InvalidArgumentError
from ._inside import RUNNERS


def grid_between(
    minimum: Any, maximum: Any, bits: int, lowest: int, highest: int, symmetric: bool
) -> tuple[Any, Any]:
    """Return scales and zero points (both float32) of the grids between the ends of ranges.

    The engine's `hs_encoding_from_range`, operation by operation in float64.
    """
    steps = float(highest - lowest)
    low = tf.minimum(tf.cast(minimum, tf.float64), 0.0)
    width = tf.maximum(tf.cast(maximum, tf.float64), 0.0) - low
    least = min(float(np.finfo(np.float32).eps), 0.01 / ((1 << bits) - 1))
    step = tf.maximum(width / steps, least)
    if symmetric:
        return tf.cast(step, tf.float32), tf.zeros_like(minimum)
    zero = tf.minimum(tf.round(-low / step), steps) + lowest
    return tf.cast(step, tf.float32), tf.cast(zero, tf.float32)


def _gathered(values: Any, like: Any) -> Any:
    """Return float64 sums over what shares a range, in the shape of the ranges."""
    values = tf.cast(values, tf.float64)
    if like.shape.rank == 0:
        return tf.reduce_sum(values)
    axes = [axis for axis, extent in enumerate(like.shape) if extent == 1]
    return tf.reduce_sum(values, axes, keepdims=True)


def fake_quantize(
    x: Any, minimum: Any, maximum: Any, bits: int, lowest: int, highest: int, symmetric: bool
) -> Any:
    """Round a tensor to the grids between the ends of ranges, which broadcast against it.

    Gradients reach the tensor where it lies on the grid, and the ends of the ranges with the
    roundings passed straight through.

    References
    ----------
    Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and better
    initialization", 2020. arXiv:2004.09576, expressed in the ends of the range.
    """

    @tf.custom_gradient
    def quantize(x: Any, minimum: Any, maximum: Any) -> Any:
        step, zero = grid_between(minimum, maximum, bits, lowest, highest, symmetric)
        low, high = lowest - zero, highest - zero
        quotients = x * (1.0 / step)
        codes = tf.round(quotients)
        # A NaN takes the lower bound and zeros are positive, as in the engine. (TensorFlow would
        # optimize the addition of 0 away.)
        codes = tf.where(tf.math.is_nan(codes), low, tf.clip_by_value(codes, low, high))
        codes = tf.where(codes == 0.0, tf.zeros_like(codes), codes)

        def gradient(upstream: Any) -> tuple[Any, Any, Any]:
            near = tf.clip_by_value(quotients, low - 1.0, high + 1.0)
            rounded = tf.round(near)
            below, above = rounded < low, rounded > high
            outside = below | above
            kept = tf.where(outside, tf.zeros_like(upstream), upstream)
            ends = tf.where(outside, tf.where(below, low, high) * tf.ones_like(x), 0.0)
            slope = _gathered(kept * (rounded - near) + upstream * ends, minimum)
            steps = float(highest - lowest)
            down, up = -slope / steps, slope / steps
            if not symmetric:
                step64 = tf.cast(step, tf.float64)
                lost = tf.where(outside, upstream, tf.zeros_like(upstream))
                shift = _gathered(lost, minimum) * step64
                start = tf.minimum(tf.cast(minimum, tf.float64), 0.0)
                tilt = start / (step64 * step64 * steps)
                down = down + shift * (1.0 / step64 + tilt)
                up = up - shift * tilt
            return kept, tf.cast(down, tf.float32), tf.cast(up, tf.float32)

        return codes * step, gradient

    return quantize(x, tf.convert_to_tensor(minimum), tf.convert_to_tensor(maximum))


@keras.saving.register_keras_serializable(package="halfstep")
class Quantizer(keras.layers.Layer):
    """Rounds a tensor to an integer grid.

    Parameters
    ----------
    tensor : str
        Name of the tensor in the exported ONNX model.
    bits : int
        Width of the codes, 2 to 16.
    signed, symmetric, strict : bool
        The kind of grid, as in `halfstep.Encoding`.
    shape : sequence of int
        Shape of the ends of the range; it broadcasts against the tensor.
    enabled, has_range : bool
        Whether it takes part, and whether its range is known; otherwise values pass through.

    Attributes
    ----------
    minimum, maximum : keras.Variable
        Ends of the range. They train once `trainable` is set.
    """

    def __init__(
        self,
        tensor: str,
        bits: int = 8,
        signed: bool = False,
        symmetric: bool = False,
        strict: bool = False,
        shape: Any = (),
        enabled: bool = True,
        has_range: bool = False,
        trainable: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(trainable=trainable, **kwargs)
        self.tensor, self.bits, self.signed = tensor, int(bits), bool(signed)
        self.symmetric, self.strict = bool(symmetric), bool(strict)
        self.range_shape = tuple(int(n) for n in shape)
        self.enabled, self.has_range = bool(enabled), bool(has_range)
        self.minimum, self.maximum = (
            self.add_weight(shape=self.range_shape, initializer="zeros", name=name)
            for name in ("minimum", "maximum")
        )
        self.built = True

    @property
    def lowest(self) -> int:
        """Lowest code."""
        return lowest_code(self.bits, self.signed, self.strict)

    @property
    def highest(self) -> int:
        """Highest code."""
        return highest_code(self.bits, self.signed)

    def call(self, inputs: Any) -> Any:
        """Return the tensor on the grid."""
        if not (self.enabled and self.has_range):
            return inputs
        return fake_quantize(
            inputs,
            self.minimum,
            self.maximum,
            self.bits,
            self.lowest,
            self.highest,
            self.symmetric,
        )

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the input's shape."""
        return input_shape

    def set_range(self, minimum: Any, maximum: Any) -> None:
        """Set the ends of the range.

        Raises
        ------
        InvalidArgumentError
            For ends that are not finite or in the wrong order.
        """
        low, high = (
            np.broadcast_to(np.asarray(end, np.float32), self.range_shape)
            for end in (minimum, maximum)
        )
        if not (np.isfinite(low).all() and np.isfinite(high).all() and (low <= high).all()):
            raise InvalidArgumentError(
                f"quantizer '{self.tensor}': expected finite ends, minimum up to maximum"
            )
        self.minimum.assign(low)
        self.maximum.assign(high)
        self.has_range = True

    def set_grid(self, scales: Any, zero_points: Any) -> None:
        """Set the range whose grid is exactly this one."""
        scales = np.ascontiguousarray(np.asarray(scales, np.float32).reshape(-1))
        zeros = np.ascontiguousarray(np.asarray(zero_points, np.int32).reshape(-1))
        low, high = np.empty_like(scales), np.empty_like(scales)
        _core.encoding_to_range(
            scales, zeros, self.bits, self.signed, self.symmetric, self.strict, low, high
        )
        self.set_range(low.reshape(self.range_shape), high.reshape(self.range_shape))

    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Return scales (float32) and zero points (int32) in the shape of the range."""
        low, high = (
            np.ascontiguousarray(keras.ops.convert_to_numpy(end), np.float32).reshape(-1)
            for end in (self.minimum, self.maximum)
        )
        scales, zeros = np.empty_like(low), np.empty(low.shape, np.int32)
        _core.encoding_from_range(
            low, high, self.bits, self.signed, self.symmetric, self.strict, scales, zeros
        )
        return scales.reshape(self.range_shape), zeros.reshape(self.range_shape)

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return {
            **super().get_config(),
            "tensor": self.tensor,
            "bits": self.bits,
            "signed": self.signed,
            "symmetric": self.symmetric,
            "strict": self.strict,
            "shape": list(self.range_shape),
            "enabled": self.enabled,
            "has_range": self.has_range,
        }


def inside_name(suffix: str, at: int) -> str:
    """Return the key of a tensor inside a layer's call, the first one being 0."""
    return f"{suffix}@{at}" if at else suffix


@keras.saving.register_keras_serializable(package="halfstep")
class QuantizedLayer(keras.layers.Layer):
    """A layer with quantized variables and tensors inside; the variables themselves stay float.

    Parameters
    ----------
    layer : keras.layers.Layer
        The layer.
    quantizers : dict of str to Quantizer
        Quantizers by the position of the variable in ``layer.weights``.
    inner : dict of str to Quantizer, optional
        Quantizers of tensors inside the layer by the suffix of their names; for calls of a shared
        layer but the first one, with ``@1``, ``@2`` and so on behind it.
    """

    def __init__(self, layer: Any, quantizers: Any, inner: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        restore = keras.saving.deserialize_keras_object
        self.layer = restore(layer) if isinstance(layer, dict) else layer
        self._positions = sorted(quantizers, key=int)
        self.param_quantizers = [
            restore(one) if isinstance(one, dict) else one
            for one in (quantizers[position] for position in self._positions)
        ]
        self._suffixes = sorted(inner or {})
        self.inner_quantizers = [
            restore(one) if isinstance(one, dict) else one
            for one in ((inner or {})[suffix] for suffix in self._suffixes)
        ]
        parameters = inspect.signature(self.layer.call).parameters
        self._takes_training = "training" in parameters
        # Built before it is wrapped: this layer has no variables of its own to make.
        if self.layer.built:
            self.built = True

    def build(self, input_shape: Any) -> None:
        """Build the layer inside."""
        if not self.layer.built:
            self.layer.build(input_shape)
        self.built = True

    def call(
        self, inputs: Any, *args: Any, training: Any = None, at: int = 0, **kwargs: Any
    ) -> Any:
        """Return what the layer makes of the inputs with quantized variables.

        `at` is the number of the call of a shared layer.
        """
        weights = self.layer.weights
        mapping = [
            (weights[int(position)], quantizer(weights[int(position)].value))
            for position, quantizer in zip(self._positions, self.param_quantizers, strict=True)
        ]
        replaced = {id(variable) for variable, _ in mapping}
        arguments = {"training": training} if self._takes_training else {}
        with keras.StatelessScope(state_mapping=mapping) as scope:
            if self._suffixes:
                run = RUNNERS[type(self.layer).__name__]
                if "training" not in inspect.signature(run).parameters:
                    arguments = {}

                def quantize(suffix: str, x: Any) -> Any:
                    return self._quantize(inside_name(suffix, at), x)

                result = run(self.layer, quantize, inputs, *args, **kwargs, **arguments)
            else:
                result = self.layer.call(inputs, *args, **kwargs, **arguments)
        # What the layer has set meanwhile, such as moving averages, was only noted.
        for variable in self.layer.non_trainable_variables:
            value = scope.get_current_value(variable)
            if value is not None and id(variable) not in replaced:
                variable.assign(value)
        return result

    def _quantize(self, suffix: str, x: Any) -> Any:
        """Return a tensor inside the layer on its grid, if it has one."""
        if suffix not in self._suffixes:
            return x
        return self.inner_quantizers[self._suffixes.index(suffix)](x)

    def compute_output_spec(
        self, inputs: Any, *args: Any, training: Any = None, at: int = 0, **kwargs: Any
    ) -> Any:
        """Return the layer's output, which some layers know only by running symbolically."""
        return self.layer.compute_output_spec(inputs, *args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""

        def save(one: Any) -> dict[str, Any]:
            # Keras marks what is shared in the configuration that it met first, which it has copied
            # by then if that was inside of another one.
            return {**keras.saving.serialize_keras_object(one), "shared_object_id": id(one)}

        quantizers = zip(self._positions, self.param_quantizers, strict=True)
        return {
            **super().get_config(),
            "layer": keras.saving.serialize_keras_object(self.layer),
            "quantizers": {position: save(one) for position, one in quantizers},
            "inner": {
                suffix: save(one)
                for suffix, one in zip(self._suffixes, self.inner_quantizers, strict=True)
            },
        }
