# SPDX-License-Identifier: Apache-2.0
# What training scripts do with a simulation: AMP, compile, DDP, copies, checkpoints.
import copy
import io
import os
import pickle
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

import torch_networks  # noqa: E402
from torch import nn  # noqa: E402

from halfstep.errors import (  # noqa: E402
    FileAccessError,
    InvalidArgumentError,
    MalformedFileError,
    UnknownNameError,
)
from halfstep.torch import (  # noqa: E402
    QuantizationSimModel,
    load_checkpoint,
    save_checkpoint,
)

X = torch_networks.pictures(8, seed=3)


def calibrated(net=None, **options):
    sim = QuantizationSimModel(
        torch_networks.network() if net is None else net, torch_networks.pictures(1), **options
    )
    sim.compute_encodings(lambda model: model(torch_networks.pictures(8)))
    return sim


@pytest.fixture(scope="module")
def pristine():
    """A calibrated simulation that no test changes."""
    return calibrated()


@pytest.fixture
def sim(pristine):
    return copy.deepcopy(pristine)


def outputs(model):
    model.eval()
    with torch.no_grad():
        return model(X)


def step_of(sim):
    name = sim._network.exported.outputs[0]
    return float(sim.quantizer(name).get_encoding()["scale"])


def train(model, steps=3, seed=10, context=None, scaler=None):
    """A plain loop; returns the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.eval()  # no dropout: losses can be compared
    losses = []
    for step in range(steps):
        x = torch_networks.pictures(8, seed=seed + step)
        optimizer.zero_grad()
        if context is None:
            loss = model(x).square().mean()
        else:
            with context:
                loss = model(x).float().square().mean()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.item())
    return losses


# -------------------------------------------------------------------------------------------------
# Loops


def test_a_plain_loop_lowers_the_loss_and_moves_every_parameter_that_takes_part(sim):
    before = {name: p.detach().clone() for name, p in sim.model.named_parameters()}
    losses = train(sim.model, steps=6)
    assert losses[-1] < losses[0]
    for name, parameter in sim.model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num()), name
        elif "weight" in name.rpartition(".")[2]:
            assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_amp_trains_like_float32(sim, dtype):
    exact = copy.deepcopy(sim)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if dtype == torch.float16 else None
    context = torch.autocast("cpu", dtype=dtype)
    with context, torch.no_grad():
        assert sim.model.eval()(X).dtype == dtype
    losses = train(sim.model, context=context, scaler=scaler)
    expected = train(exact.model)
    # bfloat16 holds 8 bits: about ten layers, each off by up to 2^-8 of its range and by a step of
    # its 8-bit grid now and then; the loss is a square.
    assert losses == pytest.approx(expected, rel=0.15)
    for name, parameter in sim.model.named_parameters():
        assert parameter.dtype == torch.float32, name
        if parameter.requires_grad:
            assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name


def test_calibration_under_autocast_sees_its_values(sim):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sim.compute_encodings([torch_networks.pictures(8)])
    low, high = (end.item() for end in (sim.quantizer("x").minimum, sim.quantizer("x").maximum))
    pictures = torch_networks.pictures(8)
    # Inputs are float32 still; the grid's ends are within a step of the data's.
    step = float(sim.quantizer("x").get_encoding()["scale"])
    assert abs(low - pictures.min().item()) <= step and abs(high - pictures.max().item()) <= step


def test_compiled_simulations_compute_and_learn_the_same():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    sim = calibrated(net)
    other = copy.deepcopy(sim)
    compiled = torch.compile(sim.model)
    step = step_of(sim)
    # Fused kernels sum in another order; a value on a border moves by a step.
    off = (compiled(X) - other.model(X)).abs().detach() / step
    assert float(off.max()) < 1.01 and float((off > 0.5).float().mean()) < 0.1
    losses = train(compiled)
    assert losses == pytest.approx(train(other.model), rel=0.02)
    quantizer, exact = (
        model.get_submodule("0.param_quantizers.weight") for model in (sim.model, other.model)
    )
    torch.testing.assert_close(quantizer.maximum, exact.maximum, rtol=1e-2, atol=1e-4)
    # Grids that follow weights do so behind compiled code, too.
    quantizer.learnable = False
    compiled(X)
    before = quantizer.maximum.clone()
    with torch.no_grad():
        sim.model.get_submodule("0").weight.mul_(2)
    compiled(X)
    assert torch.equal(quantizer.maximum, 2 * before)  # doubling is exact


DDP = """
import sys
import torch, torch.distributed as distributed
import torch_networks
from halfstep.torch import load_checkpoint
rank, store, checkpoint, out = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
sim = load_checkpoint(checkpoint)
model = torch.nn.parallel.DistributedDataParallel(sim.model.eval())
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
for step in range(3):
    x = torch_networks.pictures(8, seed=10 + step)[4 * rank : 4 * rank + 4]
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
torch.save({n: p.detach() for n, p in sim.model.named_parameters()}, out)
del model
distributed.barrier()
distributed.destroy_process_group()
"""


def test_two_ddp_processes_learn_what_one_learns(sim, tmp_path):
    save_checkpoint(sim, tmp_path / "sim.pkl")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-X", "faulthandler", "-c", DDP, str(rank)]
            + [str(tmp_path / name) for name in ("store", "sim.pkl", f"{rank}.pt")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [worker.communicate(timeout=400)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    train(sim.model)
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, parameter in sim.model.named_parameters():
        assert torch.equal(states[0][name].nan_to_num(), states[1][name].nan_to_num()), name
        # Mean of two halves' gradients: sums in another order, which the grids may amplify.
        torch.testing.assert_close(
            states[0][name], parameter.detach(), rtol=1e-3, atol=1e-4, equal_nan=True, msg=name
        )


# -------------------------------------------------------------------------------------------------
# Copies and files


def test_copies_of_a_simulation_are_its_equals_and_apart(sim):
    other = copy.deepcopy(sim)
    assert other.encodings() == sim.encodings()
    assert torch.equal(outputs(other.model), outputs(sim.model))
    with torch.no_grad():
        other.model.stem.weight.mul_(3)
    other.compute_encodings([X])
    assert other.encodings() != sim.encodings()
    # A copy follows its own weights.
    other.model.stem.param_quantizers["weight"].learnable = False
    other.model(X)
    with torch.no_grad():
        other.model.stem.weight.zero_().add_(1)
    before = sim.model.stem.param_quantizers["weight"].maximum.clone()
    other.model(X)
    assert torch.equal(sim.model.stem.param_quantizers["weight"].maximum, before)


def test_state_dicts_restore_weights_ranges_and_switches(sim, pristine):
    sim.model.fc.param_quantizers["weight"].bits = 4
    sim.model.stem.param_quantizers["weight"].freeze()
    sim.model.depthwise.param_quantizers["weight"].enabled = False
    train(sim.model)
    file = io.BytesIO()
    torch.save(sim.model.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(pristine)
    assert not torch.equal(outputs(other.model), outputs(sim.model))
    other.model.load_state_dict(torch.load(file, weights_only=False))
    assert torch.equal(outputs(other.model), outputs(sim.model))
    assert other.encodings() == sim.encodings()
    assert other.model.stem.param_quantizers["weight"].frozen
    # An uncalibrated simulation takes ranges over as well.
    fresh = QuantizationSimModel(torch_networks.network(), torch_networks.pictures(1))
    fresh.model.load_state_dict(sim.model.state_dict())
    assert torch.equal(outputs(fresh.model), outputs(sim.model))


def test_optimizer_states_go_on_after_a_restart(sim):
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(sim.model.parameters(), lr=1e-3)
    sim.model(X).square().mean().backward()
    optimizer.step()
    other = copy.deepcopy(sim)
    again = torch.optim.Adam(other.model.parameters(), lr=1e-3)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, o in ((sim.model, optimizer), (other.model, again)):
        o.zero_grad()
        model(X).square().mean().backward()
        o.step()
    assert torch.equal(outputs(sim.model), outputs(other.model))


def test_pickled_models_and_simulations_work_alone(sim, tmp_path):
    expected = outputs(sim.model)
    torch.save(sim.model, tmp_path / "model.pt")
    model = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(outputs(model), expected)
    model.stem.param_quantizers["weight"].learnable = False  # needs the engine's rule
    model(X)
    other = pickle.loads(pickle.dumps(sim))
    assert other.encodings() == sim.encodings()
    other.compute_encodings([X])
    other.export(tmp_path, "net")
    assert torch.equal(outputs(sim.model), expected)


def test_checkpoints_go_on_in_another_process(sim, tmp_path):
    train(sim.model)
    save_checkpoint(sim, tmp_path / "sim.pkl")
    script = (
        "import sys, torch, torch_networks\n"
        "from halfstep.torch import load_checkpoint\n"
        "sim = load_checkpoint(sys.argv[1])\n"
        "with torch.no_grad():\n"
        "    y = sim.model.eval()(torch_networks.pictures(8, seed=3))\n"
        "torch.save((y, sim.encodings()), sys.argv[2])\n"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])
    }
    arguments = [str(tmp_path / name) for name in ("sim.pkl", "out.pt")]
    subprocess.run([sys.executable, "-c", script, *arguments], env=environment, check=True)
    y, encodings = torch.load(tmp_path / "out.pt", weights_only=False)
    # Another process may run with another number of threads, which sums in another order.
    assert float((y - outputs(sim.model)).abs().max()) <= 1.01 * step_of(sim)
    assert encodings == sim.encodings()


class Local(nn.Linear):
    """A layer that refuses to be pickled, as those that hold open files do."""

    def __reduce__(self):
        raise TypeError("this layer cannot be pickled")

    def __deepcopy__(self, memo):
        return Local(self.in_features, self.out_features)


def test_checkpoints_that_cannot_be_written_or_read(sim, tmp_path):
    with pytest.raises(FileAccessError, match="nowhere"):
        save_checkpoint(sim, tmp_path / "nowhere" / "sim.pkl")
    with pytest.raises(FileAccessError, match="none"):
        load_checkpoint(tmp_path / "none")
    (tmp_path / "text").write_text("no pickle")
    with pytest.raises(MalformedFileError, match="text"):
        load_checkpoint(tmp_path / "text")
    (tmp_path / "other").write_bytes(pickle.dumps([1]))
    with pytest.raises(MalformedFileError, match="holds a list"):
        load_checkpoint(tmp_path / "other")
    stubborn = QuantizationSimModel(nn.Sequential(Local(3, 2)), torch.ones(2, 3))
    with pytest.raises(InvalidArgumentError, match="this layer cannot be pickled"):
        save_checkpoint(stubborn, tmp_path / "sim.pkl")
    assert not (tmp_path / "sim.pkl").exists()


# -------------------------------------------------------------------------------------------------
# Quantizers


def test_printing_shows_every_quantizer_and_its_switches(sim):
    model = sim.model
    model.fc.param_quantizers["weight"].bits = 4
    model.fc.param_quantizers["weight"].freeze()
    model.input_quantizers[0].set_range(-2.0, 2.0)
    model.functional_quantizers["mean"].enabled = False
    text = repr(model)
    assert text.count("Quantizer(") == len(sim.quantizers)
    assert "(weight): Quantizer(int4, symmetric, per channel on axis 0, range" in text
    (fc,) = (line for line in text.splitlines() if "int4" in line)
    assert fc.endswith("frozen)")
    assert "(x): Quantizer(uint8, asymmetric, range -2 to 2)" in text
    (mean,) = (line for line in text.splitlines() if "(mean): Quantizer" in line)
    assert mean.endswith("off)")


def test_parameters_are_excluded_by_their_name(sim):
    sim.exclude_param_from_quantization("weight")
    assert not sim.encodings()["param_encodings"]
    assert not any(q.enabled for name, q in sim.quantizers.items() if name.endswith("weight"))
    assert sim.quantizer("x").enabled
    with pytest.raises(UnknownNameError, match="'kernel'"):
        sim.exclude_param_from_quantization("kernel")
