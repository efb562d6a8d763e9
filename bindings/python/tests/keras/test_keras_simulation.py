# SPDX-License-Identifier: Apache-2.0
# Simulated Keras models: equal to the engine's simulation, trained, saved, exported.
import json

import keras
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf
from networks import randomized, small

import halfstep
from halfstep.errors import (
    EmptyStatisticsError,
    InvalidArgumentError,
    InvalidStateError,
    UnknownNameError,
)
from halfstep.keras import QuantizationSimModel, Quantizer, fold_all_batch_norms
from halfstep.keras.quantizer import fake_quantize


def pictures(count: int = 8) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 1, (count, 16, 16, 3)).astype(np.float32)


def calibrated(**options) -> tuple[QuantizationSimModel, np.ndarray]:
    model, _ = fold_all_batch_norms(small())
    sim = QuantizationSimModel(model, **options)
    batch = pictures()
    sim.compute_encodings(batch)
    return sim, batch


def steps_from_engine(sim: QuantizationSimModel, batch: np.ndarray) -> float:
    """Return the largest difference from the engine's simulation in steps of the output's grid."""
    name = sim._network.outputs[0]
    expected = sim.engine().run(batch)[name]
    actual = sim.model(batch, training=False).numpy()
    return float(np.abs(actual - expected).max() / sim.quantizer(name).grid()[0])


@pytest.mark.parametrize(
    ("signed", "symmetric", "strict"), [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)]
)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_fake_quantization_gives_the_engines_bits(bits, signed, symmetric, strict):
    random = np.random.default_rng(bits)
    shape = (1, 5, 1)
    quantizer = Quantizer("x", bits, signed, symmetric, strict, shape)
    quantizer.set_range(-random.uniform(0, 2, shape), random.uniform(0, 2, shape))
    values = random.normal(0, 1.5, (4, 5, 6)).astype(np.float32)
    values[0, 0, :5] = np.nan, np.inf, -np.inf, -0.0, 0.0
    scales, zeros = quantizer.grid()
    expected = halfstep.fake_quantize(
        values, scales.reshape(-1), zeros.reshape(-1), bits, bool(signed), 1, strict=bool(strict)
    )
    for run in (quantizer, tf.function(quantizer)):
        actual = run(values).numpy()
        assert actual.tobytes() == expected.tobytes()


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_are_those_worked_out_in_float64(symmetric):
    # 4-bit grid over [-1, 2]: s = 3/15, z = 5 (asymmetric). By hand, with the roundings of codes
    # and zero point passed straight through: inside, dy/dx = 1, dy/ds = round(x/s) - x/s;
    # outside, dy/ds = low or high end relative to z, and dy/dz = -s. Then s = (b - a) / 15 and
    # z = -a / s: ds/da = -1/15, ds/db = 1/15, dz/da = -1/s - a/(15 s^2), dz/db = a / (15 s^2).
    a, b, lowest, highest = (-1.0, 2.0, 0, 15) if not symmetric else (-1.6, 1.4, -8, 7)
    x = np.array([-1.83, -0.93, -0.31, 0.0, 0.47, 1.31, 1.92, 2.6], np.float32)
    up = np.array([0.3, -1.0, 2.0, 0.7, -0.4, 1.1, 0.9, -0.6], np.float32)
    s = (b - a) / 15
    z = 0.0 if symmetric else round(-a / s) + lowest
    q = x.astype(np.float64) / s
    code = np.rint(q)
    below, above = code < lowest - z, code > highest - z
    inside = ~(below | above)
    by_s = np.where(inside, code - q, np.where(below, lowest - z, highest - z)) @ up.astype(float)
    by_z = 0.0 if symmetric else -s * float(up[~inside].sum(dtype=float))
    expected = (
        np.where(inside, up, 0),
        -by_s / 15 + by_z * (-1 / s - a / (15 * s * s)),
        by_s / 15 + by_z * a / (15 * s * s),
    )
    ends = tf.Variable(a, dtype=tf.float32), tf.Variable(b, dtype=tf.float32)
    source = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(source)
        result = fake_quantize(source, *ends, 4, lowest, highest, symmetric)
        loss = tf.reduce_sum(result * up)
    actual = [one.numpy() for one in tape.gradient(loss, (source, *ends))]
    assert np.array_equal(actual[0], expected[0])
    # x/s in float32 is off by up to 8 * 2^-24 a term, times eight terms and upstreams of some 1.
    np.testing.assert_allclose(actual[1:], expected[1:], rtol=1e-5, atol=1e-5)


def test_gradients_of_a_layer_are_those_worked_out_in_float64():
    # y = q(x) q(W) + b with 4-bit weights; some of x lies beyond the range that was calibrated.
    # dL/dW = q(x)^T u where W is on its grid, dL/dx = u q(W)^T where x is, dL/db = sum of u.
    model = keras.Sequential([keras.Input((6,), name="x"), keras.layers.Dense(5, name="dense")])
    sim = QuantizationSimModel(model, default_param_bw=4)
    random = np.random.default_rng(0)
    x = random.normal(0, 1, (16, 6)).astype(np.float32)
    sim.compute_encodings(x[:4])
    sim.quantizer("dense").enabled = False
    up = random.normal(0, 1, (16, 5)).astype(np.float32)
    layer = sim.model.get_layer("dense").layer
    source = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(source)
        loss = tf.reduce_sum(sim.model(source) * up)
    actual = tape.gradient(loss, [source, layer.kernel.value, layer.bias.value])

    def grid(name, value):
        one = sim.quantizer(name)
        scale, zero = (part.astype(np.float64) for part in one.grid())
        codes = np.rint(value.astype(np.float64) / scale) + zero
        inside = (codes >= one.lowest) & (codes <= one.highest)
        return (np.clip(codes, one.lowest, one.highest) - zero) * scale, inside

    rounded, inside = grid("x", x)
    weight, on_grid = grid("dense/kernel", layer.kernel.numpy())
    assert not inside.all()
    u = up.astype(np.float64)
    expected = (u @ weight.T * inside, rounded.T @ u * on_grid, u.sum(0))
    for got, want in zip(actual, expected, strict=True):
        # Float32 sums of at most 16 products of numbers of some 3.
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"default_param_bw": 4}, {"config_file": "default"}])
def test_simulation_equals_the_engines(options):
    sim, batch = calibrated(**options)
    # Sums before the output's rounding differ in their last bits, which a tie may turn into one
    # step.
    assert steps_from_engine(sim, batch) <= 1.001
    outputs = sim._original(batch).numpy()
    assert np.abs(sim.model(batch).numpy() - outputs).max() > 0


def test_callbacks_and_datasets_give_the_same_grids():
    sim, batch = calibrated()
    expected = {name: one.grid() for name, one in sim.quantizers.items()}
    labels = np.zeros(len(batch))
    for data in (
        lambda model: model.predict(batch, batch_size=3, verbose=0),
        tf.data.Dataset.from_tensor_slices((batch, labels)).batch(3),
        [{"picture": batch[:5]}, {"picture": batch[5:]}],
    ):
        sim.compute_encodings(data)
        for name, one in sim.quantizers.items():
            assert np.array_equal(one.grid(), expected[name])


def test_models_are_saved_and_loaded(tmp_path):
    sim, batch = calibrated()
    expected = sim.model(batch).numpy()
    sim.model.save(tmp_path / "sim.keras")
    loaded = keras.models.load_model(tmp_path / "sim.keras")
    assert np.array_equal(loaded(batch).numpy(), expected)
    assert np.array_equal(tf.function(sim.model)(batch).numpy(), expected)


@pytest.mark.parametrize("learns", [False, True])
def test_training_moves_weights_and_ranges(learns):
    sim, batch = calibrated(default_param_bw=4)
    sim.learn_ranges(learns)
    targets = sim._original(batch).numpy()
    sim.model.compile(keras.optimizers.Adam(1e-3), "mse")
    before = {name: one.grid()[0].copy() for name, one in sim.quantizers.items()}
    first = sim.model.evaluate(batch, targets, verbose=0)
    sim.model.fit(batch, targets, epochs=30, verbose=0)
    assert sim.model.evaluate(batch, targets, verbose=0) < 0.7 * first
    moved = [name for name, one in sim.quantizers.items() if (one.grid()[0] != before[name]).any()]
    assert bool(moved) == learns
    # The engine gets the trained weights and ranges.
    assert steps_from_engine(sim, batch) <= 1.001


def test_export_writes_what_the_names_say(tmp_path):
    sim, batch = calibrated()
    sim.export(tmp_path, "net", qdq=True)
    encodings = json.loads((tmp_path / "net.encodings").read_text())
    names = json.loads((tmp_path / "net.names.json").read_text())
    entries = encodings["activation_encodings"] + encodings["param_encodings"]
    written = {entry["name"] for entry in entries}
    assert written <= names.keys()
    assert names["conv2/kernel"].endswith("conv2/kernel")
    model = halfstep.Model.load(tmp_path / "net.onnx")
    expected = sim._original(batch).numpy()
    loaded = keras.models.load_model(tmp_path / "net.keras")
    assert np.array_equal(loaded(batch).numpy(), expected)
    saved = tf.saved_model.load(tmp_path / "net.saved_model")
    served = saved.serve(batch).numpy()
    width = expected.max() - expected.min()
    # Different code of TensorFlow and of the engine: float32 noise, some 1e-6 of the range.
    assert np.abs(served - expected).max() < 1e-5 * width
    assert np.abs(next(iter(model.run(batch).values())) - expected).max() < 1e-5 * width
    session = onnxruntime.InferenceSession(tmp_path / "net.qdq.onnx")
    (quantized,) = session.run(None, {"picture": batch})
    step = sim.quantizer(sim._network.outputs[0]).grid()[0]
    assert np.abs(quantized - sim.model(batch).numpy()).max() <= 1.001 * step


def test_encodings_are_loaded():
    sim, batch = calibrated()
    encodings = sim.engine().encodings()
    other = QuantizationSimModel(sim._original)
    other.load_encodings(encodings)
    assert np.array_equal(other.model(batch).numpy(), sim.model(batch).numpy())


def test_a_range_that_two_tensors_share_is_one_quantizer():
    sim, _ = calibrated()
    for site in sim.engine().quantizers:
        if site.tensor in sim.quantizers and site.tied_to in sim.quantizers:
            assert sim.quantizer(site.tensor) is sim.quantizer(site.tied_to)


def test_errors_name_the_culprit():
    sim, batch = calibrated()
    with pytest.raises(UnknownNameError, match="'nothing'"):
        sim.quantizer("nothing")
    with pytest.raises(InvalidArgumentError, match="'sum'"):
        sim.quantizer("sum").set_range(1.0, -1.0)
    with pytest.raises(EmptyStatisticsError):
        sim.compute_encodings([])
    with pytest.raises(InvalidStateError, match=r"tf\.function"):
        sim.compute_encodings(lambda model: tf.function(model)(batch))
    # Whatever failed, the simulation is as it was.
    assert steps_from_engine(sim, batch) <= 1.001


def test_a_batch_norm_that_stays_has_quantized_variables():
    layers = keras.layers
    source = keras.Input((6, 6, 3))
    norm = layers.BatchNormalization(name="norm")
    x = layers.Conv2D(4, 1, name="conv")(layers.ReLU()(norm(source)))
    x = layers.Dense(3, name="head")(layers.Flatten()(x))
    model = randomized(keras.Model(source, x))
    sim = QuantizationSimModel(model)
    batch = np.random.default_rng(0).normal(0, 1, (4, 6, 6, 3)).astype(np.float32)
    sim.compute_encodings(batch)
    assert "norm/gamma" in sim.quantizers
    wrapped = sim.model.get_layer("norm")
    assert sim.quantizer("norm/gamma") in wrapped.param_quantizers
    assert steps_from_engine(sim, batch) <= 1.001
