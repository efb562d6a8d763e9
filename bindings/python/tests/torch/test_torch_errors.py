# SPDX-License-Identifier: Apache-2.0
# What users get wrong with simulations: typed exceptions that name the layer, nothing half done.
import copy

import pytest

torch = pytest.importorskip("torch")

import torch_networks  # noqa: E402
from torch import nn  # noqa: E402

from halfstep.errors import (  # noqa: E402
    EmptyStatisticsError,
    EncodingMismatchError,
    InvalidArgumentError,
    InvalidStateError,
    MalformedFileError,
    NonFiniteValueError,
    UnknownNameError,
    UnsupportedVersionError,
)
from halfstep.torch import (  # noqa: E402
    DeviceMismatchError,
    QuantizationSimModel,
    UntraceableModelError,
    equalize_model,
    fold_all_batch_norms,
)

X = torch_networks.pictures(4)


@pytest.fixture(scope="module")
def pristine():
    sim = QuantizationSimModel(torch_networks.network(), X[:1])
    sim.compute_encodings([X])
    return sim


@pytest.fixture
def sim(pristine):
    return copy.deepcopy(pristine)


# -------------------------------------------------------------------------------------------------
# Construction


def test_arguments():
    net = torch_networks.network()
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got function"):
        QuantizationSimModel(net.forward.__func__, X[:1])
    with pytest.raises(InvalidArgumentError, match="param_bits.*17"):
        QuantizationSimModel(net, X[:1], default_param_bw=17)
    with pytest.raises(InvalidArgumentError, match="default_data_type.*float"):
        QuantizationSimModel(net, X[:1], default_data_type="float")
    with pytest.raises(UnknownNameError, match="'best'"):
        QuantizationSimModel(net, X[:1], "best")
    with pytest.raises(UnknownNameError, match="no_such_target"):
        QuantizationSimModel(net, X[:1], config_file="no_such_target")


@pytest.mark.parametrize(
    "dummy_input",
    [torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.int64), "picture"],
    ids=["channels", "dtype", "text"],
)
def test_a_dummy_input_that_the_model_does_not_take(dummy_input):
    with pytest.raises(UntraceableModelError, match="Net cannot be traced"):
        QuantizationSimModel(torch_networks.network(), dummy_input)


def test_a_weight_that_is_not_finite_is_named():
    net = torch_networks.network()
    with torch.no_grad():
        net.block.conv2.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteValueError, match=r"block\.conv2\.weight"):
        QuantizationSimModel(net, X[:1])


def test_equalization_refuses_a_layer_that_it_would_leave_alone():
    net = torch_networks.network().eval()
    with torch.no_grad():
        net.fc.weight[0, 0] = torch.nan
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(NonFiniteValueError, match=r"weight.*NaN or infinite"):
        equalize_model(net, X[:1])
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_model_on_two_devices_is_refused():
    net = torch_networks.network()
    net.fc.to("meta")
    with pytest.raises(DeviceMismatchError, match=r"'fc\.weight' is on meta"):
        QuantizationSimModel(net, X[:1])


@pytest.mark.parametrize("function", [fold_all_batch_norms, equalize_model])
def test_folding_an_untraceable_model_names_the_line(function):
    net = torch_networks.Branches()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(UntraceableModelError, match=r"torch_networks\.py:\d+.*if x\.sum"):
        function(net, torch.ones(2, 4))
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


# -------------------------------------------------------------------------------------------------
# Data


def test_empty_batches_pass_through_and_calibrate_nothing(sim):
    sim.model.eval()
    assert sim.model(X[:0]).shape == (0, 5)
    before = sim.encodings()
    with pytest.raises(EmptyStatisticsError, match="'x'"):
        sim.compute_encodings([X[:0]])
    assert sim.encodings() == before
    sim.compute_encodings([X[:0], X])
    assert sim.encodings() == before


def test_empty_batches_train_nothing(sim):
    sim.model.eval()
    sim.model(X[:0]).sum().backward()
    for name, parameter in sim.model.named_parameters():
        assert parameter.grad is None or not bool(parameter.grad.any()), name


def test_not_finite_data_is_named_and_changes_nothing(sim):
    before = sim.encodings()
    for value in (torch.nan, torch.inf):
        bad = X.clone()
        bad[1, 2, 3, 4] = value
        with pytest.raises(NonFiniteValueError, match="'x'"):
            sim.compute_encodings([X, bad])
        assert sim.encodings() == before
    # Behind the first layer: its name. Finite data, which overflows there.
    with pytest.raises(NonFiniteValueError, match="'relu'"):
        sim.compute_encodings([3e38 * X.sign()])
    assert sim.encodings() == before


def test_weights_that_training_made_not_finite_are_named(sim, tmp_path):
    with torch.no_grad():
        sim.model.depthwise.weight[2] = torch.inf
    with pytest.raises(NonFiniteValueError, match=r"depthwise\.weight"):
        sim.compute_encodings([X])


def test_inputs_elsewhere_name_the_quantizer(sim):
    with pytest.raises(InvalidStateError, match="quantizer 'x' is on cpu, its input on meta"):
        sim.model(X.to("meta"))


def test_integers_pass_quantizers_and_doubles_are_rounded(sim):
    quantizer = sim.quantizer("x")
    numbers = torch.arange(4)
    assert quantizer(numbers) is numbers
    doubled = quantizer(X.double())
    assert doubled.dtype == torch.float64 and torch.equal(doubled.float(), quantizer(X))


def test_callbacks_may_raise_anything(sim):
    before = sim.encodings()
    for error in (KeyError("mine"), KeyboardInterrupt(), StopIteration()):

        def fails(model, error=error):
            model(3 * X)
            raise error

        with pytest.raises(type(error)):
            sim.compute_encodings(fails)
        assert sim.encodings() == before
        assert all(quantizer.observer is None for quantizer in sim.quantizers.values())


# -------------------------------------------------------------------------------------------------
# Names and files


def test_layers_that_are_not_there(sim):
    with pytest.raises(UnknownNameError, match="'block.conv3'"):
        sim.exclude_layers_from_quantization(["block.conv3"])
    with pytest.raises(UnknownNameError, match=r"Linear\(in_features=3"):
        sim.exclude_layers_from_quantization([nn.Linear(3, 2)])
    with pytest.raises(UnknownNameError, match="'drop' computes nothing"):
        sim.exclude_layers_from_quantization([sim.model.drop])


def test_frozen_quantizers_do_not_change(sim):
    quantizer = sim.model.stem.param_quantizers["weight"]
    quantizer.freeze()
    for change in (
        lambda: quantizer.set_range(-1, 1),
        lambda: setattr(quantizer, "bits", 4),
        quantizer.clear_range,
    ):
        with pytest.raises(InvalidStateError, match=r"'stem\.weight' is frozen"):
            change()


def test_encodings_that_do_not_fit_are_named(sim, tmp_path):
    before = sim.encodings()
    content = sim.encodings()
    (entry,) = (e for e in content["param_encodings"] if e["name"] == "stem.weight")
    entry["scale"], entry["offset"] = entry["scale"][:3], entry["offset"][:3]
    with pytest.raises(EncodingMismatchError, match=r"'stem\.weight'.*8 scales.*got 3"):
        sim.load_encodings(content)
    assert sim.encodings() == before
    with pytest.raises(EncodingMismatchError, match=r"'stem\.weight'.*8 scales.*got 3"):
        sim.set_and_freeze_param_encodings({"version": "1.0.0", "param_encodings": [entry]})
    with pytest.raises(UnsupportedVersionError, match=r"7\.0\.0"):
        sim.load_encodings(sim.encodings() | {"version": "7.0.0"})
    (tmp_path / "text").write_text("no JSON")
    with pytest.raises(MalformedFileError, match="text"):
        sim.load_encodings(tmp_path / "text")
    (tmp_path / "list").write_text("[1]")
    with pytest.raises(MalformedFileError, match="list"):
        sim.load_encodings(tmp_path / "list")
    assert sim.encodings() == before


def test_one_scale_serves_all_channels(sim):
    content = QuantizationSimModel(torch_networks.network(), X[:1], config_file="default")
    content.compute_encodings([X])
    (entry,) = (e for e in content.encodings()["param_encodings"] if e["name"] == "stem.weight")
    assert len(entry["scale"]) == 1
    sim.set_and_freeze_param_encodings({"version": "1.0.0", "param_encodings": [entry]})
    scales = sim.model.stem.param_quantizers["weight"].get_encoding()["scale"]
    assert scales.shape == (8,) and scales == pytest.approx(entry["scale"][0], rel=1e-6)


@pytest.mark.parametrize("prefix", ["", "a/b", "../net"])
def test_prefixes_are_file_names(sim, prefix, tmp_path):
    with pytest.raises(InvalidArgumentError, match="prefix"):
        sim.export(tmp_path, prefix)
    assert not list(tmp_path.iterdir())
