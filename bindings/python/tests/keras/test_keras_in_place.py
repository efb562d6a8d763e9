# SPDX-License-Identifier: Apache-2.0
# Changes in place: the same result in the model's own variables, and nothing changed on failure.
import functools

import keras
import networks
import numpy as np
import pytest
from keras import layers
from networks import application, error_of_range, randomized

from halfstep.errors import FileAccessError, HalfstepError, InvalidArgumentError, InvalidStateError
from halfstep.keras import (
    QuantizationSimModel,
    _lending,
    apply_adaround,
    equalize_model,
    fold_all_batch_norms,
)
from halfstep.keras._builder import memory_of


def small() -> keras.Model:
    keras.utils.set_random_seed(0)
    return networks.small()


def pictures() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 1, (4, 16, 16, 3)).astype(np.float32)


def fold(model, **options):
    return fold_all_batch_norms(model, **options)[0]


@pytest.fixture
def all_are_lent(monkeypatch):
    """Lend small variables too, which are not worth it otherwise."""
    monkeypatch.setattr(_lending, "_LEAST", 0)


@pytest.mark.parametrize("change", [fold, equalize_model])
def test_results_are_the_same_in_the_same_variables(change, all_are_lent, tmp_path):
    batch = pictures()
    model, other = small(), small()
    variables = {one.path: one for one in model.weights}
    names = [one.name for one in model.layers]
    expected = change(other)
    result = change(model, in_place=True)
    assert [one.name for one in result.layers] == [one.name for one in expected.layers]
    assert len(names) == len(result.layers) + 2
    for got, want in zip(result.weights, expected.weights, strict=True):
        assert got.name == want.name and np.array_equal(got.numpy(), want.numpy())
    kept = [one for one in result.weights if one.name == "kernel"]
    assert len(kept) == 4 and all(variables[one.path] is one for one in kept)
    outputs = result(batch, training=False).numpy()
    assert np.array_equal(outputs, expected(batch, training=False).numpy())
    # It is a model like any other: layers know their places in it, it trains, is saved, simulated.
    part = keras.Model(result.input, result.get_layer("conv2").output)
    assert part(batch).shape == (4, 8, 8, 8)
    result.save(tmp_path / "net.keras")
    loaded = keras.models.load_model(tmp_path / "net.keras")
    assert np.array_equal(loaded(batch, training=False).numpy(), outputs)
    sim = QuantizationSimModel(result)
    sim.compute_encodings(batch)
    result.compile("sgd", "mse")
    result.fit(batch, outputs + 1, verbose=0)
    assert not np.array_equal(result(batch).numpy(), outputs)


def test_the_model_that_was_given_is_used_up():
    model = small()
    model.predict(pictures(), verbose=0)
    fold(model, in_place=True)
    for use in (
        lambda: model(pictures()),
        lambda: model.predict(pictures(), verbose=0),
        lambda: equalize_model(model),
        lambda: QuantizationSimModel(model),
    ):
        with pytest.raises(InvalidStateError, match="'small' was changed in place"):
            use()


def test_what_shares_memory_with_the_model_does_not_change(all_are_lent):
    model, batch = small(), pictures()
    folded = fold(model)
    # Unchanged layers share memory with the folded model, and a simulation shares all of it.
    sim = QuantizationSimModel(folded)
    sim.compute_encodings(batch)
    seen = [memory_of(one) for one in folded.weights]
    before = [one.copy() for one in seen]
    outputs = sim.model(batch).numpy(), model(batch).numpy()
    equalize_model(folded, in_place=True)
    assert all(map(np.array_equal, seen, before))
    assert np.array_equal(sim.model(batch).numpy(), outputs[0])
    assert np.array_equal(model(batch).numpy(), outputs[1])


def assert_untouched(model, batch, expected, weights):
    assert np.array_equal(model(batch, training=False).numpy(), expected)
    assert [one.path for one in model.weights] == [path for path, _ in weights]
    for one, (_, value) in zip(model.weights, weights, strict=True):
        assert np.array_equal(one.numpy(), value)
    assert [one.use_bias for one in model.layers if hasattr(one, "use_bias")].count(False) == 2
    part = keras.Model(model.input, model.get_layer("conv2").output)
    assert part(batch).shape == (4, 8, 8, 8)


@pytest.mark.parametrize("at", ["engine", "graph", "weights", "disk"])
def test_failures_leave_the_model_as_it_was(at, all_are_lent, monkeypatch):
    model, batch = small(), pictures()
    expected = model(batch, training=False).numpy()
    weights = [(one.path, one.numpy().copy()) for one in model.weights]
    change, error = equalize_model, HalfstepError
    if at == "engine":
        error = InvalidArgumentError
        change = functools.partial(equalize_model, max_iterations=0)
    elif at == "graph":  # when the new graph is made half way
        error = ZeroDivisionError
        monkeypatch.setattr(layers.Add, "compute_output_spec", lambda *a, **k: 1 // 0)
    elif at == "weights":  # when most layers have their weights
        error = MemoryError
        assign, count = _lending.Lending.assign, iter(range(100))

        def failing(self, variable, value):
            if next(count) == 4:
                raise MemoryError
            assign(self, variable, value)

        monkeypatch.setattr(_lending.Lending, "assign", failing)
    else:
        error = FileAccessError

        class Full:
            def seek(self, *_):
                return 0

            def write(self, _):
                raise OSError(28, "No space left on device")

            def close(self):
                pass

        monkeypatch.setattr(_lending.tempfile, "TemporaryFile", Full)
    with pytest.raises(error):
        change(model, in_place=True)
    monkeypatch.undo()
    assert_untouched(model, batch, expected, weights)
    # And the next attempt works.
    assert error_of_range(equalize_model(model, in_place=True)(batch).numpy(), expected) < 1e-5


def test_shared_layers_nested_models_and_activations(all_are_lent):
    def make():
        keras.utils.set_random_seed(0)
        inner = keras.Sequential(
            [keras.Input((6, 6, 4)), layers.Conv2D(4, 1, name="conv", activation="relu6")],
            name="inner",
        )
        shared = layers.Dense(4, name="shared")
        x = source = keras.Input((6, 6, 4), name="source")
        x = layers.Conv2D(4, 1, name="conv", use_bias=False)(x)
        x = layers.BatchNormalization(name="norm")(x)
        x = inner(layers.Activation("relu6", name="bounded")(x))
        x = layers.Conv2D(4, 3, name="last")(shared(shared(x)))
        return randomized(keras.Model(source, layers.BatchNormalization(scale=False)(x)))

    batch = np.random.default_rng(0).normal(0, 1, (3, 6, 6, 4)).astype(np.float32)
    expected = make()(batch, training=False).numpy()
    for change in (fold, equalize_model):
        model = make()
        inner = model.get_layer("inner")
        result = change(model, in_place=True)
        assert error_of_range(result(batch, training=False).numpy(), expected) < 1e-5
        with pytest.raises(InvalidStateError, match="'inner' was changed in place"):
            inner(batch)


def test_rounding_in_place():
    model, other = fold(small()), fold(small())
    data = np.random.default_rng(0).normal(0, 1, (32, 16, 16, 3)).astype(np.float32)
    kernel = model.get_layer("conv2").kernel
    result = apply_adaround(model, data, in_place=True)
    expected = apply_adaround(other, data)
    assert result.model.get_layer("conv2").kernel is kernel
    assert all(map(np.array_equal, result.model.get_weights(), expected.model.get_weights()))
    with pytest.raises(InvalidStateError):
        apply_adaround(model, data)


@pytest.mark.parametrize("name", ["MobileNetV2", "Xception", "ConvNeXtTiny"])
def test_networks_are_equalized_in_place(name):
    model, batch = application(name)
    expected = model(batch, training=False).numpy()
    result = equalize_model(model, in_place=True)
    assert error_of_range(result(batch, training=False).numpy(), expected) < 1e-4
