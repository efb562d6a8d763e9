# SPDX-License-Identifier: Apache-2.0
# Batch-norm re-estimation: against statistics by hand, in simulations, undoing, errors.
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from networks import randomized

from halfstep.errors import (
    EmptyStatisticsError,
    InvalidArgumentError,
    InvalidStateError,
    NonFiniteValueError,
)
from halfstep.keras import QuantizationSimModel, reestimate_bn_stats


def network() -> keras.Model:
    x = source = keras.Input((6, 6, 2))
    x = layers.Conv2D(3, 3, name="conv")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Dropout(0.5)(x)
    x = layers.ReLU(name="relu")(x)
    return randomized(keras.Model(source, layers.Dense(2, name="head")(layers.Flatten()(x))))


def data(count: int = 4) -> list[tuple[np.ndarray, int]]:
    random = np.random.default_rng(1)
    return [(random.normal(0, k + 1, (5, 6, 6, 2)).astype(np.float32), k) for k in range(count)]


def statistics(layer) -> tuple[np.ndarray, np.ndarray]:
    return layer.moving_mean.numpy(), layer.moving_variance.numpy()


def test_statistics_are_averages_over_batches():
    model, batches = network(), data()
    norm, conv = model.get_layer("norm"), model.get_layer("conv")
    before = statistics(norm)
    outputs = [np.float64(conv(x).numpy()).reshape(-1, 3) for x, _ in batches[:3]]
    handle = reestimate_bn_stats(model, batches, num_batches=3)
    mean = np.mean([y.mean(0) for y in outputs], 0)
    variance = np.mean([y.var(0) for y in outputs], 0)
    # Float32 sums of 80 values a channel, below 10.
    np.testing.assert_allclose(statistics(norm)[0], mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(statistics(norm)[1], variance, rtol=1e-5, atol=1e-5)
    handle.remove()
    assert all(np.array_equal(a, b) for a, b in zip(statistics(norm), before, strict=True))
    norm.moving_mean.assign([7.0, 7.0, 7.0])
    handle.remove()
    assert norm.moving_mean.numpy()[0] == 7
    # What stood in for the batch norm's own call is gone.
    fresh = keras.models.clone_model(model)
    fresh.set_weights(model.get_weights())
    x = batches[0][0]
    assert np.array_equal(model.predict(x, verbose=0), fresh.predict(x, verbose=0))


def test_batch_norms_work_with_the_batchs_statistics_meanwhile():
    # The second norm sees what the first makes of the batch: mean 0, variance 1 (less epsilon).
    x = source = keras.Input((4,))
    x = layers.BatchNormalization(name="first", epsilon=1e-6)(x)
    model = keras.Model(source, layers.BatchNormalization(name="second")(x))
    batch = np.random.default_rng(0).normal(5, 3, (64, 4)).astype(np.float32)
    with reestimate_bn_stats(model, tf.data.Dataset.from_tensors(batch)):
        mean, variance = statistics(model.get_layer("second"))
        np.testing.assert_allclose(mean, 0, atol=1e-5)
        np.testing.assert_allclose(variance, 1, atol=1e-5)
    assert (model.get_layer("second").moving_variance.numpy() == 1).all()


def test_a_simulation_measures_what_its_quantizers_leave():
    model, batches = network(), data()
    sim = QuantizationSimModel(model, default_param_bw=4)
    sim.compute_encodings([x for x, _ in batches])
    norm = next(
        one
        for one in sim.model._flatten_layers()
        if one.name == "norm" and hasattr(one, "moving_mean")
    )
    conv = sim.model.get_layer("conv")
    y = np.float64(conv(batches[0][0]).numpy()).reshape(-1, 3)
    for tensor in ("picture", *sim._network.inputs):
        assert tensor not in sim.quantizers or sim.quantizer(tensor).enabled
    seen = []
    reestimate_bn_stats(
        sim, batches, 1, forward_fn=lambda m, batch: seen.append(m(batch[0], training=False))
    )
    assert len(seen) == 1
    # The convolution's 4-bit weights are in the mean; rounding its input moves it a little.
    step = sim.quantizer(sim._network.inputs[0]).grid()[0]
    plain = np.float64(model.get_layer("conv")(batches[0][0]).numpy()).reshape(-1, 3)
    measured = statistics(norm)[0]
    assert np.abs(measured - y.mean(0)).max() < step
    assert np.abs(measured - y.mean(0)).max() < np.abs(plain.mean(0) - y.mean(0)).max()


def test_errors_leave_the_statistics():
    model = network()
    norm = model.get_layer("norm")
    before = statistics(norm)
    bad = np.full((2, 6, 6, 2), np.nan, np.float32)

    def traced(m, batch):
        return tf.function(m)(batch[0])

    for arguments, error, text in [
        ((data(), 0), InvalidArgumentError, "num_batches"),
        (([],), EmptyStatisticsError, "'norm'"),
        (([bad],), NonFiniteValueError, "'norm'"),
        ((data(), 2, traced), InvalidStateError, "eagerly"),
    ]:
        with pytest.raises(error, match=text):
            reestimate_bn_stats(model, *arguments)
        assert all(np.array_equal(a, b) for a, b in zip(statistics(norm), before, strict=True))
        assert "call" not in norm.__dict__
