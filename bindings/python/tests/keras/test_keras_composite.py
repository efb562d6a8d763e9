# SPDX-License-Identifier: Apache-2.0
# Layers of several operators, recurrent ones too: the engine's quantizers inside, its numbers.
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from networks import error_of_range

from halfstep.errors import UnsupportedOperatorError
from halfstep.keras import QuantizationSimModel
from halfstep.keras._network import Network

PICTURE, TOKENS, SIGNAL = (8, 8, 4), (6, 8), (9, 5)


def twice(layer):
    return lambda x: layer([x, layers.Dense(x.shape[-1], name="other")(x)])


def three(layer):
    return lambda x: layer([x, layers.Dense(x.shape[-1])(x), layers.Dense(x.shape[-1])(x)])


COMPOSITE = {
    "separable": (PICTURE, lambda: layers.SeparableConv2D(6, 3, padding="same", activation="relu")),
    "separable1d": (SIGNAL, lambda: layers.SeparableConv1D(6, 3, depth_multiplier=2)),
    "attention": (TOKENS, lambda: lambda x: layers.MultiHeadAttention(2, 4, name="layer")(x, x)),
    "cross attention": (
        TOKENS,
        lambda: (
            lambda x: layers.MultiHeadAttention(2, 4, 3, use_bias=False, name="layer")(
                x, layers.Dense(8)(x), key=layers.Dense(8)(x)
            )
        ),
    ),
    "average": (PICTURE, lambda: twice(layers.Average())),
    "sum of three": (PICTURE, lambda: three(layers.Add())),
    "largest of three": (PICTURE, lambda: three(layers.Maximum())),
    "rescaling": (PICTURE, lambda: layers.Rescaling(0.5, 1.5)),
    "normalization": (
        PICTURE,
        lambda: layers.Normalization(mean=[1, 2, 3, 4], variance=[1, 2, 3, 4]),
    ),
    "leaky": (PICTURE, lambda: layers.ReLU(0.5, negative_slope=0.1)),
    "log sigmoid": (PICTURE, lambda: layers.Conv2D(6, 3, activation="log_sigmoid")),
    "tanh shrink": (PICTURE, lambda: layers.Activation("tanh_shrink")),
    "square plus": (PICTURE, lambda: layers.Activation("squareplus")),
    "sparse plus": (PICTURE, lambda: layers.Conv2D(6, 3, activation="sparse_plus")),
}
RECURRENT = {
    "rnn": lambda: layers.SimpleRNN(4),
    "rnn relu": lambda: layers.SimpleRNN(4, activation="relu", use_bias=False),
    "lstm": lambda: layers.LSTM(4),
    "lstm sequences": lambda: layers.LSTM(4, return_sequences=True),
    "lstm backwards": lambda: layers.LSTM(4, return_sequences=True, go_backwards=True),
    "lstm hard": lambda: layers.LSTM(4, recurrent_activation="hard_sigmoid", activation="linear"),
    "gru": lambda: layers.GRU(4),
    "gru sequences": lambda: layers.GRU(4, return_sequences=True, go_backwards=True),
    "gru before": lambda: layers.GRU(4, reset_after=False, use_bias=False),
    "bidirectional": lambda: layers.Bidirectional(layers.LSTM(4, return_sequences=True)),
    "bidirectional state": lambda: layers.Bidirectional(layers.GRU(4), merge_mode="ave"),
    "bidirectional sum": lambda: layers.Bidirectional(layers.SimpleRNN(4), merge_mode="sum"),
    "bidirectional product": lambda: layers.Bidirectional(
        layers.LSTM(4, return_sequences=True), merge_mode="mul"
    ),
}
ALL = {**COMPOSITE, **{name: (SIGNAL, make) for name, make in RECURRENT.items()}}


def network(name: str) -> tuple[keras.Model, np.ndarray]:
    """Return a network with a composite layer between two dense ones, and data."""
    shape, make = ALL[name]
    source = keras.Input(shape, name="source")
    x = make()(layers.Dense(shape[-1], name="before")(source))
    x = layers.Flatten()(x) if len(x.shape) > 2 else x
    model = keras.Model(source, layers.Dense(3, name="after")(x))
    random = np.random.default_rng(0)
    for variable in model.weights:
        if variable.dtype == "float32" and "normalization" not in variable.path:
            variable.assign(random.normal(0, 0.5, variable.shape))
    return model, random.normal(0, 1, (6, *shape)).astype(np.float32)


@pytest.mark.parametrize("name", RECURRENT)
def test_the_engine_computes_what_keras_computes(name):
    model, batch = network(name)
    engine = Network(model)
    result = engine.bound().run({engine.inputs[0]: batch})[engine.outputs[0]]
    # Float32 sums of at most ten terms over nine steps.
    assert error_of_range(result, model(batch).numpy()) < 1e-5


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bits", [8, 4])
def test_simulations_quantize_inside_as_the_engine_does(name, bits, tmp_path):
    model, batch = network(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stay unquantized")
        sim = QuantizationSimModel(model, default_param_bw=bits)
    sim.compute_encodings(batch)
    engine = sim.engine()
    sites = {one.tensor for one in engine.quantizers if one.is_enabled}
    assert sites == {key for key, one in sim.quantizers.items() if one.enabled}
    output = sim._network.outputs[0]
    expected = engine.run(batch)[output]
    actual = sim.model(batch, training=False).numpy()
    # Sums before a rounding differ in their last bits: a value on a border may fall either way, and
    # one step inside is less than one behind it.
    assert np.abs(actual - expected).max() <= 1.001 * sim.quantizer(output).grid()[0]
    # A wrong or missing quantizer would show in most values.
    assert (np.abs(actual - expected) > 1e-6).mean() < 0.2
    sim.model.save(tmp_path / "sim.keras")
    loaded = keras.models.load_model(tmp_path / "sim.keras")
    assert np.array_equal(loaded(batch, training=False).numpy(), actual)
    assert np.array_equal(tf.function(sim.model)(batch, training=False).numpy(), actual)


@pytest.mark.parametrize("name", ["attention", "separable", "lstm sequences", "bidirectional"])
def test_composite_layers_train_with_their_quantizers(name):
    model, batch = network(name)
    sim = QuantizationSimModel(model, default_param_bw=4)
    sim.compute_encodings(batch)
    sim.learn_ranges()
    before = {key: one.grid()[0].copy() for key, one in sim.quantizers.items()}
    weights = [variable.numpy() for variable in sim.model.trainable_variables]
    targets = model(batch).numpy()
    sim.model.compile(keras.optimizers.Adam(2e-3), "mse")
    first = sim.model.evaluate(batch, targets, verbose=0)
    sim.model.fit(batch, targets, epochs=20, verbose=0)
    assert sim.model.evaluate(batch, targets, verbose=0) < first
    after = [variable.numpy() for variable in sim.model.trainable_variables]
    assert sum(not np.array_equal(a, b) for a, b in zip(weights, after, strict=True)) > 4
    moved = [key for key, one in sim.quantizers.items() if (one.grid()[0] != before[key]).any()]
    assert any("/" in key and not key.endswith(("kernel", "bias")) for key in moved) or (
        "lstm" in name
    )


def test_states_go_from_layer_to_layer():
    source, target = keras.Input((5, 3), name="source"), keras.Input((4, 2), name="target")
    _, hidden, cell = layers.LSTM(6, return_state=True, name="encoder")(source)
    decoder = layers.LSTM(6, return_sequences=True, name="decoder")
    x = decoder(target, initial_state=[hidden, cell])
    model = keras.Model([source, target], layers.Dense(2, name="head")(x))
    random = np.random.default_rng(0)
    given = [random.normal(0, 1, (3, 5, 3)), random.normal(0, 1, (3, 4, 2))]
    given = [one.astype(np.float32) for one in given]
    engine = Network(model)
    feeds = dict(zip(engine.inputs, given, strict=True))
    result = engine.bound().run(feeds)[engine.outputs[0]]
    assert error_of_range(result, model(given).numpy()) < 1e-5
    sim = QuantizationSimModel(model)
    sim.compute_encodings([given])
    expected = sim.engine().run(feeds)[engine.outputs[0]]
    step = sim.quantizer(engine.outputs[0]).grid()[0]
    assert np.abs(sim.model(given).numpy() - expected).max() <= 1.001 * step


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: layers.LSTM(4, stateful=True, name="odd"), "stateful"),
        (lambda: layers.GRU(4, activation="gelu", name="odd"), "activation 'gelu'"),
        (lambda: layers.RNN(layers.LSTMCell(4), name="odd"), "no such layer"),
        (
            lambda: layers.Bidirectional(layers.RNN(layers.LSTMCell(4)), name="odd"),
            "recurrence of RNN",
        ),
    ],
)
def test_errors_name_the_recurrent_layer(make, what):
    source = keras.Input(batch_shape=(2, 5, 3))
    with pytest.raises(UnsupportedOperatorError, match=f"layer 'odd'.*{what}"):
        Network(keras.Model(source, make()(source)))
