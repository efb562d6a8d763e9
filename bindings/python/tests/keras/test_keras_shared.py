# SPDX-License-Identifier: Apache-2.0
# Layers that are called several times: quantizers for the tensors of each call, one set of weights.
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from networks import error_of_range

from halfstep.keras import QuantizationSimModel, equalize_model
from halfstep.keras._network import Network

PICTURE, TOKENS = (8, 8, 4), (6, 8)


def attention(layer):
    return lambda x: layer(x, x)


def with_itself(layer):
    return lambda x: layer([x, x])


#: Input shape and what makes a call of a layer whose output has its input's shape.
SHARED = {
    "dense": (TOKENS, lambda: layers.Dense(8, activation="relu", name="layer")),
    "dense silu": (TOKENS, lambda: layers.Dense(8, activation="silu", name="layer")),
    "conv": (PICTURE, lambda: layers.Conv2D(4, 3, padding="same", activation="tanh", name="layer")),
    "separable": (PICTURE, lambda: layers.SeparableConv2D(4, 3, padding="same", name="layer")),
    "attention": (TOKENS, lambda: attention(layers.MultiHeadAttention(2, 4, name="layer"))),
    "average": (PICTURE, lambda: with_itself(layers.Average(name="layer"))),
    "rescaling": (PICTURE, lambda: layers.Rescaling(0.5, 1.5, name="layer")),
    "normalization": (
        PICTURE,
        lambda: layers.Normalization(mean=[1, 2, 3, 4], variance=[1, 2, 3, 4], name="layer"),
    ),
    "leaky": (PICTURE, lambda: layers.ReLU(0.5, negative_slope=0.1, name="layer")),
    "tanh shrink": (PICTURE, lambda: layers.Activation("tanh_shrink", name="layer")),
    "rnn": (TOKENS, lambda: layers.SimpleRNN(8, return_sequences=True, name="layer")),
    "lstm": (TOKENS, lambda: layers.LSTM(8, return_sequences=True, name="layer")),
    "gru": (TOKENS, lambda: layers.GRU(8, return_sequences=True, name="layer")),
    "bidirectional": (
        TOKENS,
        lambda: layers.Bidirectional(
            layers.LSTM(8, return_sequences=True), merge_mode="ave", name="layer"
        ),
    ),
    "nested": (
        TOKENS,
        lambda: keras.Sequential(
            [keras.Input(TOKENS), layers.Dense(8, activation="gelu"), layers.Rescaling(0.5, 1.0)],
            name="layer",
        ),
    ),
}


def network(name: str) -> tuple[keras.Model, np.ndarray]:
    """Return a network that calls one layer three times, and data."""
    keras.utils.set_random_seed(0)
    shape, make = SHARED[name]
    called = make()
    source = keras.Input(shape, name="source")
    x = layers.Dense(shape[-1], name="before")(source)
    y = called(called(x))
    z = called(layers.Dense(shape[-1], name="between")(y))
    x = layers.Flatten()(layers.Add(name="sum")([y, z]))
    model = keras.Model(source, layers.Dense(3, name="after")(x))
    random = np.random.default_rng(0)
    for variable in model.weights:
        if variable.dtype == "float32" and "normalization" not in variable.path:
            variable.assign(random.normal(0, 0.4, variable.shape))
    return model, random.normal(0, 1, (6, *shape)).astype(np.float32)


@pytest.mark.parametrize("name", SHARED)
def test_each_call_is_quantized_as_the_engine_does(name, tmp_path):
    model, batch = network(name)
    engine = Network(model)
    output = engine.outputs[0]
    result = engine.bound().run({engine.inputs[0]: batch})[output]
    # Float32 sums of at most 256 terms, one after the other.
    assert error_of_range(result, model(batch).numpy()) < 1e-5

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stay unquantized")
        sim = QuantizationSimModel(model)
    sim.compute_encodings(batch)
    sites = {one.tensor for one in sim.engine().quantizers if one.is_enabled}
    assert sites == {key for key, one in sim.quantizers.items() if one.enabled}
    expected = sim.engine().run(batch)[output]
    actual = sim.model(batch, training=False).numpy()
    # A value on a border may fall either way inside, and what follows sees that.
    step = sim.quantizer(output).grid()[0]
    assert np.abs(actual - expected).max() <= 2.001 * step
    # A wrong or missing quantizer would show in most values.
    assert (np.abs(actual - expected) > 1e-6).mean() < 0.25
    assert len(sim.model.trainable_variables) == len(model.trainable_variables)
    sim.model.save(tmp_path / "sim.keras")
    loaded = keras.models.load_model(tmp_path / "sim.keras")
    assert np.array_equal(loaded(batch, training=False).numpy(), actual)
    assert np.array_equal(tf.function(sim.model)(batch, training=False).numpy(), actual)


@pytest.mark.parametrize("name", ["attention", "separable", "bidirectional"])
def test_shared_layers_train(name):
    model, batch = network(name)
    sim = QuantizationSimModel(model, default_param_bw=4)
    sim.compute_encodings(batch)
    sim.learn_ranges()
    targets = model(batch).numpy()
    sim.model.compile(keras.optimizers.Adam(2e-3), "mse")
    first = sim.model.evaluate(batch, targets, verbose=0)
    sim.model.fit(batch, targets, epochs=15, verbose=0)
    assert sim.model.evaluate(batch, targets, verbose=0) < first
    # Ranges of the same tensor in different calls went their own ways.
    inside = [key for key in sim.quantizers if key.startswith("layer:1/")]
    assert inside
    for key in inside:
        other = sim.quantizer(key.replace("layer:1/", "layer/"))
        assert other is not sim.quantizer(key)


@pytest.mark.parametrize("name", ["conv", "separable", "lstm"])
@pytest.mark.parametrize("in_place", [False, True])
def test_equalization_keeps_the_function(name, in_place):
    model, batch = network(name)
    expected = model(batch).numpy()
    result = equalize_model(model, in_place=in_place)(batch).numpy()
    assert error_of_range(result, expected) < 1e-5
