# SPDX-License-Identifier: Apache-2.0
# Errors of the Keras face: typed, naming what is wrong, and nothing has changed afterwards.
import keras
import numpy as np
import pytest
from keras import layers
from networks import small

from halfstep.errors import (
    CancelledError,
    EmptyStatisticsError,
    EncodingMismatchError,
    FileAccessError,
    InvalidArgumentError,
    InvalidStateError,
    MalformedFileError,
    NonFiniteValueError,
    ShapeMismatchError,
    TypeMismatchError,
    UnknownNameError,
    UnsupportedVersionError,
)
from halfstep.keras import (
    QuantizationSimModel,
    apply_adaround,
    apply_seq_mse,
    correct_bias,
    equalize_model,
    fold_all_batch_norms,
)

X = np.random.default_rng(0).normal(0, 1, (8, 16, 16, 3)).astype(np.float32)
NAN = np.where(np.arange(3) == 1, np.nan, X).astype(np.float32)


def stop(done, total):
    return False


def fail(*_):
    raise ZeroDivisionError


@pytest.fixture(scope="module")
def folded():
    keras.utils.set_random_seed(0)
    return fold_all_batch_norms(small())[0]


@pytest.fixture(scope="module")
def sim(folded):
    made = QuantizationSimModel(folded)
    made.compute_encodings(X)
    return made


DATA = {
    "nan": (NAN, NonFiniteValueError, "'picture'"),
    "nothing": ([], EmptyStatisticsError, "no"),
    "height": (X[:, :8], ShapeMismatchError, "'picture'.*expected 16 along axis 1, got 8"),
    "rank": (X[0], ShapeMismatchError, "'picture'.*expected rank 4, got 3"),
    "number": (np.float32(3), ShapeMismatchError, "'picture'"),
    "words": (np.array(["a"]), TypeMismatchError, "'picture'.*numbers"),
    "ragged": ([{"picture": [[1.0], [1.0, 2.0]]}], TypeMismatchError, "'picture'"),
    "integer": (3, TypeMismatchError, "batches, got int"),
    "none": (None, TypeMismatchError, "batches, got NoneType"),
    "other input": ([{"other": X}], UnknownNameError, "'picture'.*'other'"),
    "too many": ([[[X, X]]], InvalidArgumentError, "1 arrays.*got 2"),
}


@pytest.mark.parametrize("case", DATA)
def test_data_that_cannot_be_used(case, sim, folded):
    data, error, text = DATA[case]
    expected = sim.model(X).numpy()
    with pytest.raises(error, match=text):
        sim.compute_encodings(data)
    assert np.array_equal(sim.model(X).numpy(), expected)
    before = [one.numpy() for one in folded.weights]
    for method in (apply_adaround, apply_seq_mse, correct_bias):
        with pytest.raises(error, match=text):
            method(folded, data)
    assert all(map(np.array_equal, before, folded.get_weights()))


def test_fractions_are_no_indices_but_whole_numbers_are():
    source = keras.Input((7,), dtype="int32", name="words")
    x = layers.Flatten()(layers.Embedding(10, 4, name="table")(source))
    sim = QuantizationSimModel(keras.Model(source, layers.Dense(2)(x)))
    sim.compute_encodings(np.ones((3, 7)))
    with pytest.raises(TypeMismatchError, match="'words': expected int32, got fractions"):
        sim.compute_encodings(np.full((3, 7), 1.5))


def test_a_callback_that_fails_leaves_the_simulation(sim):
    expected = sim.model(X).numpy()
    eager = sim.model.run_eagerly

    def half(model):
        model(X[:4])
        fail()

    for callback, error in (
        (half, ZeroDivisionError),
        (lambda model: None, EmptyStatisticsError),
        (lambda model: model(NAN), NonFiniteValueError),
    ):
        with pytest.raises(error):
            sim.compute_encodings(callback)
        assert sim.model.run_eagerly == eager and all(q.enabled for q in sim.quantizers.values())
        assert np.array_equal(sim.model(X).numpy(), expected)
        assert np.array_equal(sim.model.predict(X, verbose=0), expected)
    with pytest.raises(ZeroDivisionError):
        sim.compute_encodings(X if i == 0 else fail() for i in range(2))
    assert np.array_equal(sim.model(X).numpy(), expected)


@pytest.mark.parametrize("method", [apply_adaround, apply_seq_mse, correct_bias])
@pytest.mark.parametrize("in_place", [False, True])
def test_rounding_that_is_cancelled_or_fails_leaves_the_model(method, in_place, folded):
    before = [one.numpy() for one in folded.weights]
    outputs = folded(X).numpy()
    for progress, error in ((stop, CancelledError), (fail, ZeroDivisionError)):
        with pytest.raises(error):
            method(folded, X, progress=progress, in_place=in_place)
    for options, error, text in (
        ({"param_bits": 1}, InvalidArgumentError, "2...16, got 1"),
        ({"excluded_layers": ["none"]}, UnknownNameError, "'none'"),
        ({"config": "/nowhere.json"}, FileAccessError, "/nowhere.json"),
    ):
        with pytest.raises(error, match=text):
            method(folded, X, in_place=in_place, **options)
    assert all(map(np.array_equal, before, folded.get_weights()))
    assert np.array_equal(folded(X).numpy(), outputs)


@pytest.mark.parametrize("in_place", [False, True])
def test_equalization_that_is_cancelled_leaves_the_model(in_place):
    model = small()
    outputs, calls = model(X).numpy(), []
    with pytest.raises(CancelledError):
        equalize_model(model, progress=stop, in_place=in_place)
    assert np.array_equal(model(X).numpy(), outputs)
    equalize_model(model, progress=lambda *step: calls.append(step), in_place=in_place)
    assert calls and all(total == 50 for _, total in calls)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ["conv1", "head"])
def test_equalization_refuses_weights_that_are_not_finite(name, in_place):
    keras.utils.set_random_seed(0)
    model = small()
    # Nothing scales the head, behind a sum of two tensors.
    layer = model.get_layer(name)
    values = layer.kernel.numpy()
    values.flat[2] = np.nan
    layer.kernel.assign(values)
    before = [weight.numpy() for weight in model.weights]
    with pytest.raises(NonFiniteValueError, match=f"'{name}'"):
        equalize_model(model, in_place=in_place)
    for old, weight in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(weight.numpy(), old)
    assert np.isnan(model(X).numpy()).any()


def test_simulations_refuse_what_they_cannot_be(folded):
    for options, error, text in (
        ({"quant_scheme": "none"}, UnknownNameError, "'none'"),
        ({"default_param_bw": 40}, InvalidArgumentError, "param_bits.*got 40"),
        ({"default_output_bw": 1}, InvalidArgumentError, "got 1"),
        ({"config_file": "/nowhere.json"}, FileAccessError, "'/nowhere.json'"),
        ({"quant_scheme": "percentile", "percentile": 20}, InvalidArgumentError, "percentile"),
    ):
        with pytest.raises(error, match=text):
            QuantizationSimModel(folded, **options)
    keras.utils.set_random_seed(0)
    broken = small()
    broken.get_layer("conv2").kernel.assign(np.full((1, 1, 8, 8), np.nan))
    with pytest.raises(NonFiniteValueError, match="'conv2/kernel' of node 'conv2'"):
        QuantizationSimModel(broken)


def test_encodings_of_another_model_change_nothing(sim):
    other = QuantizationSimModel(keras.Sequential([keras.Input((4,)), layers.Dense(2, name="z")]))
    other.compute_encodings(np.ones((2, 4)))
    foreign = other.engine().encodings()
    expected = sim.model(X).numpy()
    for given, error, text in (
        (foreign, EncodingMismatchError, "has no quantizer"),
        (b"junk", MalformedFileError, "JSON"),
        ("/nowhere.encodings", FileAccessError, "nowhere"),
    ):
        with pytest.raises(error, match=text):
            sim.load_encodings(given)
        assert np.array_equal(sim.model(X).numpy(), expected)
    report = sim.load_encodings(foreign, strict=False)
    assert "z" in report.unknown and "picture" in report.missing
    assert np.array_equal(sim.model(X).numpy(), expected)
    with pytest.raises(UnknownNameError, match="'nothing'"):
        sim.quantizer("nothing")


def test_exports_refuse_and_repeat(sim, folded, tmp_path):
    with pytest.raises(InvalidStateError, match="'picture' has no encoding"):
        QuantizationSimModel(folded).export(tmp_path, "early")
    with pytest.raises(InvalidArgumentError, match="'../net'"):
        sim.export(tmp_path, "../net")
    with pytest.raises(UnsupportedVersionError, match="'9'"):
        sim.export(tmp_path, "net", version="9")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileAccessError, match="/proc"):
        sim.export("/proc/nowhere", "net")
    texts = []
    for _ in range(2):
        sim.export(tmp_path, "net", qdq=True)
        texts.append([(tmp_path / f"net.{end}").read_bytes() for end in ("onnx", "encodings")])
    assert texts[0] == texts[1]
    assert np.array_equal(keras.models.load_model(tmp_path / "net.keras")(X), folded(X))


def test_models_that_cannot_be_described_are_refused_by_every_entry():
    class Own(keras.Model):
        def call(self, x):
            return x

    for entry in (QuantizationSimModel, fold_all_batch_norms, equalize_model):
        with pytest.raises(NotImplementedError, match=r"'own'.*keras.Model\(inputs, outputs\)"):
            entry(Own(name="own"))
        with pytest.raises(TypeError, match="keras.Model, got NoneType"):
            entry(None)
    for method in (apply_adaround, apply_seq_mse, correct_bias):
        with pytest.raises(NotImplementedError, match="'own'"):
            method(Own(name="own"), X)
