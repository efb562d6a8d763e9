# SPDX-License-Identifier: Apache-2.0
# Compression of Keras models: the engine's function, ordinary layers, every choice of ratios.
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest

import halfstep
from halfstep.keras import (
    AutomaticSelectionParameters,
    CompressionScheme,
    CostMetric,
    GreedySelectionParameters,
    ModelCompressor,
    ModuleCompRatioPair,
    QuantizationSimModel,
    RankSelectScheme,
    SpatialSvdParameters,
    WeightSvdParameters,
)
from halfstep.keras._network import Network

layers = keras.layers
KINDS = [SpatialSvdParameters, WeightSvdParameters]


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((count, 4, 4, 3), np.float32).repeat(4, 1).repeat(4, 2)
    return base + 0.1 * rng.standard_normal((count, 16, 16, 3), np.float32)


@pytest.fixture
def net():
    keras.utils.set_random_seed(0)
    x = start = keras.Input((16, 16, 3), name="image")
    x = layers.Conv2D(12, 3, strides=2, padding="same", use_bias=False, name="conv1")(x)
    x = layers.ReLU()(layers.BatchNormalization(name="norm1")(x))
    x = layers.Conv2D(16, (3, 5), activation="relu", name="conv2")(x)
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    twice = layers.Conv2D(16, 3, padding="same", activation="relu", name="twice")
    y = layers.Add()([twice(x), x])
    x = twice(y)
    x = layers.Conv2D(20, 3, dilation_rate=2, padding="same", activation="relu", name="conv3")(x)
    x = layers.Flatten()(x)
    x = layers.Dense(40, activation="relu", name="fc1")(x)
    model = keras.Model(start, layers.Dense(10, use_bias=False, name="fc2")(x))
    model.get_layer("norm1").set_weights(
        [np.linspace(0.5, 1.5, 12), np.linspace(-0.2, 0.2, 12), np.zeros(12), np.ones(12)]
    )
    return model


def manual(kind, ratios, **settings):
    pairs = [ModuleCompRatioPair(module, ratio) for module, ratio in ratios.items()]
    return kind(kind.Mode.manual, kind.ManualModeParams(pairs), **settings)


def automatic(kind, choice, ignore=(), **settings):
    if kind is WeightSvdParameters:
        params = kind.AutoModeParams(RankSelectScheme.greedy, choice, list(ignore))
    else:
        params = kind.AutoModeParams(choice, list(ignore))
    return kind(kind.Mode.auto, params, **settings)


def compress(model, parameters, evaluate=lambda *_: 0.5, **settings):
    scheme = "weight_svd" if isinstance(parameters, WeightSvdParameters) else "spatial_svd"
    return ModelCompressor.compress_model(
        model, evaluate, 1, None, CompressionScheme[scheme], CostMetric.mac, parameters, **settings
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", [None, pictures(32, seed=2)])
def test_model_computes_what_the_engine_computes(net, kind, data, tmp_path):
    parameters = automatic(kind, AutomaticSelectionParameters(0.7))
    small, stats = compress(net, parameters, data=data, report=tmp_path / "report.html")
    assert float(stats.mac_compression_ratio) < 0.72
    scheme = "spatial_svd" if kind is SpatialSvdParameters else "weight_svd"
    network = Network(net)
    compressor = halfstep.ModelCompressor(
        network.bound(),
        scheme,
        data=None if data is None else {network.inputs[0]: data},
        layers_to_ignore=["twice/kernel"],
    )
    ranks = {layer.weight: layer.rank for layer in stats.engine.layers if layer.rank}
    x = pictures(8, seed=3)
    expected = next(iter(compressor.compress(ranks=ranks)[0].run(x).values()))
    actual = np.asarray(small(x))
    # Sums in another order, layer after layer.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.ptp(expected))
    names = [layer.name for layer in small.layers]
    split = [layer.name for layer in stats.engine.layers if layer.rank]
    assert split and all(f"{n}_0" in names and f"{n}_1" in names for n in split)
    assert "twice" in names and "twice/kernel" in "".join(stats.engine.refusals)
    assert (tmp_path / "report.html").read_text().count("<svg") >= len(split)


def test_manual_ratios_multiplicity_and_identity(net):
    same, stats = compress(net, manual(SpatialSvdParameters, {"conv1": 1.0}))
    x = pictures(4)
    np.testing.assert_array_equal(np.asarray(same(x)), np.asarray(net(x)))
    assert stats.mac_compression_ratio == "1.000000"
    layer = net.get_layer("conv2")
    small, stats = compress(net, manual(SpatialSvdParameters, {layer: 0.5}, multiplicity=4))
    first, second = small.get_layer("conv2_0"), small.get_layer("conv2_1")
    assert first.kernel_size == (3, 1) and second.kernel_size == (1, 5)
    assert first.filters % 4 == 0 and not first.use_bias and second.use_bias
    assert first.activation is keras.activations.linear
    assert second.activation is keras.activations.relu
    assert [(s.name, s.compression_ratio) for s in stats.per_layer_stats] == [("conv2", 0.5)]


def test_greedy_choice_in_threads_is_that_of_one(net, tmp_path):
    x = pictures(8, seed=5)
    wanted = np.asarray(net(x))

    def score(model, iterations, use_cuda):
        return -float(np.square(np.asarray(model(x)) - wanted).mean())

    path = tmp_path / "scores.json"
    choice = GreedySelectionParameters(0.8, 3, saved_eval_scores_dict=path)
    _, stats = compress(net, automatic(WeightSvdParameters, choice, ["fc2"]), score)
    scores = stats.compression_ratio_selection_stats.eval_scores_dictionary
    assert set(scores) == {"conv1", "conv2", "conv3", "fc1"} and path.exists()
    choice = GreedySelectionParameters(0.8, 3)
    with ThreadPoolExecutor(2) as pool:
        _, other = compress(
            net, automatic(WeightSvdParameters, choice, ["fc2"]), score, executor=pool
        )
    assert other.compression_ratio_selection_stats.eval_scores_dictionary == scores
    assert other.mac_compression_ratio == stats.mac_compression_ratio


def test_trainer_and_what_comes_after(net):
    seen = []

    class Trainer:
        def train_model(self, model, layer, train_flag=True):
            if train_flag:
                seen.append(layer.name)
                assert all(part in model.layers for part in layer.module)

    parameters = manual(SpatialSvdParameters, {"conv3": 0.5, "conv1": 0.5})
    small, _ = compress(net, parameters, trainer=Trainer(), data=pictures(24))
    assert seen == ["conv1", "conv3"]
    small.compile("sgd", "mse")
    before = [np.copy(w.numpy()) for w in small.trainable_weights]
    small.fit(pictures(16), np.ones((16, 10)), epochs=1, verbose=0)
    changed = [
        not np.array_equal(a, b) for a, b in zip(before, small.trainable_weights, strict=True)
    ]
    assert all(changed)
    sim = QuantizationSimModel(small)
    x = pictures(16)
    sim.compute_encodings(lambda model: model.predict(x, verbose=0))
    a, b = np.asarray(sim.model(x)), np.asarray(small(x))
    assert np.square(a - b).mean() < 0.05 * np.square(b).mean()


def test_errors_name_what_is_wrong(net):
    spatial = SpatialSvdParameters
    with pytest.raises(NotImplementedError, match="called 2 times"):
        compress(net, manual(spatial, {"twice": 0.5}))
    with pytest.raises(NotImplementedError, match="depthwise"):
        compress(net, manual(spatial, {"depthwise": 0.5}))
    with pytest.raises(NotImplementedError, match="norm1"):
        compress(net, manual(spatial, {"norm1": 0.5}))
    with pytest.raises(KeyError, match="nothing"):
        compress(net, manual(spatial, {"nothing": 0.5}))
    with pytest.raises(ValueError, match="at best"):
        compress(net, automatic(spatial, AutomaticSelectionParameters(0.001)))
    with pytest.raises(ValueError, match="compress_scheme"):
        ModelCompressor.compress_model(net, None, 1, None, "magic", "mac", None)
