# SPDX-License-Identifier: Apache-2.0
# What compression returns is a Keras model like any other: trained on, exported, quantized.
import keras
import numpy as np
import onnxruntime
import pytest
from networks import randomized

import halfstep
from halfstep.keras import (
    AutomaticSelectionParameters,
    ChannelPruningParameters,
    CompressionScheme,
    CostMetric,
    ModelCompressor,
    QuantizationSimModel,
    RankSelectScheme,
    SpatialSvdParameters,
    WeightSvdParameters,
)

layers = keras.layers


def pictures(count, seed):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((count, 4, 4, 3), np.float32).repeat(4, 1).repeat(4, 2)
    return base + 0.1 * rng.standard_normal((count, 16, 16, 3), np.float32)


def network():
    """A residual network with batch norms."""
    keras.utils.set_random_seed(0)
    x = start = keras.Input((16, 16, 3), name="picture")
    x = layers.Conv2D(12, 3, padding="same", use_bias=False, name="stem")(x)
    x = layers.ReLU()(layers.BatchNormalization(name="norm1")(x))
    y = layers.Conv2D(16, 3, padding="same", activation="relu", name="conv1")(x)
    y = layers.Conv2D(12, 3, padding="same", use_bias=False, name="conv2")(y)
    x = layers.Add()([x, layers.BatchNormalization(name="norm2")(y)])
    x = layers.Conv2D(20, 3, strides=2, padding="same", activation="relu", name="conv3")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return randomized(keras.Model(start, layers.Dense(5, name="head")(x), name="net"))


def compressed(scheme):
    """Half of the network's multiply-accumulates, and statistics."""
    choice = AutomaticSelectionParameters(0.5)
    data = [pictures(48, seed=2)]
    if scheme == "channel_pruning":
        kind = ChannelPruningParameters
        parameters = kind(data, 480, False, kind.Mode.auto, kind.AutoModeParams(choice))
    elif scheme == "spatial_svd":
        kind = SpatialSvdParameters
        parameters = kind(kind.Mode.auto, kind.AutoModeParams(choice))
    else:
        kind = WeightSvdParameters
        params = kind.AutoModeParams(RankSelectScheme.greedy, choice)
        parameters = kind(kind.Mode.auto, params)
    return ModelCompressor.compress_model(
        network(),
        lambda *_: 0.5,
        1,
        None,
        CompressionScheme[scheme],
        CostMetric.mac,
        parameters,
        data=data,
    )


def run(path, x):
    """All values of an ONNX file's only output."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


@pytest.mark.parametrize("scheme", ["spatial_svd", "weight_svd", "channel_pruning"])
def test_result_trains_on_exports_and_quantizes(scheme, tmp_path):
    small, stats = compressed(scheme)
    assert float(stats.mac_compression_ratio) <= 0.5
    assert all(variable.trainable for variable in small.trainable_variables)

    # A step moves every weight, those of the new layers among them.
    small.compile(keras.optimizers.SGD(0.05), "mse")
    before = [variable.numpy() for variable in small.trainable_variables]
    x = pictures(16, seed=4)
    small.fit(x, np.ones((16, 5), np.float32), batch_size=16, epochs=1, verbose=0)
    for old, variable in zip(before, small.trainable_variables, strict=True):
        assert not np.array_equal(old, variable.numpy()), variable.path

    sim = QuantizationSimModel(small)
    sim.compute_encodings(lambda model: model.predict(pictures(48, seed=2), verbose=0))
    sim.export(tmp_path, "small", qdq=True)
    expected = np.asarray(small(x, training=False))
    # Float sums of up to 180 products, in another order, layer after layer.
    bound = 1e-4 * np.ptp(expected)
    np.testing.assert_allclose(run(tmp_path / "small.onnx", x), expected, rtol=0, atol=bound)
    again = keras.models.load_model(tmp_path / "small.keras", compile=False)
    np.testing.assert_allclose(np.asarray(again(x)), expected, rtol=0, atol=bound)
    costs = halfstep.ModelCompressor(halfstep.Model.load(tmp_path / "small.onnx")).costs
    assert sum(cost.macs for cost in costs) == stats.engine.macs[1]

    simulated = np.asarray(sim.model(x))
    noise = np.square(simulated - expected).mean() / np.square(expected).mean()
    # Five layers of 8 bits: each value off by a 600th of its range.
    assert 0 < noise < 0.01
    step = np.ptp(simulated) / 255
    off = np.abs(run(tmp_path / "small.qdq.onnx", x) - simulated)
    # Float sums in another order move values over a border now and then, which later layers see.
    assert np.mean(off > 2 * step) < 0.02
