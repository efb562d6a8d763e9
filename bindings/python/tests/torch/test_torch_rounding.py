# SPDX-License-Identifier: Apache-2.0
# AdaRound, sequential MSE and bias correction of PyTorch modules, beside the engine on ONNX.
import copy
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("halfstep.torch")

from torch import nn  # noqa: E402

import halfstep  # noqa: E402
from halfstep.errors import (  # noqa: E402
    CancelledError,
    EmptyStatisticsError,
    FileAccessError,
    InvalidArgumentError,
    InvalidStateError,
    NonFiniteValueError,
    UnknownNameError,
)
from halfstep.torch import (  # noqa: E402
    AdaroundParameters,
    QuantizationSimModel,
    QuantParams,
    apply_adaround,
    apply_seq_mse,
    correct_bias,
    fold_all_batch_norms,
)


class Small(nn.Module):
    """Dense, depthwise and pointwise convolutions, a layer without bias, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False)
        self.point = nn.Conv2d(8, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        x = torch.relu(self.point(self.depthwise(x)))
        return self.fc(x.mean((2, 3)))


WEIGHTS = ("conv.weight", "depthwise.weight", "point.weight", "fc.weight")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 3, 12, 12, generator=generator) for _ in range(4)]


@pytest.fixture(scope="module")
def onnx_file(network, data, tmp_path_factory):
    """The same module as a file, written by the simulation's export."""
    folder = tmp_path_factory.mktemp("exported")
    sim = QuantizationSimModel(network, data[0][:1])
    sim.compute_encodings(data)
    sim.export(folder, "net")
    return folder / "net.onnx"


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(
        torch.equal(after[name], value) for name, value in before.items()
    )


def run(network, data, folder, **options):
    params = AdaroundParameters(data, len(data))
    options = {"progress": False, "default_quant_scheme": "min_max"} | options
    return apply_adaround(network, torch.zeros(1, 3, 12, 12), params, folder, "net", **options)


@pytest.mark.parametrize("method", ["auto", "gram", "gradient", "sequential_mse"])
def test_weights_are_the_engines_on_the_exported_file(network, data, onnx_file, tmp_path, method):
    options = {"iterations": 40} if method == "gradient" else {}
    before = state(network)
    rounded = run(network, data, tmp_path, method=method, **options)
    assert same(network, before) and rounded is not network
    model = halfstep.Model.load(onnx_file)
    (name,) = (info.name for info in model.inputs)
    model.adaround(
        {name: np.concatenate([batch.numpy() for batch in data])}, 4, method=method, **options
    )
    held = model.initializers
    for weight in (*WEIGHTS, "conv.bias", "point.bias", "fc.bias"):
        assert np.array_equal(rounded.state_dict()[weight].numpy(), held[weight]), weight
    assert any(not torch.equal(rounded.state_dict()[w], before[w]) for w in WEIGHTS)


def test_simulation_takes_the_file_and_keeps_the_weights(network, data, tmp_path):
    rounded = run(network, data, tmp_path)
    content = json.loads((tmp_path / "net.encodings").read_text())
    assert {entry["name"] for entry in content["param_encodings"]} == set(WEIGHTS)
    assert not content["activation_encodings"]
    sim = QuantizationSimModel(rounded, data[0][:1], default_param_bw=4)
    sim.set_and_freeze_param_encodings(tmp_path / "net.encodings")
    sim.compute_encodings(data)
    for name in WEIGHTS:
        quantizer, weight = sim.quantizer(name), rounded.state_dict()[name]
        assert quantizer.frozen and quantizer.bits == 4
        assert torch.equal(quantizer(weight), weight), name
    nearest = QuantizationSimModel(network, data[0][:1], default_param_bw=4)
    nearest.compute_encodings(data)
    with torch.no_grad():
        expected = torch.cat([network(batch) for batch in data])
        errors = [
            (torch.cat([s.model(batch) for batch in data]) - expected).square().sum()
            for s in (sim, nearest)
        ]
    assert errors[0] < errors[1]


def test_widths_of_layers_and_layers_left_alone(network, data, tmp_path):
    seen = []
    rounded = run(
        network,
        data,
        tmp_path,
        param_bw_override_list=[(network.fc, 8), (network.conv, 6)],
        ignore_quant_ops_list=[network.point],
        progress=lambda done, total: seen.append((done, total)),
    )
    content = json.loads((tmp_path / "net.encodings").read_text())
    widths = {entry["name"]: entry["bw"] for entry in content["param_encodings"]}
    assert widths == {"conv.weight": 6, "depthwise.weight": 4, "fc.weight": 8}
    assert torch.equal(rounded.point.weight, network.point.weight)
    sim = QuantizationSimModel(rounded, data[0][:1], default_param_bw=4)
    sim.set_and_freeze_param_encodings(tmp_path / "net.encodings")
    for name, bits in widths.items():
        quantizer, weight = sim.quantizer(name), rounded.state_dict()[name]
        assert quantizer.bits == bits and torch.equal(quantizer(weight), weight), name
    assert seen and all(done <= total for done, total in seen)


def test_what_data_loaders_and_forward_functions_give_is_the_same(network, data, tmp_path):
    labels = torch.zeros(64)
    dataset = torch.utils.data.TensorDataset(torch.cat(data), labels)
    loader = torch.utils.data.DataLoader(dataset, batch_size=10)
    expected = state(run(network, data, tmp_path))
    params = AdaroundParameters(loader, 7)
    assert same(
        apply_adaround(
            network, data[0][:1], params, tmp_path, "b", 4, None, None, "min_max", progress=False
        ),
        expected,
    )
    named = [{"picture": batch} for batch in data]
    params = AdaroundParameters(named, 4, forward_fn=lambda model, x: model(x=x["picture"]))
    result = apply_adaround(
        network, data[0][:1], params, tmp_path, "c", 4, None, None, "min_max", progress=False
    )
    assert same(result, expected)
    assert not network._forward_pre_hooks
    # Batches beyond num_batches do not count.
    params = AdaroundParameters([*data[:2], data[2] * float("nan")], 2)
    apply_adaround(network, data[0][:1], params, tmp_path, "d", progress=False)


def test_iterations_ask_for_gradient_descent(network, data, tmp_path):
    params = AdaroundParameters(data, 4, default_num_iterations=40)
    result = apply_adaround(
        network, data[0][:1], params, tmp_path, "net", 4, None, None, "min_max", progress=False
    )
    assert same(result, state(run(network, data, tmp_path, method="gradient", iterations=40)))


def test_errors_leave_the_model_and_the_folder(network, data, tmp_path):
    before = state(network)

    def fails(error, match, batches=data, **options):
        with pytest.raises(error, match=match):
            run(network, batches, tmp_path, **options)
        assert same(network, before)
        assert not list(tmp_path.iterdir())

    fails(NonFiniteValueError, None, [data[0], data[1] * float("nan")])
    fails(UnknownNameError, "'none'", method="none")
    fails(InvalidArgumentError, "param_bits|bits", default_param_bw=1)
    fails(UnknownNameError, "no_such", default_quant_scheme="no_such")
    fails(UnknownNameError, "not part of the model", ignore_quant_ops_list=[nn.ReLU()])
    fails(UnknownNameError, "not part", param_bw_override_list=[(nn.ReLU(), 8)])
    fails(InvalidArgumentError, "fit together", [data[0], data[1][:, :, :6]])
    fails(InvalidArgumentError, "expected 1 inputs", [[]])
    fails(CancelledError, None, progress=lambda done, total: False)

    def stop(done, total):
        raise KeyError("stop")

    fails(KeyError, "stop", progress=stop)
    for batches in ([], torch.utils.data.DataLoader(torch.zeros(0, 3, 12, 12))):
        with pytest.raises(EmptyStatisticsError, match="no batches"):
            apply_adaround(network, data[0], AdaroundParameters(batches, 1), tmp_path, "net")
    with pytest.raises(InvalidArgumentError, match="did not call"):
        params = AdaroundParameters(data, 1, forward_fn=lambda model, x: None)
        apply_adaround(network, data[0], params, tmp_path, "net")
    with pytest.raises(InvalidArgumentError, match="filename_prefix"):
        apply_adaround(network, data[0], AdaroundParameters(data, 1), tmp_path, "a/b")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileAccessError):
        apply_adaround(network, data[0], AdaroundParameters(data, 1), tmp_path / "file", "net")
    with pytest.raises(InvalidArgumentError, match="num_batches"):
        AdaroundParameters(data, num_batches=0)
    for name, value in (
        ("reg_param", -1),
        ("beta_range", (20, 0.5)),
        ("warm_start", 1.0),
    ):
        params = AdaroundParameters(data, 2, 10, **{f"default_{name}": value})
        with pytest.raises(InvalidArgumentError, match=name.replace("_", "[_ ]")):
            apply_adaround(network, data[0], params, tmp_path, "net", progress=False)
    with pytest.raises(InvalidStateError, match="has quantizers"):
        sim = QuantizationSimModel(network, data[0])
        run(sim.model, data, tmp_path)
    assert same(network, before)


def test_sequential_mse_sets_and_keeps_the_grids_of_a_simulation(
    network, data, onnx_file, tmp_path
):
    sim = QuantizationSimModel(network, data[0][:1], default_param_bw=4)
    sim.quantizer("fc.weight").bits = 6
    before = state(sim.get_original_model())
    apply_seq_mse(sim, data, modules_to_exclude=[sim.model.point], progress=False)
    assert same(sim.get_original_model(), before)
    frozen = {name for name, quantizer in sim.quantizers.items() if quantizer.frozen}
    assert frozen == set(WEIGHTS) - {"point.weight"}
    assert sim.quantizer("fc.weight").bits == 6
    sim.compute_encodings(data)
    # One width for all: what the engine makes of the file.
    plain = QuantizationSimModel(network, data[0][:1], default_param_bw=4)
    apply_seq_mse(plain, data, progress=False)
    model = halfstep.Model.load(onnx_file)
    (name,) = (info.name for info in model.inputs)
    values = {name: np.concatenate([batch.numpy() for batch in data])}
    model.adaround(values, 4, method="sequential_mse")
    for weight in WEIGHTS:
        quantizer = plain.quantizer(weight)
        quantized = quantizer(network.state_dict()[weight]).detach().numpy()
        assert np.array_equal(quantized, model.initializers[weight]), weight


def test_sequential_mse_refuses(network, data):
    sim = QuantizationSimModel(network, data[0][:1], default_param_bw=4)
    with pytest.raises(InvalidArgumentError, match="num_candidates"):
        apply_seq_mse(sim, data, 0)
    with pytest.raises(EmptyStatisticsError):
        apply_seq_mse(sim, [])
    with pytest.raises(UnknownNameError):
        apply_seq_mse(sim, data, modules_to_exclude=[nn.ReLU()])
    with pytest.raises(CancelledError):
        apply_seq_mse(sim, data, progress=lambda done, total: False)
    assert not any(quantizer.frozen for quantizer in sim.quantizers.values())


def test_bias_correction_is_the_engines(network, data, onnx_file):
    model = copy.deepcopy(network)
    batches = [(batch, torch.zeros(16)) for batch in data]
    params = QuantParams(weight_bw=4, act_bw=8, quant_scheme="min_max")
    layers = correct_bias(model, params, 10, batches, 40, progress=False)
    loaded = halfstep.Model.load(onnx_file)
    (name,) = (info.name for info in loaded.inputs)
    expected = loaded.correct_biases({name: torch.cat(data)[:40].numpy()}, 4)
    assert [(one.weight, one.kept) for one in layers] == [(e.weight, e.kept) for e in expected]
    for key, value in state(network).items():
        now = model.state_dict()[key]
        assert np.array_equal(now.numpy(), loaded.initializers[key]), key
        assert key.endswith(".bias") or torch.equal(now, value)
    corrected = [one for one in layers if one.kept != "nearest"]
    assert corrected
    changed = [k for k, v in model.state_dict().items() if k not in network.state_dict()]
    assert set(changed) <= {"depthwise.bias"}


class Normed(nn.Module):
    """Convolutions with batch norms, from which means are known."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.point(torch.relu(self.bn(self.conv(x)))))
        return self.fc(x.mean((2, 3)))


def test_analytic_bias_correction_needs_no_data(data):
    torch.manual_seed(3)
    original = Normed().eval()
    nn.init.normal_(original.bn.bias, std=0.5)
    nn.init.uniform_(original.bn.weight, 0.5, 1.5)
    model, folded = copy.deepcopy(original), copy.deepcopy(original)
    batches = iter([data[0][:1]])  # shows the shape only
    params = QuantParams(weight_bw=4, quant_scheme="min_max")
    layers = correct_bias(model, params, 1, batches, 64, None, False, progress=False)
    assert isinstance(model.bn, nn.Identity)
    assert any(layer.kept != "nearest" for layer in layers)

    fold_all_batch_norms(folded, data[0][:1])
    for key, value in folded.state_dict().items():
        if not key.endswith(".bias"):
            assert torch.equal(model.state_dict()[key], value), key
    # By hand: point.bias -= (q(w) - w) · E(relu(n)), n as the batch norm lets expect.
    mean, deviation = original.bn.bias.double(), original.bn.weight.double().abs()
    ratio = mean / deviation
    density = torch.exp(-(ratio**2) / 2) / (2 * torch.pi) ** 0.5
    below = torch.special.ndtr(ratio)
    expected = mean * below + deviation * density
    sim = QuantizationSimModel(folded, data[0][:1], default_param_bw=4)
    with torch.no_grad():
        weight = folded.point.weight
        error = (sim.model.point.param_quantizers["weight"](weight) - weight).double()[:, :, 0, 0]
        wanted = folded.point.bias.double() - error @ expected
    torch.testing.assert_close(model.point.bias.double(), wanted, rtol=1e-5, atol=1e-7)


def test_bias_correction_refuses(network, data):
    model = copy.deepcopy(network)
    before = state(model)
    with pytest.raises(InvalidStateError, match="empirical.*no batch norms"):
        correct_bias(model, QuantParams(), 1, data, 1, None, False)
    with pytest.raises(InvalidArgumentError, match="round_mode"):
        QuantParams(round_mode="stochastic")
    with pytest.raises(InvalidArgumentError, match="1 or more"):
        correct_bias(model, QuantParams(), 0, data, 0)
    with pytest.raises(EmptyStatisticsError):
        correct_bias(model, QuantParams(), 1, [], 1)
    with pytest.raises(CancelledError):
        correct_bias(model, QuantParams(), 16, data, 16, progress=lambda done, total: False)
    assert same(model, before)
