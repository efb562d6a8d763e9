# SPDX-License-Identifier: Apache-2.0
# The quantizer as a module: ranges, switches, saving, copying, compiling, two processes.
import copy
import io
import pickle
import re
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from halfstep.errors import (  # noqa: E402
    InvalidArgumentError,
    InvalidStateError,
    NonFiniteValueError,
    ShapeMismatchError,
)
from halfstep.torch import Quantizer  # noqa: E402


class Network(nn.Module):
    """A convolution and a product whose weights and results are quantized."""

    def __init__(self, calibrated: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.linear = nn.Linear(4, 3)
        self.conv_weight = Quantizer(4, True, channel_axis=0, shape=(4,), name="conv.weight")
        self.conv_output = Quantizer(8, name="conv.output")
        self.linear_weight = Quantizer(8, True, channel_axis=0, shape=(3,), name="linear.weight")
        if calibrated:
            top = self.conv.weight.detach().abs().amax((1, 2, 3))
            self.conv_weight.set_range(-top * 8 / 7, top)
            self.conv_output.set_range(0.0, 0.75)
            top = self.linear.weight.detach().abs().amax(1)
            self.linear_weight.set_range(-top, top)

    def forward(self, x):
        weight = self.conv_weight(self.conv.weight)
        x = nn.functional.conv2d(x, weight, self.conv.bias, padding=1)
        x = self.conv_output(torch.relu(x)).mean((2, 3))
        return nn.functional.linear(x, self.linear_weight(self.linear.weight), self.linear.bias)


def network(calibrated: bool = True, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(calibrated)


def batch(seed: int = 0) -> "torch.Tensor":
    return torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def train(model, steps: int = 3, **autocast):
    """Run a plain loop with an ordinary optimizer; return the losses."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", **autocast) if autocast else torch.enable_grad():
            loss = model(batch(step)).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_without_range_values_pass():
    quantizer = Quantizer(name="x")
    x = batch()
    assert quantizer(x) is x
    assert not quantizer.has_range and quantizer.get_encoding() is None
    assert not quantizer.minimum.requires_grad
    quantizer.set_range(-1, 1)
    assert not torch.equal(quantizer(x), x)
    quantizer.enabled = False
    assert quantizer(x) is x and not quantizer.minimum.requires_grad
    quantizer.enabled = True
    integers = torch.arange(3)
    assert quantizer(integers) is integers
    quantizer.clear_range()
    assert quantizer(x) is x


def test_observer_sees_inputs_instead():
    quantizer = Quantizer(name="x")
    quantizer.set_range(-1, 1)
    seen = []
    quantizer.observer = seen.append
    x = batch()
    assert quantizer(x) is x and seen == [x]
    # Observers belong to one simulation: copies and files leave them behind.
    assert copy.deepcopy(quantizer).observer is None
    assert pickle.loads(pickle.dumps(quantizer)).observer is None
    assert quantizer.observer is not None


def test_range_and_encoding():
    quantizer = Quantizer(4, name="x")
    quantizer.set_range(-1.0, 2.0)
    encoding = quantizer.get_encoding()
    # (2 + 1)/15 and 1/0.2.
    assert encoding["scale"].item() == pytest.approx(0.2, rel=1e-7)
    assert encoding["zero_point"] == 5 and encoding["bits"] == 4
    assert quantizer.get_min().item() == pytest.approx(-1.0) and quantizer.is_initialized()
    quantizer.set_encoding(0.1, 3)
    scale, zero = quantizer.get_scale_and_zero_point()
    assert scale.item() == torch.tensor(0.1).item() and zero.item() == 3
    channels = Quantizer(8, True, channel_axis=1, shape=(3,), name="weight")
    channels.set_range(torch.tensor([-1.0, -2.0, -0.5]), 1.0)
    assert channels.get_encoding()["scale"].shape == (3,)
    channels.set_encoding([0.1, 0.2, 0.3], 0)
    assert torch.equal(channels.get_scale_and_zero_point()[0], torch.tensor([0.1, 0.2, 0.3]))
    blocks = Quantizer(4, True, channel_axis=0, block=(1, 2), shape=(3, 2), name="weight")
    blocks.set_range(-torch.ones(3, 2), torch.ones(3, 2))
    assert blocks(torch.randn(3, 4)).shape == (3, 4)


def test_repr():
    quantizer = Quantizer(8, True, channel_axis=0, shape=(2,), name="weight")
    assert repr(quantizer) == "Quantizer(int8, symmetric, per channel on axis 0, no range)"
    quantizer.set_range(torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 2.0]))
    quantizer.frozen = True
    assert repr(quantizer).endswith("range -2 to 2, frozen)")
    assert "Quantizer(uint8, asymmetric" in repr(network())


def test_errors():
    quantizer = Quantizer(channel_axis=0, shape=(3,), name="conv1.weight")
    with pytest.raises(InvalidStateError, match="conv1.weight.*no range"):
        quantizer.frozen = True
    with pytest.raises(InvalidStateError, match="conv1.weight.*no range"):
        quantizer.get_scale_and_zero_point()
    with pytest.raises(InvalidArgumentError, match="conv1.weight.*not finite"):
        quantizer.set_range(-1.0, float("inf"))
    with pytest.raises(InvalidArgumentError, match="minimum is above maximum"):
        quantizer.set_range(1.0, -1.0)
    with pytest.raises(ShapeMismatchError, match="expected 3 values, got 2"):
        quantizer.set_range(torch.zeros(2), torch.ones(2))
    with pytest.raises(ShapeMismatchError, match="expected 3 scales, got 1"):
        quantizer.set_encoding(0.1, 0)
    with pytest.raises(InvalidArgumentError, match="conv1.weight.*2 to 16 bits, got 1"):
        quantizer.bits = 1
    with pytest.raises(InvalidArgumentError, match="block needs a channel axis"):
        Quantizer(block=(1, 4), name="w")
    quantizer.set_range(-1.0, 1.0)
    with pytest.raises(ShapeMismatchError, match="expected 5 scales, got 3"):
        quantizer(torch.zeros(5))
    quantizer.freeze()
    for change in (
        lambda: quantizer.set_range(0.0, 1.0),
        lambda: setattr(quantizer, "bits", 4),
        lambda: quantizer.clear_range(),
        lambda: quantizer.set_encoding([1.0, 1.0, 1.0], 0),
    ):
        with pytest.raises(InvalidStateError, match="conv1.weight' is frozen"):
            change()
    quantizer.frozen = False
    with torch.no_grad():
        quantizer.minimum[1] = torch.nan
    with pytest.raises(NonFiniteValueError, match="group 1"):
        quantizer(torch.zeros(3))
    with pytest.raises(InvalidStateError, match=r"on cpu, its input on meta.*sim.model.to"):
        quantizer(torch.zeros(3, device="meta"))
    symmetric = Quantizer(8, True, name="w")
    with pytest.raises(InvalidArgumentError, match="'w'.*no range has scale"):
        symmetric.set_encoding(0.1, 5)


def test_training_moves_weights_and_ranges():
    model = network()
    before = copy.deepcopy(model.state_dict())
    losses = train(model, 20)
    assert losses[-1] < losses[0] / 2
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        assert parameter.isfinite().all()


def test_switches_decide_what_learns():
    model = network()
    model.conv_weight.frozen = True
    model.conv_output.learnable = False
    before = copy.deepcopy(model.state_dict())
    train(model)
    for name, moved in (("conv_weight", False), ("conv_output", False), ("linear_weight", True)):
        for end in ("minimum", "maximum"):
            key = f"{name}.{end}"
            assert torch.equal(model.state_dict()[key], before[key]) != moved, key
    model.conv_output.learnable = True
    assert model.conv_output.minimum.requires_grad


def test_state_goes_into_a_fresh_simulation():
    model = network()
    train(model)
    model.conv_weight.frozen = True
    model.conv_output.bits = 6
    model.linear_weight.enabled = False
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = network(calibrated=False, seed=1)
    # weights_only is torch's default, and must do.
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(batch()), model(batch()))
    assert repr(fresh) == repr(model)
    assert fresh.conv_weight.frozen and not fresh.conv_weight.minimum.requires_grad
    assert fresh.conv_output.minimum.requires_grad
    # A state without ranges takes them away.
    fresh.load_state_dict(network(calibrated=False).state_dict())
    assert not fresh.conv_output.has_range
    state = network().state_dict()
    state["conv_weight.minimum"] = torch.zeros(5)
    with pytest.raises(RuntimeError, match="size mismatch for conv_weight.minimum"):
        network().load_state_dict(state)


def test_copies_are_independent():
    model = network()
    expected = model(batch())
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(batch()), expected)
        train(clone)
        assert not torch.equal(clone(batch()), expected)
        assert torch.equal(model(batch()), expected)


def test_ranges_stay_float32():
    model = network()
    expected = model(batch())
    double = copy.deepcopy(model).double()
    assert double.conv_output.minimum.dtype == torch.float32
    assert double(batch().double()).dtype == torch.float64
    half = copy.deepcopy(model).bfloat16()
    assert half.conv_output.minimum.dtype == torch.float32
    got = half(batch().bfloat16())
    assert got.dtype == torch.bfloat16
    # Weights and values of 8 significant bits: relative 2^-8 in each of a few layers.
    torch.testing.assert_close(got.float(), expected, rtol=2**-4, atol=2**-4)
    got.float().sum().backward()
    assert half.conv.weight.grad.dtype == torch.bfloat16
    assert half.conv_output.maximum.grad.dtype == torch.float32


def test_autocast():
    model = network()
    plain = train(copy.deepcopy(model))
    mixed = train(copy.deepcopy(model), dtype=torch.bfloat16)
    # The losses of three steps, computed with 8 significant bits.
    assert mixed == pytest.approx(plain, rel=2**-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = batch().bfloat16()
        assert model.conv_output(x).dtype == torch.bfloat16
        exact = model.conv_output(x.float()).bfloat16()
        assert torch.equal(model.conv_output(x), exact)


def test_compiled_equals_eager():
    model = network()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    x = batch()
    assert torch.equal(compiled(x), model(x))
    torch.testing.assert_close(train(compiled), train(model), rtol=1e-6, atol=0)
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(compiled(last), model(last), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


def test_operators_are_sound():
    x = torch.randn(4, 3, requires_grad=True)
    low = torch.tensor([-1.0, -0.5, -2.0], requires_grad=True)
    high = torch.tensor([1.0, 0.5, 2.0], requires_grad=True)
    from halfstep.torch import _kernels

    grid = _kernels.Grid(4, axis=1)
    scale, zero = _kernels.grid_from_range(low, high, grid)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (x, low, high, scale, zero, grid.packed())
    torch.library.opcheck(_kernels._fake_quantize_op, arguments, test_utils=tests)
    ends = (low.detach(), high.detach(), grid.packed())
    torch.library.opcheck(_kernels._grid_op, ends, test_utils=tests)


WORKER = """
import sys
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[4])
from test_quantizer import batch, network
rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
model = torch.nn.parallel.DistributedDataParallel(network())
optimizer = torch.optim.SGD(model.parameters(), 0.05)
for step in range(3):
    optimizer.zero_grad()
    model(batch(step)[4 * rank : 4 * rank + 4]).square().mean().backward()
    optimizer.step()
if rank == 0:
    torch.save(model.module.state_dict(), sys.argv[3])
del model
dist.barrier()  # who ends first closes connections that the other may still use
dist.destroy_process_group()
"""


def test_two_processes_train_as_one(tmp_path):
    path = tmp_path / "state.pt"
    here = re.sub(r"[^/]*$", "", __file__)
    workers = [
        subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", WORKER]
            + [str(rank), str(tmp_path / "store"), str(path), here]
        )
        for rank in range(2)
    ]
    try:
        assert [worker.wait(400) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    single = network()
    optimizer = torch.optim.SGD(single.parameters(), 0.05)
    for step in range(3):
        optimizer.zero_grad()
        halves = batch(step).split(4)
        (sum(single(half).square().mean() for half in halves) / 2).backward()
        optimizer.step()
    state = torch.load(path)
    for name, value in single.state_dict().items():
        if isinstance(value, torch.Tensor):
            # Gradients are averaged in another order, three times.
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_module():
    model = network()
    expected = model(batch())
    moved = copy.deepcopy(model).cuda()
    assert moved.conv_output.minimum.is_cuda
    torch.testing.assert_close(moved(batch().cuda()).cpu(), expected, rtol=0, atol=0.02)
    with pytest.raises(InvalidStateError, match="sim.model.to"):
        model.conv_output(batch().cuda())
