# SPDX-License-Identifier: Apache-2.0
# Model.adaround and Model.correct_biases.
import io
import re

import numpy as np
import pytest
from onnx import helper
from support import small_models

import halfstep


@pytest.fixture
def model(network):
    model = halfstep.Model.load(network)
    model.fold_batch_norms()
    return model


@pytest.fixture(scope="module")
def data():
    return np.random.default_rng(3).standard_normal((20, 3, 8, 8), np.float32)


def simulated(model, data, **arguments):
    sim = halfstep.QuantizationSimModel(model, **arguments)
    sim.compute_encodings(data, progress=False)
    return next(iter(sim.run(data).values()))


def test_rounded_model_beats_nearest_and_carries_its_grids(model, data):
    reference = next(iter(model.run(data).values()))
    nearest = simulated(model, data, param_bits=4)
    layers = model.adaround(data)
    assert all(layer.noise_after <= layer.noise_before for layer in layers)
    assert any(layer.kept.startswith("gram") for layer in layers)
    rounded = simulated(model, data)
    error = [np.square(got - reference).sum() for got in (rounded, nearest)]
    assert error[0] < error[1]
    sim = halfstep.QuantizationSimModel(model)
    assert {sim.encoding(layer.weight).bits for layer in layers} == {4}


def test_batches_and_dicts_give_the_same_bytes(model, data):
    results = []
    for given in (data, {small_models.INPUT: data}, [data[:3], data[3:]], iter(np.split(data, 5))):
        copy = model.copy()
        copy.adaround(given)
        results.append(copy.to_bytes())
    assert len(set(results)) == 1


def test_floor_or_ceil_keeps_every_weight_within_a_step(model, data):
    before = model.initializers
    layers = model.adaround(data, floor_or_ceil=True)
    sim = halfstep.QuantizationSimModel(model)
    for layer in layers:
        if not layer.kept.startswith("gram"):
            continue
        encoding = sim.encoding(layer.weight)
        old, new = before[layer.weight], model.initializers[layer.weight]
        axis = encoding.axis
        scale = np.asarray(encoding.scales).reshape(
            [-1 if i == axis else 1 for i in range(old.ndim)]
        )
        inside = (old >= -8 * scale) & (old <= 7 * scale)
        # One ulp of the quotient at codes up to 8.
        assert np.all(
            np.abs(new - old)[inside] <= np.broadcast_to(scale, old.shape)[inside] * 1.000001
        )


@pytest.mark.parametrize(
    ("method", "kept", "options"),
    [("gradient", "adaround", {"iterations": 300}), ("sequential_mse", "seq-mse", {})],
)
def test_other_methods_round_and_carry_their_grids(model, data, method, kept, options):
    before = model.initializers
    layers = model.adaround(data, method=method, **options)
    assert {layer.kept for layer in layers} <= {kept, "nearest"}
    assert any(layer.kept == kept for layer in layers)
    assert all(layer.noise_after <= layer.noise_before for layer in layers)
    sim = halfstep.QuantizationSimModel(model)
    assert {sim.encoding(layer.weight).bits for layer in layers} == {4}
    assert any(
        not np.array_equal(before[layer.weight], model.initializers[layer.weight])
        for layer in layers
    )


def test_iterations_out_of_range_are_refused(model, data):
    for count in (0, -1, 2**31):
        with pytest.raises(halfstep.InvalidArgumentError, match="iterations"):
            model.adaround(data, method="gradient", iterations=count)


def rounded(model, data, method, **options):
    """Round a copy in any of the ways there are; its bytes."""
    copy = model.copy()
    if method == "biases":
        copy.correct_biases(data, param_bits=4, **options)
    elif method == "analytic":
        copy.correct_biases(None, param_bits=4, **options)
    elif method == "data-free":
        copy.adaround(None, **options)
    else:
        if method == "gradient":
            options["iterations"] = 200
        copy.adaround(data, method=method, **options)
    return copy.to_bytes()


WAYS = ("auto", "gram", "gradient", "sequential_mse", "data-free", "biases", "analytic")


@pytest.mark.parametrize("method", WAYS)
def test_threads_do_not_matter(model, data, method):
    threads = halfstep.thread_count()
    results = []
    try:
        for count in (1, 2):
            halfstep.set_thread_count(count)
            results.append(rounded(model, data, method))
    finally:
        halfstep.set_thread_count(threads)
    assert results[0] == results[1]


@pytest.mark.parametrize("method", ("gradient", "sequential_mse", "biases"))
def test_batches_do_not_matter_to_other_methods(model, data, method):
    whole = rounded(model, data, method)
    assert rounded(model, [data[:3], data[3:]], method) == whole
    assert rounded(model, iter(np.split(data, 5)), method) == whole


@pytest.mark.parametrize("method", ("auto", "gradient", "sequential_mse", "biases"))
def test_cancelled_and_resumed_runs_end_alike(model, data, method, tmp_path):
    whole = rounded(model, data, method)
    with pytest.raises(halfstep.CancelledError):
        rounded(model, data, method, cache=tmp_path, progress=lambda done, total: done < 2)
    assert len(list(tmp_path.iterdir())) >= 1
    assert rounded(model, data, method, cache=tmp_path) == whole


def test_layers_have_widths_of_their_own(model, data):
    names = [layer.name for layer in model.inspect()]
    layers = model.adaround(data, layer_bits={names[0]: 8, names[-1]: 3}, config="default")
    assert [layer.bits for layer in layers] == [8] + [4] * (len(names) - 2) + [3]
    sim = halfstep.QuantizationSimModel(model, config="default")
    assert [sim.encoding(layer.weight).bits for layer in layers] == [layer.bits for layer in layers]


def test_layer_widths_are_checked(model, data):
    before = model.to_bytes()
    with pytest.raises(halfstep.UnknownNameError, match="no layer with weights is named 'nobody'"):
        model.adaround(data, layer_bits={"nobody": 8})
    name = model.inspect()[0].name
    for bits in (1, 17, 300):
        with pytest.raises(halfstep.InvalidArgumentError, match="layer_bits"):
            model.adaround(data, layer_bits={name: bits})
    # A layer that stays in float has no width.
    for batch in (data, None):
        with pytest.raises(halfstep.InvalidArgumentError, match=f"layer '{name}' is excluded"):
            model.adaround(batch, layer_bits={name: 8}, excluded_layers=[name])
    assert model.to_bytes() == before


def test_a_weight_of_two_layers_has_one_width(data):
    weight = np.random.default_rng(0).standard_normal((3, 3, 1, 1), np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["t"], name="first"),
        helper.make_node("Conv", ["t", "w"], ["y"], name="second"),
    ]
    shape = ["N", 3, 8, 8]
    content = small_models.model_of(nodes, {"w": weight}, [shape], [shape])
    model = halfstep.Model.load(content.SerializeToString())
    with pytest.raises(halfstep.InvalidArgumentError, match="'first' and 'second' share a weight"):
        model.adaround(data, layer_bits={"first": 8, "second": 3})
    assert model.adaround(data, layer_bits={"first": 8, "second": 8})[0].bits == 8


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gradient", {"reg_param": 10.0}),
        ("gradient", {"reg_param": 0.0}),
        ("gradient", {"warm_start": 0.9}),
        ("gradient", {"warm_start": 0.0}),
        ("gradient", {"beta_range": (4, 2)}),
        ("sequential_mse", {"num_candidates": 5}),
    ],
)
def test_constants_change_what_a_method_makes(model, data, method, options):
    results = []
    for given in ({}, options):
        copy = model.copy()
        # Strong enough for every constant to tell in few steps.
        common = {"iterations": 400, "reg_param": 1.0} if method == "gradient" else {}
        copy.adaround(data, method=method, **(common | given))
        results.append(copy.to_bytes())
    assert results[0] != results[1]


def test_constants_out_of_range_are_refused(model, data):
    for name, value in (
        ("reg_param", -1.0),
        ("reg_param", float("nan")),
        ("reg_param", 1e9),
        ("warm_start", 1.0),
        ("warm_start", -0.1),
        ("beta_range", (0.5, 2)),
        ("beta_range", (20, 2000)),
        ("beta_range", (20,)),
    ):
        with pytest.raises(halfstep.InvalidArgumentError):
            model.adaround(data, method="gradient", **{name: value})
    for count in (0, 1001):
        with pytest.raises(halfstep.InvalidArgumentError, match="candidates"):
            model.adaround(data, method="sequential_mse", num_candidates=count)


def test_bias_correction_keeps_weights(model, data):
    before = model.initializers
    layers = model.correct_biases(data, param_bits=4)
    assert {layer.kept for layer in layers} <= {"nearest", "nearest, bias corrected"}
    for layer in layers:
        assert np.array_equal(before[layer.weight], model.initializers[layer.weight])
    assert any(
        not np.array_equal(value, model.initializers[name]) for name, value in before.items()
    )


def test_details_tell_layers_and_time(model, data):
    names = [layer.name for layer in model.inspect()]
    for method in ("adaround", "correct_biases"):
        seen, steps = [], []
        getattr(model.copy(), method)(
            data,
            details=seen.append,
            progress=lambda done, total, steps=steps: steps.append((done, total)),
        )
        assert all(isinstance(state, halfstep.RoundingProgress) for state in seen)
        assert [s.completed for s in seen] == sorted(s.completed for s in seen)
        assert {s.layer for s in seen} <= {*names, "calibration"} and len(seen) > len(names)
        assert {s.total for s in seen[-len(names) :]} == {len(names)}
        assert all(0 <= state.fraction <= 1 for state in seen)
        times = [s.seconds_left for s in seen]
        assert times[0] is None and all(t is None or 0 <= t < 600 for t in times)
        assert any(t is not None for t in times)
        assert steps[-1] == (len(names), len(names))


def test_details_cancel_and_raise(model, data):
    before = model.to_bytes()
    with pytest.raises(halfstep.CancelledError):
        model.adaround(data, details=lambda state: state.completed < 1)

    def fail(state):
        raise KeyError(state.layer)

    with pytest.raises(KeyError, match="calibration"):
        model.adaround(data, details=fail)
    assert model.to_bytes() == before


def test_the_bar_shows_the_time_that_is_left(model, data, monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    texts = io.StringIO()

    class Bar(tqdm.tqdm):
        """A bar on a terminal that is none."""

        def __init__(self, **options):
            assert options.pop("disable") is None
            super().__init__(**options, file=texts, ncols=100, mininterval=0)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    layers = model.adaround(data, method="gradient", iterations=200, progress=True)
    lines = texts.getvalue().split("\r")
    count = len(layers)
    assert any(re.search(r"rounding: .*, about \d+ s left\]", line) for line in lines), lines
    # tqdm's own estimate, from whole layers, is not there beside it.
    assert not any("it/s" in line or "<" in line for line in lines)
    assert f" {count}/{count} layers [" in lines[-1] and "100%" in lines[-1]


def test_cancelled_and_refused_runs_leave_the_model(model, data):
    before = model.to_bytes()
    with pytest.raises(halfstep.CancelledError):
        model.adaround(data, progress=lambda done, total: done < 2)
    with pytest.raises(ZeroDivisionError):
        model.adaround(data, progress=lambda done, total: 1 / 0)
    with pytest.raises(halfstep.UnknownNameError, match="method"):
        model.adaround(data, method="guess")
    with pytest.raises(halfstep.InvalidArgumentError, match="bits"):
        model.adaround(data, param_bits=1)
    with pytest.raises(halfstep.EmptyStatisticsError):
        model.adaround([])
    broken = data.copy()
    broken[0, 0, 0, 0] = np.nan
    with pytest.raises(halfstep.NonFiniteValueError):
        model.adaround(broken)
    assert model.to_bytes() == before


def test_without_data_weights_are_compensated_and_biases_corrected(model, data):
    before = model.initializers
    corrected = model.copy()
    layers = corrected.correct_biases(None, param_bits=4)
    assert any(layer.kept == "nearest, bias corrected analytically" for layer in layers)
    for layer in layers:
        assert np.array_equal(before[layer.weight], corrected.initializers[layer.weight])
    rounded = model.copy()
    layers = rounded.adaround(None, param_bits=4)
    assert any(layer.kept == "gram, data-free" for layer in layers)
    assert all(layer.noise_after <= layer.noise_before for layer in layers)
    assert {
        halfstep.QuantizationSimModel(rounded).encoding(layer.weight).bits for layer in layers
    } == {4}
    with pytest.raises(halfstep.EmptyStatisticsError, match="gradient"):
        model.adaround(None, method="gradient")
    plain = halfstep.Model.load(model.to_bytes())
    with pytest.raises(halfstep.EmptyStatisticsError, match="batch norm"):
        plain.correct_biases(None)


def test_a_cancelled_run_resumes_from_its_cache(model, data, tmp_path):
    whole = model.copy()
    layers = whole.adaround(data)
    cache = tmp_path / "cache"
    part = model.copy()
    with pytest.raises(halfstep.CancelledError):
        part.adaround(data, cache=cache, progress=lambda done, total: done < 2)
    kept = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(kept) == 2
    part.adaround(data, cache=cache)
    assert part.to_bytes() == whole.to_bytes()
    after = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert kept.items() <= after.items()
    assert len(after) == len(layers)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(halfstep.FileAccessError, match="cache"):
        model.adaround(data, cache=tmp_path / "file" / "cache")
