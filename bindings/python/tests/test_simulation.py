# SPDX-License-Identifier: Apache-2.0
# The QuantizationSimModel class: calibration, running, files, errors.
import contextlib
import json
import os
import resource

import numpy as np
import onnx
import pytest
from support import small_models

import halfstep

SCHEMES = ("min_max", "tf", "sqnr", "tf_enhanced", "percentile", "mse", "entropy")
VERSIONS = ("0.6.1", "1.0.0", "2.0.0")


@pytest.fixture
def model(network):
    model = halfstep.Model.load(network)
    model.fold_batch_norms()
    return model


@pytest.fixture
def calibrated(model):
    sim = halfstep.QuantizationSimModel(model)
    sim.compute_encodings(small_models.data(), progress=False)
    return sim


def state(sim: halfstep.QuantizationSimModel) -> tuple[bytes, bytes]:
    return sim.encodings_json(), sim.statistics()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_calibrates_and_runs(model, scheme):
    sim = halfstep.QuantizationSimModel(model, quant_scheme=scheme, percentile=99.9)
    x = small_models.data()
    sim.compute_encodings(x, progress=False)
    expected, got = model.run(x)["y"], sim.run(x)["y"]
    noise = np.sum((expected - got) ** 2) / np.sum((expected - expected.mean(0)) ** 2)
    # Quantized, and still the same function. Entropy trades the long tails of this network, whose
    # channels differ by a factor of e^3, for resolution near zero: no bound is promised there.
    assert 0 < noise < (np.inf if scheme == "entropy" else 0.25)


def test_aimet_names_mean_the_same(model):
    for name, alias in (("min_max", "tf"), ("sqnr", "tf_enhanced")):
        sims = [halfstep.QuantizationSimModel(model, quant_scheme=s) for s in (name, alias)]
        for sim in sims:
            sim.compute_encodings(small_models.data(), progress=False)
        assert sims[0].encodings_json() == sims[1].encodings_json()


def test_config_none_is_per_channel_and_default_is_per_tensor(model):
    x = small_models.data()
    counts = {}
    for config in (None, "default_per_channel", "default"):
        sim = halfstep.QuantizationSimModel(model, config=config)
        sim.compute_encodings(x, progress=False)
        encoding = sim.encoding("conv1.weight")
        counts[config] = (encoding.granularity, len(encoding.scales))
    assert counts[None] == counts["default_per_channel"] == ("per_channel", 8)
    assert counts["default"] == ("per_tensor", 1)


def test_symmetric_weights_follow_aimets_rule(calibrated, model):
    """By hand: scale = max(max / 127, -min / 128) a channel, zero point 0."""
    weight = model.initializers["conv1.weight"].reshape(8, -1)
    encoding = calibrated.encoding("conv1.weight")
    assert encoding.is_symmetric and encoding.is_signed and encoding.bits == 8
    expected = np.maximum(weight.max(1) / 127, -weight.min(1) / 128)
    # One rounding to float32 may differ from NumPy's division: 1 ulp.
    np.testing.assert_allclose(encoding.scales, expected, rtol=1.2e-7)
    assert not encoding.zero_points.any()


def test_quantizers_are_listed(calibrated):
    by_name = {q.tensor: q for q in calibrated.quantizers}
    assert by_name["conv1.weight"].is_parameter and not by_name["x"].is_parameter
    assert by_name["conv1.weight"].bits == 8
    for name, quantizer in by_name.items():
        assert calibrated.encoding(name).bits == quantizer.bits
    assert str(len(by_name)) in repr(calibrated)


def test_bits_are_honored(model):
    sim = halfstep.QuantizationSimModel(model, param_bits=4, activation_bits=12)
    sim.compute_encodings(small_models.data(), progress=False)
    assert sim.encoding("conv1.weight").bits == 4 and sim.encoding("x").bits == 12
    used = sim.run(small_models.data(), extra_outputs=["relu1.out"])["relu1.out"]
    grid = sim.encoding("relu1.out")
    codes = used / grid.scales[0]
    # A multiple of the scale, up to the rounding of code * scale to float.
    np.testing.assert_allclose(codes, np.rint(codes), atol=4096 * 2.0**-23)


# --------------------------------------------------------------------------------------------------
# Calibration


def test_all_ways_to_give_data_agree(model):
    x = small_models.data(20)
    ways = {
        "array": x,
        "dict": {"x": x},
        "list of arrays": [x[:7], x[7:]],
        "generator of dicts": ({"x": x[i : i + 3]} for i in range(0, 20, 3)),
        "tuple": (x,),
        "shuffled": [x[np.random.default_rng(2).permutation(20)]],
    }
    results = set()
    for data in ways.values():
        sim = halfstep.QuantizationSimModel(model, quant_scheme="sqnr")
        sim.compute_encodings(data, progress=False)
        results.add(sim.encodings_json())
    assert len(results) == 1


def test_calibration_forgets_the_one_before(model, calibrated):
    calibrated.compute_encodings(100 * small_models.data(), progress=False)
    fresh = halfstep.QuantizationSimModel(model)
    fresh.compute_encodings(100 * small_models.data(), progress=False)
    assert state(calibrated) == state(fresh)


def test_progress_is_reported(model):
    x = small_models.data(20)
    seen = []
    sim = halfstep.QuantizationSimModel(model)
    sim.compute_encodings(x, progress=lambda *call: seen.append(call), batch_size=8)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    seen.clear()
    sim.compute_encodings([x, x], progress=lambda *call: seen.append(call))
    assert seen == [(1, 2), (2, 2)]
    seen.clear()
    sim.compute_encodings(iter([x, x]), progress=lambda *call: seen.append(call))
    assert seen == [(1, None), (2, None)]


def test_nothing_is_printed_without_a_terminal(model, capfd):
    halfstep.QuantizationSimModel(model).compute_encodings(small_models.data())
    assert capfd.readouterr() == ("", "")


class Boom(Exception):
    pass


def raising(error: type[BaseException]):
    def progress(completed, total):
        if completed == 2:
            raise error("from the callback")

    return progress


@pytest.mark.parametrize("form", ["whole", "batches"])
@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, halfstep.CancelledError])
def test_interrupted_calibration_leaves_things_as_they_were(calibrated, form, error):
    before = state(calibrated)
    x = 50 * small_models.data(24)
    data = x if form == "whole" else [x[:8], x[8:16], x[16:]]
    progress = raising(error)
    if error is halfstep.CancelledError:

        def progress(completed, total):
            return completed < 2

    with pytest.raises(error):
        calibrated.compute_encodings(data, progress=progress)
    assert state(calibrated) == before
    calibrated.compute_encodings(small_models.data(), progress=False)  # still works
    assert state(calibrated) == before


def test_failing_iterable_leaves_things_as_they_were(calibrated):
    before = state(calibrated)

    def batches():
        yield 9 * small_models.data()
        raise Boom

    with pytest.raises(Boom):
        calibrated.compute_encodings(batches(), progress=False)
    assert state(calibrated) == before


def bad_batches():
    nan = small_models.data()
    nan[3, 1, 2, 2] = np.nan
    infinite = small_models.data()
    infinite[0, 0, 0, 0] = np.inf
    good = small_models.data()
    return {
        "nothing": ([], halfstep.EmptyStatisticsError, "no data has reached"),
        "nan": ([good, nan], halfstep.NonFiniteValueError, "'x'"),
        "infinity": ([good, infinite], halfstep.NonFiniteValueError, "'x'"),
        "shape": ([good, good[:, :2]], halfstep.ShapeMismatchError, "'x'"),
        "type": ([good, good.astype(np.float64)], halfstep.TypeMismatchError, "'x'"),
        "name": ([{"x": good}, {"z": good}], halfstep.HalfstepError, "'z'|'x'"),
        "no rows": (good[:0], halfstep.InvalidArgumentError, "no rows"),
        "nan in one array": (nan, halfstep.NonFiniteValueError, "'x'"),
    }


@pytest.mark.parametrize("case", list(bad_batches()))
def test_bad_data_leaves_things_as_they_were(calibrated, case):
    data, error, text = bad_batches()[case]
    before = state(calibrated)
    with pytest.raises(error, match=text):
        calibrated.compute_encodings(data, progress=False)
    assert state(calibrated) == before


def test_statistics_merge_to_the_same(model):
    x = small_models.data(32)
    one = halfstep.QuantizationSimModel(model, quant_scheme="entropy")
    one.compute_encodings([x], progress=False)
    parts = [halfstep.QuantizationSimModel(model, quant_scheme="entropy") for _ in range(3)]
    for index, part in enumerate(parts):
        part.observe(x[index::3])
    for other in (parts[2], parts[1]):
        parts[0].merge_statistics(other.statistics())
    parts[0].finish_calibration()
    assert state(parts[0]) == state(one)


def test_bad_statistics_change_nothing(calibrated):
    before = state(calibrated)
    good = calibrated.statistics()
    damaged = [b"", b"x", good[:-1], good + b"\0", bytes(len(good))]
    for data in damaged:
        with pytest.raises(halfstep.HalfstepError):
            calibrated.merge_statistics(data)
    assert state(calibrated) == before


def test_no_encodings_yet(model, tmp_path):
    sim = halfstep.QuantizationSimModel(model)
    for action in (
        lambda: sim.run(small_models.data()),
        lambda: sim.encodings(),
        lambda: sim.export(tmp_path, "net"),
        lambda: sim.export_qdq(tmp_path / "net.onnx"),
    ):
        with pytest.raises(halfstep.InvalidStateError):
            action()
    with pytest.raises(halfstep.EmptyStatisticsError):
        sim.finish_calibration()
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("version", VERSIONS)
def test_export_writes_the_model_and_the_encodings(calibrated, tmp_path, version):
    calibrated.export(tmp_path / "out", "net", version)
    assert sorted(os.listdir(tmp_path / "out")) == ["net.encodings", "net.onnx"]
    content = (tmp_path / "out/net.encodings").read_bytes()
    assert content == calibrated.encodings_json(version)
    assert json.loads(content) == calibrated.encodings(version)
    assert json.loads(content)["version"] == version
    onnx.checker.check_model(str(tmp_path / "out/net.onnx"))
    again = halfstep.Model.load(tmp_path / "out/net.onnx")
    x = small_models.data(2)
    np.testing.assert_array_equal(again.run(x)["y"], calibrated.model.run(x)["y"])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("form", ["dict", "path", "bytes"])
def test_encodings_load_back(calibrated, model, tmp_path, version, form):
    content = calibrated.encodings_json(version)
    (tmp_path / "net.encodings").write_bytes(content)
    source = {
        "dict": json.loads(content),
        "path": tmp_path / "net.encodings",
        "bytes": content,
    }[form]
    sim = halfstep.QuantizationSimModel(model)
    report = sim.load_encodings(source)
    assert report == halfstep.LoadReport((), (), ())
    x = small_models.data(4)
    # Version 0.6.1 and 1.0.0 carry scales in full; the simulation is the same function.
    np.testing.assert_array_equal(sim.run(x)["y"], calibrated.run(x)["y"])


def test_mismatch_is_reported_or_refused(calibrated, model):
    document = calibrated.encodings("1.0.0")
    document["param_encodings"][0]["name"] = "no.such.tensor"
    before = state(calibrated)
    with pytest.raises(halfstep.EncodingMismatchError):
        calibrated.load_encodings(document)
    assert state(calibrated) == before
    report = calibrated.load_encodings(document, strict=False)
    assert report.unknown == ("no.such.tensor",)
    assert len(report.missing) == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"version": "1.0.0"}', b'{"version": "9.9.9"}', b"\xff\xfe", b"nul\0l"],
)
def test_malformed_encodings_change_nothing(calibrated, content):
    before = state(calibrated)
    with pytest.raises(halfstep.HalfstepError):
        calibrated.load_encodings(content)
    assert state(calibrated) == before


def test_missing_encodings_file_is_named(calibrated, tmp_path):
    with pytest.raises(halfstep.FileAccessError, match=r"none\.encodings"):
        calibrated.load_encodings(tmp_path / "none.encodings")


def test_unknown_version_is_refused(calibrated):
    with pytest.raises(halfstep.UnsupportedVersionError, match=r"7\.0"):
        calibrated.encodings("7.0")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_by_permission(calibrated, tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(halfstep.FileAccessError):
        calibrated.export(tmp_path, "net")


def test_folder_that_cannot_be_written(calibrated, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(halfstep.FileAccessError, match="file"):
        calibrated.export(tmp_path / "file", "net")
    with pytest.raises(halfstep.FileAccessError):
        calibrated.export(tmp_path / "no" / "such", "net")
    with pytest.raises(halfstep.FileAccessError):
        calibrated.export_qdq("/proc/net.onnx")
    assert os.listdir(tmp_path) == ["file"]


@contextlib.contextmanager
def full_disk(free):
    """No file may grow beyond `free` bytes meanwhile, as on a disk that has no more."""
    # Python ignores the signal that comes with it, so a write fails with EFBIG instead.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("write", "culprit"),
    [
        (lambda sim, model, folder: sim.export(folder, "net"), r"net\.(onnx|encodings)"),
        (lambda sim, model, folder: sim.export_qdq(folder / "qdq.onnx"), r"qdq\.onnx"),
        (lambda sim, model, folder: model.save(folder / "net.onnx"), r"net\.onnx"),
        (
            lambda sim, model, folder: model.save(folder / "big.onnx", external_data=True),
            r"big\.onnx",
        ),
    ],
    ids=["export", "export_qdq", "save", "save_external"],
)
def test_full_disk_leaves_the_files_as_they_were(calibrated, model, tmp_path, write, culprit):
    write(calibrated, model, tmp_path)
    fresh = contents(tmp_path)
    # What stands there before: something else, to see whether any of the files is replaced.
    before = {name: b"before" for name in fresh}
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    unwritten = state(calibrated)
    # Too little for any of the files, and too little for the largest alone.
    for free in (0, min(map(len, fresh.values())) - 1, max(map(len, fresh.values())) - 1):
        with full_disk(free), pytest.raises(halfstep.FileAccessError, match=culprit):
            write(calibrated, model, tmp_path)
        assert contents(tmp_path) == before
    assert state(calibrated) == unwritten
    write(calibrated, model, tmp_path)
    assert contents(tmp_path) == fresh


@pytest.mark.parametrize("prefix", ["", "a/b", "../x"])
def test_prefix_must_be_a_file_name(calibrated, tmp_path, prefix):
    with pytest.raises(halfstep.InvalidArgumentError, match="prefix"):
        calibrated.export(tmp_path, prefix)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# Making one


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"param_bits": 1}, halfstep.InvalidArgumentError, "param_bits"),
        ({"param_bits": 0}, halfstep.InvalidArgumentError, "param_bits"),
        ({"activation_bits": 17}, halfstep.InvalidArgumentError, "activation_bits"),
        ({"quant_scheme": "magic"}, halfstep.UnknownNameError, "magic"),
        ({"config": "no_such_config"}, halfstep.HalfstepError, "no_such_config"),
        (
            {"quant_scheme": "percentile", "percentile": 20},
            halfstep.InvalidArgumentError,
            "percentile",
        ),
        (
            {"quant_scheme": "percentile", "percentile": float("nan")},
            halfstep.InvalidArgumentError,
            "percentile",
        ),
    ],
)
def test_wrong_settings_are_named(model, arguments, error, text):
    with pytest.raises(error, match=text):
        halfstep.QuantizationSimModel(model, **arguments)


def test_config_file_with_a_wrong_key_is_refused(model, tmp_path):
    path = tmp_path / "config.json"
    sections = {name: {} for name in ("params", "op_type", "model_input", "model_output")}
    sections |= {"supergroups": [], "defaults": {"ops": {"is_output_quantised": "True"}}}
    path.write_text(json.dumps(sections))
    with pytest.raises(halfstep.InvalidConfigurationError, match="is_output_quantised"):
        halfstep.QuantizationSimModel(model, config=path)
    path.write_text("{")
    with pytest.raises(halfstep.HalfstepError, match="config"):
        halfstep.QuantizationSimModel(model, config=path)


def test_nan_weight_is_refused(model):
    weight = model.initializers["conv2.weight"].copy()
    weight.flat[5] = np.inf
    model.set_initializer("conv2.weight", weight)
    with pytest.raises(halfstep.NonFiniteValueError, match=r"conv2\.weight"):
        halfstep.QuantizationSimModel(model)


def test_model_is_required():
    with pytest.raises(TypeError, match="Model"):
        halfstep.QuantizationSimModel("net.onnx")


def test_later_changes_of_the_model_do_not_reach_it(network):
    model = halfstep.Model.load(network)
    model.fold_batch_norms()
    sim = halfstep.QuantizationSimModel(model)
    sim.compute_encodings(small_models.data(), progress=False)
    before = sim.run(small_models.data())["y"]
    model.set_initializer("fc.weight", np.zeros((4, 8), np.float32))
    np.testing.assert_array_equal(sim.run(small_models.data())["y"], before)


# --------------------------------------------------------------------------------------------------
# Single quantizers


def test_quantizer_can_be_turned_off_and_on(calibrated):
    x = small_models.data(4)
    before = calibrated.run(x)["y"]
    for quantizer in calibrated.quantizers:
        calibrated.set_enabled(quantizer.tensor, False)
    assert not any(q.is_enabled for q in calibrated.quantizers)
    expected = calibrated.model.run(x)["y"]
    # The float network, up to another order of summation in a differently fused plan.
    np.testing.assert_allclose(calibrated.run(x)["y"], expected, rtol=0, atol=1e-5)
    for quantizer in calibrated.quantizers:
        calibrated.set_enabled(quantizer.tensor, True)
    np.testing.assert_array_equal(calibrated.run(x)["y"], before)


def test_frozen_grid_survives_calibration(calibrated):
    frozen = calibrated.encoding("relu1.out")
    other = calibrated.encoding("x")
    calibrated.set_frozen("relu1.out", True)
    calibrated.compute_encodings(5 * small_models.data(), progress=False)
    assert calibrated.encoding("relu1.out").scales == frozen.scales
    assert calibrated.encoding("x").scales != other.scales
    with pytest.raises(halfstep.InvalidStateError, match="frozen"):
        calibrated.set_precision("relu1.out", bits=4)


def test_precision_of_one_tensor(calibrated):
    calibrated.set_precision("conv1.weight", bits=4)
    assert calibrated.encoding("conv1.weight").bits == 4
    assert calibrated.encoding("conv2.weight").bits == 8
    calibrated.set_precision("x", symmetric=True)
    assert calibrated.encoding("x").is_symmetric
    with pytest.raises(halfstep.InvalidArgumentError, match="bits"):
        calibrated.set_precision("x", bits=0)


def test_range_of_one_tensor(calibrated):
    calibrated.set_range("x", -1.0, 1.0)
    x = calibrated.encoding("x")
    low, high = x.zero_points[0] * -x.scales[0], (255 - x.zero_points[0]) * x.scales[0]
    # The zero point is whole: the range may be shifted by half a step.
    assert low == pytest.approx(-1, abs=float(x.scales[0])) and high == pytest.approx(
        1, abs=float(x.scales[0])
    )
    with pytest.raises(halfstep.InvalidArgumentError):
        calibrated.set_range("x", 2.0, 1.0)
    with pytest.raises(halfstep.InvalidArgumentError, match="NaN"):
        calibrated.set_range("x", float("nan"))
    with pytest.raises(halfstep.InvalidArgumentError, match="parameter"):
        calibrated.set_range("conv1.weight", -1.0, 1.0)


def test_grid_of_one_tensor(calibrated):
    grid = calibrated.encoding("conv1.weight")
    calibrated.set_encoding("conv1.weight", grid._replace(scales=grid.scales * 2))
    np.testing.assert_array_equal(calibrated.encoding("conv1.weight").scales, grid.scales * 2)
    short = grid._replace(scales=grid.scales[:3], zero_points=grid.zero_points[:3])
    with pytest.raises(halfstep.EncodingMismatchError, match=r"conv1\.weight"):
        calibrated.set_encoding("conv1.weight", short)
    with pytest.raises(halfstep.ShapeMismatchError, match="zero points"):
        calibrated.set_encoding("conv1.weight", grid._replace(zero_points=grid.zero_points[:3]))
    with pytest.raises(halfstep.UnknownNameError, match="per_pixel"):
        calibrated.set_encoding("conv1.weight", grid._replace(granularity="per_pixel"))


def test_unknown_tensors_are_named(calibrated):
    grid = calibrated.encoding("x")
    for action in (
        lambda: calibrated.encoding("nobody"),
        lambda: calibrated.set_enabled("nobody", True),
        lambda: calibrated.set_frozen("nobody", True),
        lambda: calibrated.set_precision("nobody", bits=8),
        lambda: calibrated.set_range("nobody", 0, 1),
        lambda: calibrated.set_encoding("nobody", grid),
    ):
        with pytest.raises(halfstep.UnknownNameError, match="nobody") as caught:
            action()
        assert isinstance(caught.value, KeyError)


def test_excluded_layers_stay_float(model):
    sim = halfstep.QuantizationSimModel(model, excluded_layers=["conv2"])
    assert "conv2.weight" not in {q.tensor for q in sim.quantizers if q.is_enabled}
    with pytest.raises(halfstep.HalfstepError, match="no_such_node"):
        halfstep.QuantizationSimModel(model, excluded_layers=["no_such_node"])
