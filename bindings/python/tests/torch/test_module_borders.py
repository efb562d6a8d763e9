# SPDX-License-Identifier: Apache-2.0
# Networks whose Python code cannot be traced: simulated module by module.
import copy
import json
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch_networks  # noqa: E402
from torch import nn  # noqa: E402

from halfstep.errors import (  # noqa: E402
    EmptyStatisticsError,
    EncodingMismatchError,
    InvalidArgumentError,
)
from halfstep.torch import (  # noqa: E402
    AdaroundParameters,
    QuantizationSimModel,
    QuantParams,
    UntraceableModelError,
    apply_adaround,
    apply_seq_mse,
    correct_bias,
    fold_all_batch_norms,
    load_checkpoint,
    save_checkpoint,
)

X = torch_networks.pictures(8)


class Early(nn.Module):
    """Leaves early by what it sees; one layer is only called then."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.block = torch_networks.Block(8)
        self.fc = nn.Linear(8, 5)
        self.early = nn.Linear(8, 5)
        self.tail = nn.ModuleList([nn.Linear(5, 5), nn.GELU()])
        self.threshold = 1000.0

    def forward(self, x):
        x = self.block(self.norm(self.stem(x)))
        x = x.mean((2, 3))
        if x.max() > self.threshold:  # the line that the warning names
            return self.early(x)
        x = self.fc(x)
        for layer in self.tail:
            x = layer(x)
        return x

    def describe(self):
        return f"{self.fc.out_features} classes"


def early():
    torch.manual_seed(5)
    net = Early()
    nn.init.uniform_(net.norm.running_var, 0.5, 1.5)
    return net.eval()


@pytest.fixture(scope="module")
def pristine():
    with pytest.warns(UserWarning, match=r"if x\.max.*these are not: early"):
        sim = QuantizationSimModel(early(), X[:1], fallback="modules")
    sim.compute_encodings([X])
    return sim


@pytest.fixture
def sim(pristine):
    return copy.deepcopy(pristine)


def outputs(model, x=X):
    model.eval()
    with torch.no_grad():
        return model(x)


def test_without_the_fallback_the_error_names_it():
    with pytest.raises(UntraceableModelError, match=r'if x\.max.*fallback="modules"'):
        QuantizationSimModel(early(), X[:1])
    with pytest.raises(InvalidArgumentError, match="'leaves'"):
        QuantizationSimModel(early(), X[:1], fallback="leaves")


def test_a_traceable_network_needs_no_fallback():
    net, x = torch_networks.network(), torch_networks.pictures(1)
    one = QuantizationSimModel(net, x, fallback="modules")
    other = QuantizationSimModel(net, x)
    assert list(one.quantizers) == list(other.quantizers)


def test_modules_are_quantized_as_the_engine_quantizes_them_alone(sim):
    assert [part.place for part in sim._parts] == [
        "stem",
        "norm",
        "block",
        "fc",
        "tail.0",
        "tail.1",
    ]
    assert isinstance(sim.model, Early) and sim.model.describe() == "5 classes"
    # The block was traced as a whole: the sum in front of its ReLU has no quantizer.
    assert [n for n, q in sim.quantizers.items() if n.startswith("block.") and q.enabled] == [
        "block.x",
        "block.conv1.weight",
        "block.relu",
        "block.conv2.weight",
        "block.batch_norm_1",
        "block.relu_1",
    ]
    alone = QuantizationSimModel(early().fc, torch.ones(2, 8))
    theirs = {name: (q.bits, q.is_symmetric) for name, q in alone.quantizers.items()}
    ours = {
        name.removeprefix("fc."): (q.bits, q.is_symmetric)
        for name, q in sim.quantizers.items()
        if name.startswith("fc.")
    }
    assert ours == theirs and "weight" in ours
    # Each part computes what the engine computes from the same input.
    seen = []
    fc = sim.model.fc
    handle = fc.register_forward_hook(lambda module, args, result: seen.append((args[0], result)))
    outputs(sim.model)
    handle.remove()
    (part,) = (part for part in sim._parts if part.place == "fc")
    engine = part.engine(keeps_ranges=True)
    ((given, got),) = seen
    (expected,) = engine.run(given.numpy()).values()
    step = float(fc.output_quantizers[0].get_encoding()["scale"])
    off = np.abs(got.numpy() - expected) / step
    assert off.max() < 1.01 and (off > 0.5).mean() <= 0.05


def test_python_code_still_decides(sim):
    quantized = outputs(sim.model)
    reference = outputs(early())
    assert float((quantized - reference).abs().max()) < 0.1 * float(reference.abs().max())
    assert not torch.equal(quantized, reference)
    sim.model.threshold = -1e9
    seen = []
    sim.model.early.register_forward_hook(lambda module, args, result: seen.append(result))
    got = outputs(sim.model)
    # The layer that the construction did not see is in float.
    assert torch.equal(got, seen[0]) and not torch.equal(got, quantized)


def test_training_learns_weights_ranges_and_statistics(sim):
    sim.model.train()
    weight = sim.model.fc.weight.detach().clone()
    high = sim.model.fc.output_quantizers[0].maximum.detach().clone()
    optimizer = torch.optim.SGD(sim.model.parameters(), lr=0.1)
    first = None
    for _ in range(4):
        optimizer.zero_grad()
        loss = sim.model(X).square().mean()
        loss.backward()
        optimizer.step()
        first = loss.item() if first is None else first
    assert loss.item() < first
    assert not torch.equal(sim.model.fc.weight, weight)
    assert not torch.equal(sim.model.fc.output_quantizers[0].maximum, high)
    assert int(sim.model.norm.num_batches_tracked) == 4
    assert int(sim.model.block.bn1.num_batches_tracked) == 4


def test_copies_checkpoints_and_state_dicts(sim, pristine, tmp_path):
    with torch.no_grad():
        sim.model.fc.weight.mul_(1.1)
    expected = outputs(sim.model)
    assert torch.equal(outputs(copy.deepcopy(sim.model)), expected)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(sim.model))), expected)
    save_checkpoint(sim, tmp_path / "sim.pkl")
    loaded = load_checkpoint(tmp_path / "sim.pkl")
    assert torch.equal(outputs(loaded.model), expected) and loaded.encodings() == sim.encodings()
    other = copy.deepcopy(pristine)
    assert not torch.equal(outputs(other.model), expected)
    other.model.load_state_dict(sim.model.state_dict())
    assert torch.equal(outputs(other.model), expected)
    original = sim.get_original_model()
    assert original.state_dict().keys() == early().state_dict().keys()
    assert "forward" not in original.fc.__dict__


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0"])
def test_export_and_load(sim, pristine, version, tmp_path):
    with pytest.warns(UserWarning, match=r"net\.onnx' is not written.*if x\.max"):
        sim.export(tmp_path, "net", encoding_version=version)
    assert {file.name for file in tmp_path.iterdir()} == {"net.pth", "net.encodings"}
    original = torch.load(tmp_path / "net.pth", weights_only=False)
    assert torch.equal(outputs(original), outputs(early()))
    text = (tmp_path / "net.encodings").read_text()
    assert '"block.conv1.weight"' in text and '"tail.1.gelu"' in text
    other = copy.deepcopy(pristine)
    other.model.fc.output_quantizers[0].set_range(-9.0, 9.0)
    other.load_encodings(tmp_path / "net.encodings")
    assert torch.equal(outputs(other.model), outputs(sim.model))
    content = json.loads(text)
    if version == "1.0.0":
        content["param_encodings"][0]["name"] = "nowhere.weight"
        with pytest.raises(EncodingMismatchError, match=r"'nowhere\.weight'"):
            other.load_encodings(content)
        assert "nowhere.weight" in other.load_encodings(content, strict=False).unknown


def test_parameter_encodings_are_frozen(sim):
    entry = next(e for e in sim.encodings()["param_encodings"] if e["name"] == "fc.weight")
    entry["scale"] = [2 * scale for scale in entry["scale"]]
    sim.set_and_freeze_param_encodings({"version": "1.0.0", "param_encodings": [entry]})
    sim.compute_encodings([X])
    kept = sim.model.fc.param_quantizers["weight"]
    assert kept.frozen
    np.testing.assert_allclose(kept.get_encoding()["scale"], entry["scale"], rtol=1e-6)


def test_layers_are_excluded_inside_and_around_parts(sim):
    sim.exclude_layers_from_quantization([sim.model.block.conv2, "tail"])
    on = {name for name, quantizer in sim.quantizers.items() if quantizer.enabled}
    assert "block.conv1.weight" in on and "block.conv2.weight" not in on
    assert not any(name.startswith("tail.") for name in on)
    with torch.no_grad():
        sim.model(X)


def test_what_needs_the_whole_graph_says_so(sim, tmp_path):
    with pytest.raises(UntraceableModelError, match=r"graph of the whole network.*if x\.max"):
        sim.onnx.export(tmp_path / "q.onnx")
    assert not list(tmp_path.iterdir())


def test_rounding_says_what_is_in_the_way_and_what_to_do(sim, tmp_path):
    params = AdaroundParameters([X], 1)
    before = [p.clone() for n, p in sim.model.named_parameters() if n.endswith("weight")]
    reason = r"if x\.max.*round the modules that can be traced one by one with apply_adaround"
    with pytest.raises(UntraceableModelError, match=reason):
        apply_seq_mse(sim, [X])
    with pytest.raises(UntraceableModelError, match=reason):
        apply_adaround(early(), X[:1], params, tmp_path, "net")
    with pytest.raises(UntraceableModelError, match=reason):
        correct_bias(early(), QuantParams(), 8, [X], 8)
    after = [p for n, p in sim.model.named_parameters() if n.endswith("weight")]
    assert before and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not list(tmp_path.iterdir())

    # As the message and docs/pytorch.md have it.
    net, seen = early(), []
    handle = net.block.register_forward_hook(lambda module, args, result: seen.append(args[0]))
    outputs(net)
    handle.remove()
    wanted = outputs(net.block, seen[0])
    fold_all_batch_norms(net.block, dummy_input=seen[0][:1])
    net.block = apply_adaround(
        net.block, seen[0][:1], AdaroundParameters(seen, 1), tmp_path, "block", progress=False
    )
    document = json.loads((tmp_path / "block.encodings").read_text())
    for entry in document["param_encodings"]:
        entry["name"] = f"block.{entry['name']}"
    with pytest.warns(UserWarning, match=r"if x\.max"):
        rounded = QuantizationSimModel(net, X[:1], default_param_bw=4, fallback="modules")
    rounded.set_and_freeze_param_encodings(document)
    rounded.compute_encodings([X])
    for name in ("block.conv1.weight", "block.conv2.weight"):
        weight = net.get_parameter(name)
        assert rounded.quantizers[name].bits == 4
        assert torch.equal(rounded.quantizers[name](weight), weight)
    with pytest.warns(UserWarning, match=r"if x\.max"):
        nearest = QuantizationSimModel(early(), X[:1], default_param_bw=4, fallback="modules")
    nearest.compute_encodings([X])
    blocks = [outputs(simulated.model.block, seen[0]) for simulated in (rounded, nearest)]
    noise = [float((block - wanted).square().sum()) for block in blocks]
    assert noise[0] < noise[1]


def test_failed_calibrations_name_the_module_and_change_nothing(sim):
    before = sim.encodings()
    with pytest.raises(EmptyStatisticsError, match="module 'stem'"):
        sim.compute_encodings(lambda model: None)
    assert sim.encodings() == before
    assert all(quantizer.observer is None for quantizer in sim.quantizers.values())


class Nothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.weight if x.sum() > 0 else x


def test_a_network_without_traceable_modules_is_an_error():
    with pytest.raises(UntraceableModelError, match="no module of it can be traced"):
        QuantizationSimModel(Nothing(), torch.ones(2, 4), fallback="modules")


class Pyramid(nn.Module):
    """Runs the same modules at several sizes, and with sequences of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.block = torch_networks.Block(3)
        self.mix = nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 3))

    def forward(self, x):
        total = 0.0
        for _ in range(2):
            x = self.block(x)
            if float(x.sum()) == 0.123:
                return x
            total = total + self.mix(x.flatten(2).transpose(1, 2)).mean(1)
            x = x[:, :, ::2, ::2]
        return total


def test_modules_that_are_called_with_several_shapes():
    torch.manual_seed(2)
    net = Pyramid().eval()
    with pytest.warns(UserWarning, match="2 of its modules"):
        sim = QuantizationSimModel(net, X[:2], fallback="modules")
    assert [part.place for part in sim._parts] == ["block", "mix"]
    sim.compute_encodings([X])
    for inputs in (X, X[:1]):
        got, expected = outputs(sim.model, inputs), outputs(net, inputs)
        # About ten 8-bit tensors on the way, each off by half a step: a few percent of the range.
        assert float((got - expected).abs().max()) < 0.1 * float(expected.abs().max())
        assert not torch.equal(got, expected)
