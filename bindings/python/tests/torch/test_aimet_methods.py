# SPDX-License-Identifier: Apache-2.0
# Methods of a simulation that AIMET's users call, beyond those of the life of a simulation.
import copy

import pytest

torch = pytest.importorskip("torch")

from torch_networks import network, pictures  # noqa: E402

from halfstep.errors import (  # noqa: E402
    EncodingMismatchError,
    InvalidArgumentError,
    InvalidStateError,
)
from halfstep.torch import QuantizationSimModel, Quantizer  # noqa: E402

X = pictures(8, seed=5)


@pytest.fixture(scope="module")
def calibrated():
    sim = QuantizationSimModel(network(), pictures(), quant_scheme="percentile")
    sim.compute_encodings([X])
    return sim


@pytest.fixture
def sim(calibrated):
    return copy.deepcopy(calibrated)


def outputs(sim, x=X):
    with torch.no_grad():
        return sim.model.eval()(x)


def ranges(sim):
    return {
        name: (q.enabled, q.frozen, q.bits, str(q.minimum.tolist()), str(q.maximum.tolist()))
        for name, q in sim.quantizers.items()
    }


def test_quantized_modules_are_listed(sim):
    named = dict(sim.named_qmodules())
    assert list(named.values()) == list(sim.qmodules())
    modules = ["", "block.bn1", "block.bn2", "block.conv1", "block.conv2", "block.relu"]
    assert sorted(named) == [*modules, "depthwise", "fc", "stem"]
    assert named["stem"] is sim.model.stem and named[""] is sim.model
    assert not any(isinstance(module, Quantizer) for module in named.values())


def test_quantizers_can_be_called_as_in_aimet(sim):
    assert list(sim.quantizers()) == list(sim.quantizers.values())
    assert {id(q) for q in sim.quantizers()} == {id(q) for _, q in sim.named_quantizers()}


def test_state_of_quantizers_alone(sim):
    state = sim.quantizer_state_dict()
    whole = sim.model.state_dict()
    assert 0 < len(state) < len(whole)
    assert "stem.weight" not in state and "stem.param_quantizers.weight.minimum" in state
    assert {key for key in whole if "quantizers" in key} == set(state)
    other = QuantizationSimModel(network(), pictures(), quant_scheme="percentile")
    other.quantizers["x"].enabled = False
    missing, unexpected = other.model.load_state_dict(state, strict=False)
    # torch does not miss these.
    counts = {key for key in whole if key.endswith("num_batches_tracked")}
    assert not unexpected and set(missing) | counts == set(whole) - set(state)
    assert torch.equal(outputs(other), outputs(sim))


def test_percentile_is_that_of_the_next_calibration(sim):
    before = ranges(sim)
    sim.set_percentile_value(97.5)
    assert ranges(sim) == before
    sim.compute_encodings([X])
    other = QuantizationSimModel(network(), pictures(), quant_scheme="percentile", percentile=97.5)
    other.compute_encodings([X])
    assert ranges(sim) == ranges(other) != before
    for value in (49.9, 100.1, float("nan")):
        with pytest.raises(InvalidArgumentError, match="percentile_value.*50 to 100"):
            sim.set_percentile_value(value)


def test_a_weight_that_follows_its_rule_follows_the_new_percentile(sim):
    weight = sim.model.stem.param_quantizers["weight"]
    weight.learnable = False
    outputs(sim)
    before = weight.maximum.clone()
    sim.set_percentile_value(60)
    outputs(sim)
    assert (weight.maximum < before).all()


def test_folded_parameters_are_on_their_grids(sim, tmp_path):
    expected, grids = outputs(sim), sim.encodings()
    original = sim.model.stem.weight.detach().clone()
    sim.fold_param_quantizers()
    assert not torch.equal(sim.model.stem.weight, original)
    quantizer = sim.model.stem.param_quantizers["weight"]
    assert torch.equal(quantizer(sim.model.stem.weight), sim.model.stem.weight)
    assert torch.equal(outputs(sim), expected)
    assert sim.encodings() == grids
    sim.compute_encodings([X])
    assert sim.encodings()["param_encodings"] == grids["param_encodings"]
    parameters = {n for n, q in sim.quantizers.items() if sim._roles[n] and q.enabled}
    assert {n for n, q in sim.quantizers.items() if q.frozen} == parameters
    sim.fold_param_quantizers()  # again: nothing moves
    assert sim.encodings()["param_encodings"] == grids["param_encodings"]


def test_what_has_no_range_cannot_fold(sim):
    sim.model.fc.param_quantizers["weight"].clear_range()
    weight = sim.model.stem.weight.detach().clone()
    with pytest.raises(InvalidStateError, match=r"'fc\.weight' has no range"):
        sim.fold_param_quantizers()
    assert torch.equal(sim.model.stem.weight, weight)
    assert not sim.model.stem.param_quantizers["weight"].frozen


# -------------------------------------------------------------------------------------------------
# load_encodings


def without(content, *names):
    return {
        key: [e for e in value if e["name"] not in names] if key.endswith("_encodings") else value
        for key, value in content.items()
    }


@pytest.fixture
def other():
    sim = QuantizationSimModel(network(), pictures())
    sim.compute_encodings([3 * X])
    return sim


def test_partial_files_leave_the_rest_as_it_was(sim, other):
    content = without(sim.encodings(), "stem.weight", "x")
    before, wanted = ranges(other), ranges(sim)
    report = other.load_encodings(content)
    assert sorted(report.missing) == ["stem.weight", "x"]
    after = ranges(other)
    for name, entry in after.items():
        assert entry == (before if name in report.missing else wanted)[name], name


def test_whole_files_switch_the_rest_off(sim, other):
    content = without(sim.encodings(), "stem.weight", "x")
    report = other.load_encodings(content, partial=False)
    off = {name for name, q in other.quantizers.items() if not q.enabled}
    off_there = {name for name, q in sim.quantizers.items() if not q.enabled}
    assert off == off_there | set(report.missing)


def test_strict_is_about_what_the_file_names(sim, other):
    content = sim.encodings()
    before = ranges(other)
    content["activation_encodings"][0] = content["activation_encodings"][0] | {"name": "nowhere"}
    with pytest.raises(EncodingMismatchError, match="'nowhere' has no quantizer"):
        other.load_encodings(content)
    assert ranges(other) == before
    assert other.load_encodings(content, strict=False).unknown == ("nowhere",)
    narrow = QuantizationSimModel(network(), pictures(), default_param_bw=4)
    with pytest.raises(EncodingMismatchError, match=r"stem\.weight.*and \d more"):
        narrow.load_encodings(sim.encodings())
    report = narrow.load_encodings(sim.encodings(), strict=False)
    assert report.different
    assert narrow.model.stem.param_quantizers["weight"].bits == 8


def test_loaded_ranges_learn_only_if_asked(sim, other):
    content = sim.encodings()
    other.load_encodings(content, requires_grad=False)
    loaded = [q for n, q in other.quantizers.items() if q.enabled]
    assert not any(q.minimum.requires_grad for q in loaded)
    grids = other.encodings()
    outputs(other)  # a weight's grid would follow the weight here
    assert other.encodings() == grids
    other.compute_encodings([2 * X])  # activations may be calibrated again
    assert other.encodings()["activation_encodings"] != grids["activation_encodings"]

    trained = copy.deepcopy(sim)
    for quantizer in trained.quantizers():
        quantizer.learnable = False
    trained.load_encodings(content)
    assert not any(q.minimum.requires_grad for q in trained.quantizers())
    trained.load_encodings(content, requires_grad=True)
    assert all(q.minimum.requires_grad for q in trained.quantizers() if q.enabled)


def test_what_may_not_be_overwritten_is_frozen(sim, other):
    content = without(sim.encodings(), "x")
    other.load_encodings(content, allow_overwrite=False)
    grids = {n: g for n, g in ranges(other).items() if n != "x"}
    other.compute_encodings([5 * X])
    assert {n: g for n, g in ranges(other).items() if n != "x"} == grids
    assert not other.quantizers["x"].frozen
    with pytest.raises(InvalidArgumentError, match="requires_grad"):
        other.load_encodings(content, requires_grad=True, allow_overwrite=False)


# -------------------------------------------------------------------------------------------------
# Values that no grid has


@pytest.mark.parametrize("grad", [True, False])
def test_nan_and_infinity_end_on_the_grid_after_calibration(sim, grad):
    """As in torch's fake quantization: NaN becomes the lowest value, infinities the ends."""
    x = X.clone()
    x[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    quantizer = sim.quantizers["x"]
    with torch.set_grad_enabled(grad):
        got = quantizer(x)
        low, high = quantizer.get_min(), quantizer.get_max()
        assert got[0, 0, 0, :3].tolist() == [low.item(), high.item(), low.item()]
        y = sim.model.eval()(x)
        assert y.isfinite().all()
        clean = sim.model(X)
    # Other samples of the batch do not notice.
    assert torch.equal(y[1:], clean[1:])
    scale, zero = quantizer.get_scale_and_zero_point()
    theirs = torch.fake_quantize_per_tensor_affine(x, scale.item(), int(zero), 0, 255)
    assert torch.equal(got.detach()[0, 0, 0, :3], theirs[0, 0, 0, :3])
