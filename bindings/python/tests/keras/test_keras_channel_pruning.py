# SPDX-License-Identifier: Apache-2.0
# Channel pruning of Keras models: the engine's function, AIMET's names, ordinary layers.
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest

import halfstep
from halfstep.keras import (
    AutomaticSelectionParameters,
    ChannelPruningParameters,
    CompressionScheme,
    CostMetric,
    GreedySelectionParameters,
    ModelCompressor,
    ModuleCompRatioPair,
    QuantizationSimModel,
    SpatialSvdParameters,
)
from halfstep.keras._network import Network

layers = keras.layers


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((count, 4, 4, 3), np.float32).repeat(4, 1).repeat(4, 2)
    return base + 0.1 * rng.standard_normal((count, 16, 16, 3), np.float32)


def build():
    """Coupled residual blocks, depthwise, separable, grouped and transposed layers, PReLU."""
    keras.utils.set_random_seed(0)
    x = start = keras.Input((16, 16, 3), name="image")
    x = layers.Conv2D(12, 3, padding="same", activation="relu", name="stem")(x)
    y = layers.Conv2D(10, 3, padding="same", use_bias=False, name="conv1")(x)
    y = layers.ReLU()(layers.BatchNormalization(name="norm1")(y))
    y = layers.Conv2D(12, 3, padding="same", name="conv2")(y)
    x = layers.Activation("relu")(layers.Add()([x, y]))
    x = layers.Conv2D(16, 3, strides=2, padding="same", name="conv3")(x)
    x = layers.PReLU(shared_axes=[1, 2], name="slope")(x)
    x = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name="depthwise")(x)
    x = layers.Conv2D(24, 3, padding="same", groups=4, activation="relu", name="grouped")(x)
    y = layers.SeparableConv2D(8, 3, padding="same", name="separable")(x)
    x = layers.Concatenate()([x, y])
    x = layers.Conv2DTranspose(10, 2, strides=2, activation="relu", name="up")(x)
    x = layers.Flatten()(layers.MaxPooling2D(4)(x))
    x = layers.Dense(20, use_bias=False, activation="relu", name="fc1")(x)
    model = keras.Model(start, layers.Dense(5, name="fc2")(x))
    model.get_layer("norm1").set_weights(
        [np.linspace(0.5, 1.5, 10), np.linspace(-0.2, 0.2, 10), np.zeros(10), np.ones(10)]
    )
    rng = np.random.default_rng(3)
    slope = model.get_layer("slope")
    slope.set_weights([rng.uniform(0.1, 0.4, slope.weights[0].shape)])
    return model


@pytest.fixture
def net():
    return build()


def manual(ratios, samples=320, importance="reconstruction", **settings):
    kind = ChannelPruningParameters
    params = kind.ManualModeParams([ModuleCompRatioPair(m, r) for m, r in ratios.items()])
    data = [pictures(32, seed=2)]
    return kind(data, samples, False, kind.Mode.manual, params, importance=importance, **settings)


def automatic(choice, ignore=(), samples=320, **settings):
    kind = ChannelPruningParameters
    params = kind.AutoModeParams(choice, list(ignore))
    return kind([pictures(32, seed=2)], samples, True, kind.Mode.auto, params, **settings)


def compress(model, parameters, evaluate=lambda *_: 0.5, **settings):
    return ModelCompressor.compress_model(
        model,
        evaluate,
        1,
        None,
        settings.pop("scheme", CompressionScheme.channel_pruning),
        CostMetric.mac,
        parameters,
        **settings,
    )


@pytest.mark.parametrize("target", [0.8, 0.5])
def test_model_computes_what_the_engine_computes(net, target, tmp_path):
    choice = AutomaticSelectionParameters(target)
    small, stats = compress(net, automatic(choice), report=tmp_path / "report.html")
    assert float(stats.mac_compression_ratio) <= target
    network = Network(net)
    compressor = halfstep.ModelCompressor(
        network.bound(), "channel_pruning", data={network.inputs[0]: pictures(32, seed=2)}
    )
    kept = {layer.weight: layer.rank for layer in stats.engine.layers if layer.rank}
    smaller, other = compressor.compress(
        ranks={unit.weight: kept[unit.weight] for unit in compressor.layers if unit.weight in kept}
    )
    x = pictures(8, seed=3)
    expected = next(iter(smaller.run(x).values()))
    # Sums in another order, layer after layer.
    bound = 1e-4 * np.ptp(expected)
    np.testing.assert_allclose(np.asarray(small(x)), expected, rtol=0, atol=bound)
    assert (other.macs, other.parameters) == (stats.engine.macs, stats.engine.parameters)
    assert [layer.name for layer in small.layers] == [layer.name for layer in net.layers]
    assert small.count_params() < net.count_params()
    assert (tmp_path / "report.html").read_text().count("<svg") >= len(stats.per_layer_stats)


def test_layers_know_their_numbers_and_coupled_ones_lose_the_same(net):
    small, stats = compress(net, manual({"conv1": 0.5, "conv2": 0.5, "fc2": 0.5, "grouped": 0.5}))
    get = small.get_layer
    # The first convolution reads what the second one and the stem write.
    assert get("stem").filters == get("conv2").filters == 6
    assert get("conv1").filters == 5 == get("norm1").gamma.shape[0]
    assert get("fc1").units == 10 and get("fc1").use_bias in (True, False)
    assert get("conv3").filters == 8 and get("depthwise").kernel.shape[-2:] == (8, 2)
    assert get("grouped").groups == 4 and get("grouped").kernel.shape[-2] == 4
    assert {s.name: s.compression_ratio for s in stats.per_layer_stats} == {
        "conv1": 0.5,
        "conv2": 0.5,
        "grouped": 0.5,
        "fc2": 0.5,
    }
    # A layer that reads two units gives its ratio to both.
    small, _ = compress(net, manual({"up": 0.5}))
    assert small.get_layer("grouped").filters == 12 and small.get_layer("separable").filters == 4
    assert np.isfinite(np.asarray(small(pictures(2)))).all()


def test_ratio_one_is_the_identity_and_zeroed_channels_go_without_a_trace(net):
    x = pictures(4)
    before = np.asarray(net(x))
    same, stats = compress(net, manual({"conv2": 1.0}))
    np.testing.assert_array_equal(np.asarray(same(x)), before)
    assert stats.mac_compression_ratio == "1.000000"
    for name in ("conv2", "fc2"):
        layer = net.get_layer(name)
        weights = layer.get_weights()
        weights[0][..., 1::2, :] = 0
        layer.set_weights(weights)
    before = np.asarray(net(x))
    small, _ = compress(net, manual({"conv2": 0.5, "fc2": 0.5}, samples=0, importance="magnitude"))
    # Sums over fewer terms, in another order.
    bound = 1e-5 * np.ptp(before)
    np.testing.assert_allclose(np.asarray(small(x)), before, rtol=0, atol=bound)
    assert small.get_layer("conv1").filters == 5


def test_greedy_choice_in_threads_is_that_of_one(net):
    x = pictures(8, seed=5)
    wanted = np.asarray(net(x))

    def score(model, iterations, use_cuda):
        return -float(np.square(np.asarray(model(x)) - wanted).mean())

    def run(**settings):
        choice = GreedySelectionParameters(0.8, 3)
        return compress(net, automatic(choice, ["conv1"], multiplicity=2), score, **settings)

    small, stats = run()
    scores = stats.compression_ratio_selection_stats.eval_scores_dictionary
    assert {"conv2", "grouped", "fc2"} <= set(scores) and "conv1" not in scores
    # What the ignored layer reads stays.
    assert small.get_layer("stem").filters == 12
    with ThreadPoolExecutor(2) as pool:
        _, other = run(executor=pool)
    assert other.compression_ratio_selection_stats.eval_scores_dictionary == scores
    assert other.mac_compression_ratio == stats.mac_compression_ratio


def test_trainer_and_what_comes_after(net):
    seen = []

    class Trainer:
        def train_model(self, model, layer, train_flag=True):
            if train_flag:
                seen.append(layer.name)
                assert layer.module is model.get_layer(layer.name)

    small, _ = compress(net, manual({"fc2": 0.5, "conv2": 0.5}), trainer=Trainer())
    assert seen == ["conv2", "fc2"]
    small.compile("adam", "mse")
    x = pictures(32, seed=4)
    history = small.fit(x, np.ones((32, 5)), epochs=6, verbose=0).history["loss"]
    assert history[-1] < history[0]
    sim = QuantizationSimModel(small)
    sim.compute_encodings(lambda model: model(x))
    noise = np.asarray(sim.model(x)) - np.asarray(small(x))
    assert np.square(noise).mean() < 0.05 * np.square(np.asarray(small(x))).mean()


def test_what_a_model_fixes_stays_and_the_rest_is_pruned():
    keras.utils.set_random_seed(1)
    x = start = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="a")(x)
    x = layers.Conv2D(12, 3, padding="same", activation="relu", name="b")(x)
    x = layers.Reshape((64, 12))(x)
    x = layers.Reshape((8, 8, 12))(x)
    x = layers.Conv2D(6, 3, name="c")(x)
    model = keras.Model(start, layers.Dense(4, name="fc")(layers.Flatten()(x)))
    data = np.random.default_rng(0).standard_normal((32, 8, 8, 3), np.float32)
    small, stats = compress(model, automatic(AutomaticSelectionParameters(0.6)), data=data)
    assert float(stats.mac_compression_ratio) <= 0.6
    assert small.get_layer("b").filters == 12 and small.get_layer("a").filters < 8
    assert "program" in stats.engine.refusals["c/kernel"]
    with pytest.raises(halfstep.UnsupportedOperatorError, match="program"):
        compress(model, manual({"c": 0.5}), data=data)


def test_errors_name_what_is_wrong(net):
    def fails(error, match, parameters, **settings):
        with pytest.raises(error, match=match):
            compress(net, parameters, **settings)

    fails(NotImplementedError, "stem.*stay", manual({"stem": 0.5}))
    fails(NotImplementedError, "groups", manual({"depthwise": 0.5}))
    fails(NotImplementedError, "norm1", manual({"norm1": 0.5}))
    fails(ValueError, "one ratio", manual({"conv1": 0.5, "conv3": 0.75}))
    fails(ValueError, "calibration data", manual({"fc2": 0.5}, samples=0))
    fails(KeyError, "no layer", manual({"nothing": 0.5}))
    spatial = SpatialSvdParameters
    fails(ValueError, "channel", spatial(spatial.Mode.manual, spatial.ManualModeParams([])))
