# SPDX-License-Identifier: Apache-2.0
# Simulation of live modules: placement, calibration, training, export.
import copy
import json
import os
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest

torch = pytest.importorskip("torch")

import torch_networks  # noqa: E402
from torch import nn  # noqa: E402

import halfstep  # noqa: E402
from halfstep.errors import (  # noqa: E402
    EmptyStatisticsError,
    EncodingMismatchError,
    InvalidStateError,
    NonFiniteValueError,
    UnknownNameError,
)
from halfstep.torch import (  # noqa: E402
    DeviceMismatchError,
    QuantizationSimModel,
    UntraceableModelError,
    fold_all_batch_norms,
)


def simulate(**options):
    net = torch_networks.network()
    return QuantizationSimModel(net, torch_networks.pictures(1), **options)


@pytest.fixture(scope="module")
def pristine():
    """A calibrated simulation that no test changes: tracing takes seconds, a copy does not."""
    result = simulate()
    result.compute_encodings(lambda model: model(torch_networks.pictures(8)))
    return result


@pytest.fixture
def sim(pristine):
    return copy.deepcopy(pristine)


def output_of(sim):
    """Name and step of the output."""
    name = sim._network.exported.outputs[0]
    return name, float(sim.quantizer(name).get_encoding()["scale"])


def expect_equal(sim, theirs, inputs):
    """The module's outputs are another runtime's up to one step, most of them exactly."""
    sim.model.eval()
    with torch.no_grad():
        ours = sim.model(inputs).numpy()
    name, step = output_of(sim)
    off = np.abs(ours - theirs) / step
    # Sums in another order may take a value across a border: one step, for a few values at most.
    assert off.max() < 1.01
    assert (off > 0.5).mean() <= 0.05


def run_qdq(path, inputs):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0]


# -------------------------------------------------------------------------------------------------
# Placement


def test_functional_operators_and_each_call_of_a_module_are_quantized(sim):
    model = sim.model
    assert len(model.block.relu.output_quantizers) == 2
    # Sums and convolutions in front of a ReLU go on in wide integers: the engine knows the pattern.
    assert not hasattr(model.block, "functional_quantizers")
    assert {"relu", "hardswish", "cat", "mean"} <= set(model.functional_quantizers)
    assert list(model.stem.param_quantizers) == ["weight"]
    assert model.stem.param_quantizers["weight"].channel_axis == 0
    assert list(model.input_quantizers) == ["x"]
    assert "uint8" in repr(model) and "SimulatedNet" in repr(model)


def test_state_dict_keys_survive(sim):
    original = torch_networks.network()
    state = sim.model.state_dict()
    assert original.state_dict().keys() <= state.keys()
    missing, unexpected = sim.model.load_state_dict(original.state_dict(), strict=False)
    assert not unexpected and all("quantizers" in key for key in missing)


def test_original_is_left_alone_unless_in_place():
    net = torch_networks.network()
    keys = list(net.state_dict())
    QuantizationSimModel(net, torch_networks.pictures(1))
    assert list(net.state_dict()) == keys
    sim = QuantizationSimModel(net, torch_networks.pictures(1), in_place=True)
    assert sim.model.stem is net.stem
    with pytest.raises(InvalidStateError, match="quantizers already"):
        QuantizationSimModel(net, torch_networks.pictures(1))


def test_without_encodings_the_function_is_the_original_with_rounded_weights():
    sim = simulate()
    for name, quantizer in sim.quantizers.items():
        quantizer.enabled = False
        assert quantizer.has_range == (sim._roles[name])
    x = torch_networks.pictures(2)
    with torch.no_grad():
        # The same operators in the same order; mean and views may be computed by other kernels.
        torch.testing.assert_close(sim.model.eval()(x), torch_networks.network()(x))


# -------------------------------------------------------------------------------------------------
# Parity


@pytest.mark.parametrize("scheme", ["min_max", "tf_enhanced", "percentile", "mse"])
@pytest.mark.parametrize("bits", [(8, 8), (4, 16)])
def test_grids_and_outputs_equal_the_engine(scheme, bits, tmp_path):
    sim = simulate(quant_scheme=scheme, default_param_bw=bits[0], default_output_bw=bits[1])
    x = torch_networks.pictures(8)
    sim.compute_encodings(lambda model: [model(x[:3]), model(x[3:])])
    twin = sim._engine(keeps_ranges=False)
    twin.compute_encodings([x.numpy()], progress=False)
    ours, theirs = sim.encodings(), twin.encodings()
    assert ours["param_encodings"] == theirs["param_encodings"]
    for one, other in zip(
        ours["activation_encodings"], theirs["activation_encodings"], strict=True
    ):
        assert one["name"] == other["name"] and one["bw"] == other["bw"] == bits[1]
        # Tensors differ by float rounding between the runtimes, about 1e-6; where a scheme
        # searches, that may decide between candidates that are equally good.
        close = 2e-5 if scheme == "min_max" else 0.05
        assert one["scale"] == pytest.approx(other["scale"], rel=close)
    inputs = torch_networks.pictures(16, seed=5)
    name, _ = output_of(sim)
    engine = sim._engine(keeps_ranges=True)
    if bits[1] == 8:
        expect_equal(sim, engine.run(inputs.numpy())[name], inputs)
        sim.onnx.export(tmp_path / "q.onnx")
        expect_equal(sim, run_qdq(tmp_path / "q.onnx", inputs), inputs)


def test_range_does_not_depend_on_batches_or_order():
    x = torch_networks.pictures(8)
    results = []
    for batches in ([x], [x[4:], x[:4]], [x[i : i + 1] for i in range(8)]):
        sim = simulate(quant_scheme="sqnr")
        sim.compute_encodings(lambda model, data: [model(batch) for batch in data], batches)
        results.append(sim.encodings())
    # Convolutions of other batch sizes may round elsewhere; equal batches give equal bits.
    again = simulate(quant_scheme="sqnr")
    again.compute_encodings([x])
    assert again.encodings() == results[0]
    for one in results[1:]:
        for a, b in zip(
            one["activation_encodings"], results[0]["activation_encodings"], strict=True
        ):
            assert a["scale"] == pytest.approx(b["scale"], rel=0.05)


def test_data_loaders_are_understood():
    x = torch_networks.pictures(8)
    labels = torch.zeros(8)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=8)
    one, other = simulate(), simulate()
    one.compute_encodings(loader)
    other.compute_encodings(lambda model: model(x))
    assert one.encodings() == other.encodings()


# -------------------------------------------------------------------------------------------------
# Calibration that fails


def test_failed_calibration_leaves_everything_as_it_was(sim):
    before = sim.encodings()
    sim.model.train()
    state = {k: v.clone() for k, v in sim.model.state_dict().items() if torch.is_tensor(v)}

    def fails(model):
        model(10 * torch_networks.pictures(2))
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        sim.compute_encodings(fails)
    assert sim.encodings() == before
    assert sim.model.training and sim.model.block.bn1.training
    assert all(q.observer is None for q in sim.quantizers.values())
    for key, value in sim.model.state_dict().items():
        if torch.is_tensor(value):
            # Quantizers that are off may have no range, which NaN stands for.
            assert torch.equal(value.nan_to_num(), state[key].nan_to_num()), key


def test_calibration_without_data_names_tensors():
    sim = simulate()
    with pytest.raises(EmptyStatisticsError, match="'x'"):
        sim.compute_encodings(lambda model: None)
    with pytest.raises(InvalidStateError, match="'x'"):
        sim.encodings()
    with pytest.raises(NonFiniteValueError, match="'x'"):
        sim.compute_encodings(lambda model: model(torch.full((1, 3, 8, 8), torch.nan)))


def test_parts_on_another_device_are_named(sim):
    sim.model.fc.to("meta")
    with pytest.raises(DeviceMismatchError, match=r"'fc\.weight' is on meta"):
        sim.compute_encodings(lambda model: model(torch_networks.pictures(2)))


def test_untraceable_model_names_the_line():
    with pytest.raises(
        UntraceableModelError, match=r"torch_networks\.py:\d+, in forward: if x\.sum"
    ):
        QuantizationSimModel(torch_networks.Branches(), torch.ones(2, 4))


# -------------------------------------------------------------------------------------------------
# Training


def train(sim, steps=3):
    optimizer = torch.optim.SGD(sim.model.parameters(), lr=0.05)
    sim.model.train()
    for step in range(steps):
        x = torch_networks.pictures(8, seed=10 + step)
        loss = sim.model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_training_moves_weights_ranges_and_statistics_and_exports_them(sim, tmp_path):
    weight = sim.model.stem.weight.detach().clone()
    low = sim.model.block.relu.output_quantizers[1].maximum.detach().clone()
    mean = sim.model.block.bn1.running_mean.clone()
    train(sim)
    assert not torch.equal(sim.model.stem.weight, weight)
    assert not torch.equal(sim.model.block.relu.output_quantizers[1].maximum, low)
    assert not torch.equal(sim.model.block.bn1.running_mean, mean)
    inputs = torch_networks.pictures(16, seed=5)
    name, _ = output_of(sim)
    expect_equal(sim, sim._engine(keeps_ranges=True).run(inputs.numpy())[name], inputs)
    sim.onnx.export(tmp_path / "q.onnx")
    expect_equal(sim, run_qdq(tmp_path / "q.onnx", inputs), inputs)
    sim.export(tmp_path, "net")
    exported = {
        i.name: onnx.numpy_helper.to_array(i)
        for i in onnx.load(tmp_path / "net.onnx").graph.initializer
    }
    np.testing.assert_array_equal(exported["stem.weight"], sim.model.stem.weight.detach().numpy())


def test_dropout_and_batch_norm_follow_the_mode(sim):
    x = torch_networks.pictures(4)
    sim.model.eval()
    with torch.no_grad():
        assert torch.equal(sim.model(x), sim.model(x))
        before = sim.model.block.bn1.num_batches_tracked.clone()
        sim.model.train()
        assert not torch.equal(sim.model(x), sim.model(x))
    assert sim.model.block.bn1.num_batches_tracked == before + 2
    sim.model.drop.eval()
    dropout = [m for n, m in sim.model.named_modules() if type(m).__name__ == "FunctionalDropout"]
    assert len(dropout) == 1 and dropout[0].p == 0.25


def test_unlearned_parameter_grids_follow_the_weights(sim):
    quantizer = sim.model.stem.param_quantizers["weight"]
    quantizer.learnable = False
    with torch.no_grad():
        sim.model.stem.weight.mul_(2)
    before = quantizer.maximum.clone()
    sim.model.eval()(torch_networks.pictures(1))
    torch.testing.assert_close(quantizer.maximum, 2 * before, rtol=0, atol=0)  # doubling is exact
    quantizer.frozen = True
    with torch.no_grad():
        sim.model.stem.weight.mul_(2)
    sim.model(torch_networks.pictures(1))
    torch.testing.assert_close(quantizer.maximum, 2 * before, rtol=0, atol=0)


def test_copies_train_on_their_own(sim):
    clone = copy.deepcopy(sim.model)
    x = torch_networks.pictures(2)
    sim.model.eval()
    clone.eval()
    with torch.no_grad():
        assert torch.equal(clone(x), sim.model(x))
        clone.stem.weight.mul_(3)
        clone.stem.param_quantizers["weight"].learnable = False
        assert not torch.equal(clone(x), sim.model(x))
    # Tensors on one grid still share it in the copy.
    shared = [q for q in clone.modules() if type(q).__name__ == "Quantizer"]
    assert len({id(q.minimum) for q in shared}) == len(
        {id(q.minimum) for q in sim.quantizers.values()}
    )
    clone.load_state_dict(sim.model.state_dict())
    with torch.no_grad():
        assert torch.equal(clone(x), sim.model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_and_strided_inputs(dtype, sim):
    x = torch_networks.pictures(4).to(memory_format=torch.channels_last)
    sim.model.eval()
    with torch.no_grad():
        expected = sim.model(torch_networks.pictures(4))
        assert torch.equal(sim.model(x[:, :, ::1]), expected)
        half = QuantizationSimModel(torch_networks.network().to(dtype), x.to(dtype))
        half.compute_encodings(lambda model: model(torch_networks.pictures(8).to(dtype)))
        got = half.model.eval()(x.to(dtype))
    assert got.dtype == dtype
    span = float(expected.max() - expected.min())
    # bf16 holds 8 bits: each of some ten layers is off by up to 2^-8 of its range, plus steps.
    assert float((got.float() - expected).abs().max()) < 0.15 * span


# -------------------------------------------------------------------------------------------------
# Single quantizers


def test_changed_quantizers_reach_the_export(sim):
    sim.model.stem.param_quantizers["weight"].bits = 4
    sim.model.block.relu.output_quantizers[0].enabled = False
    off = sim.model.block.relu.output_quantizers[0].name
    held = sim.model.input_quantizers["x"]
    held.set_range(-1.0, 1.0)
    held.freeze()
    sim.compute_encodings(lambda model: model(torch_networks.pictures(8)))
    entries = sim.encodings()
    parameters = {e["name"]: e for e in entries["param_encodings"]}
    activations = {e["name"]: e for e in entries["activation_encodings"]}
    assert parameters["stem.weight"]["bw"] == 4 and parameters["fc.weight"]["bw"] == 8
    assert off not in activations
    assert activations["x"]["scale"][0] == pytest.approx(2 / 255, rel=1e-6)
    inputs = torch_networks.pictures(16, seed=5)
    name, _ = output_of(sim)
    expect_equal(sim, sim._engine(keeps_ranges=True).run(inputs.numpy())[name], inputs)


def test_excluded_layers_are_not_quantized(sim):
    sim.exclude_layers_from_quantization([sim.model.fc, "depthwise"])
    assert not sim.model.fc.param_quantizers["weight"].enabled
    names = {e["name"] for e in sim.encodings()["param_encodings"]}
    assert "stem.weight" in names and not names & {"fc.weight", "depthwise.weight"}
    with pytest.raises(UnknownNameError, match="nowhere"):
        sim.exclude_layers_from_quantization(["nowhere"])
    with pytest.raises(UnknownNameError, match="nothing"):
        sim.quantizer("nothing")


# -------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0"])
def test_export_names_tensors_of_the_onnx_model(sim, version, tmp_path):
    sim.export(tmp_path, "net", torch_networks.pictures(1), encoding_version=version)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert files.keys() == {"net.onnx", "net.pth", "net.encodings"}
    graph = onnx.load(tmp_path / "net.onnx").graph
    tensors = {i.name for i in graph.input} | {i.name for i in graph.initializer}
    tensors |= {name for node in graph.node for name in node.output}
    content = json.loads(files["net.encodings"])
    if version == "2.0.0":
        names = {e["name"] for e in content["encodings"]}
    else:
        names = set()
        for part in ("activation_encodings", "param_encodings"):
            entries = content[part]
            names |= set(entries) if isinstance(entries, dict) else {e["name"] for e in entries}
    assert names <= tensors and len(names) >= 15

    original = torch.load(tmp_path / "net.pth", weights_only=False)
    assert original.state_dict().keys() == torch_networks.network().state_dict().keys()
    x = torch_networks.pictures(2)
    with torch.no_grad():
        assert torch.equal(original.eval()(x), torch_networks.network()(x))
    float_model = halfstep.Model.load(tmp_path / "net.onnx")
    (got,) = float_model.run(x.numpy()).values()
    np.testing.assert_allclose(got, torch_networks.network()(x).detach(), atol=1e-5)

    sim.export(tmp_path, "net", encoding_version=version)  # again: the same files
    for name in ("net.onnx", "net.encodings"):
        assert (tmp_path / name).read_bytes() == files[name]


def test_export_needs_encodings(tmp_path):
    with pytest.raises(InvalidStateError, match="'x'"):
        simulate().export(tmp_path, "net")
    assert not list(tmp_path.iterdir())


def test_encodings_load_into_another_simulation(sim, tmp_path):
    sim.export(tmp_path, "net")
    other = simulate()
    report = other.load_encodings(tmp_path / "net.encodings")
    assert not any(report)
    x = torch_networks.pictures(4)
    with torch.no_grad():
        assert torch.equal(other.model.eval()(x), sim.model.eval()(x))
    small = QuantizationSimModel(nn.Linear(3, 2), torch.ones(1, 3))
    before = {n: q.has_range for n, q in small.quantizers.items()}
    with pytest.raises(EncodingMismatchError, match="'x' has no quantizer"):
        small.load_encodings(tmp_path / "net.encodings")
    assert {n: q.has_range for n, q in small.quantizers.items()} == before


def test_frozen_parameter_encodings_stay(sim, tmp_path):
    entries = [e for e in sim.encodings()["param_encodings"] if e["name"] == "stem.weight"]
    entries[0]["scale"] = [2 * scale for scale in entries[0]["scale"]]
    (tmp_path / "p.encodings").write_text(
        json.dumps({"version": "1.0.0", "activation_encodings": [], "param_encodings": entries})
    )
    sim.set_and_freeze_param_encodings(tmp_path / "p.encodings")
    sim.compute_encodings(lambda model: model(torch_networks.pictures(8)))
    (kept,) = (e for e in sim.encodings()["param_encodings"] if e["name"] == "stem.weight")
    assert kept["scale"] == pytest.approx(entries[0]["scale"], rel=1e-6)
    assert sim.model.stem.param_quantizers["weight"].frozen
    assert not sim.model.fc.param_quantizers["weight"].frozen
    entries[0]["name"] = "other.weight"
    with pytest.raises(EncodingMismatchError, match=r"'other\.weight'"):
        sim.set_and_freeze_param_encodings({"param_encodings": entries})


def test_folded_network_in_quantization(tmp_path):
    net = torch_networks.network()
    fold_all_batch_norms(net, torch_networks.pictures(1))
    sim = QuantizationSimModel(net, torch_networks.pictures(1))
    sim.compute_encodings([torch_networks.pictures(8)])
    inputs = torch_networks.pictures(16, seed=5)
    name, _ = output_of(sim)
    expect_equal(sim, sim._engine(keeps_ranges=True).run(inputs.numpy())[name], inputs)


# -------------------------------------------------------------------------------------------------
# Processes

WORKER = """
import json, sys
import torch, torch.distributed as distributed
import torch_networks
from halfstep.torch import QuantizationSimModel
rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
sim = QuantizationSimModel(torch_networks.network(), torch_networks.pictures(1), "tf_enhanced")
rows = torch_networks.pictures(8)[rank::2]
sim.compute_encodings(lambda model: [model(row[None]) for row in rows], group=True)
open(out, "w").write(json.dumps(sim.encodings()))
def fails(model):
    model(rows)
    if rank == 1:
        raise RuntimeError("mine")
try:
    sim.compute_encodings(fails, group=True)
except Exception as error:
    print(type(error).__name__, error)
distributed.barrier()  # who ends first closes connections that the other may still use
distributed.destroy_process_group()
"""


def test_two_processes_find_what_one_finds(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                "-X",
                "faulthandler",
                "-c",
                WORKER,
                str(rank),
                str(tmp_path / "store"),
                tmp_path / str(rank),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [worker.communicate(timeout=400)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    # Rows alone go through the same kernels here as there, so the statistics are the same bits.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sim = simulate(quant_scheme="tf_enhanced")
        sim.compute_encodings(
            lambda model: [model(row[None]) for row in torch_networks.pictures(8)]
        )
    finally:
        torch.set_num_threads(threads)
    for rank in range(2):
        assert json.loads((tmp_path / str(rank)).read_text()) == sim.encodings()
    assert "InvalidStateError calibration failed in another process: RuntimeError: mine" in said[0]
    assert "RuntimeError mine" in said[1]


def test_importing_the_package_does_not_import_torch():
    code = "import halfstep, sys; assert 'torch' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
