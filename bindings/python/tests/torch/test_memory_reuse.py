# SPDX-License-Identifier: Apache-2.0
# Memory of results that is used again, and tensors that are overwritten: never while visible.
import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("halfstep.torch")

from torch import nn  # noqa: E402

from halfstep.torch import QuantizationSimModel, Quantizer, _memory, _ownership  # noqa: E402

SHAPE = torch.Size((4, _memory.LARGE // 4))


def test_a_block_comes_back_when_its_tensor_is_gone():
    pool = _memory.Pool(limit=1 << 24)
    first = pool.empty(SHAPE)
    address = first.data_ptr()
    assert pool.empty(SHAPE).data_ptr() != address
    del first
    assert pool.free_bytes == 2 * 4 * SHAPE.numel()
    assert pool.empty(SHAPE).data_ptr() == address


@pytest.mark.parametrize(
    "holder",
    [
        lambda t: t[1:, ::2],
        lambda t: t.numpy()[1:],
        lambda t: torch.from_dlpack(t),
        lambda t: t.detach(),
        lambda t: nn.functional.linear(torch.ones(1, t.shape[1], requires_grad=True), t).grad_fn,
    ],
    ids=["view", "array", "dlpack", "detached", "saved"],
)
def test_what_refers_to_a_tensor_keeps_its_block(holder):
    pool = _memory.Pool(limit=1 << 24)
    tensor = pool.empty(SHAPE)
    held = holder(tensor)
    del tensor
    assert pool.free_bytes == 0
    del held
    assert pool.free_bytes == 4 * SHAPE.numel()


def test_free_memory_is_bounded_and_can_be_given_back():
    pool = _memory.Pool(limit=2 * 4 * SHAPE.numel())
    held = [pool.empty(SHAPE) for _ in range(3)]
    held.clear()
    assert pool.free_bytes == pool.limit
    pool.release()
    assert pool.free_bytes == 0
    small = _memory.Pool(limit=8)
    small.empty(SHAPE)
    assert small.free_bytes == 0


def test_shape_and_writability_are_those_of_any_tensor():
    tensor = _memory.Pool(limit=0).empty(torch.Size((1, SHAPE.numel())))
    assert tensor.shape == (1, SHAPE.numel()) and tensor.dtype == torch.float32
    tensor.fill_(2)
    assert tensor.sum() == 2 * SHAPE.numel()


class Chain(nn.Module):
    """Everything that is overwritten, and beside it what must not be."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = nn.functional.relu(self.conv1(x))
        y = self.conv2(x)
        # y and x have two readers each.
        z = nn.functional.hardswish(y) + y + x
        return self.fc(self.drop(nn.functional.hardtanh(z).mean((2, 3))))


@pytest.fixture(scope="module")
def sim():
    torch.manual_seed(3)
    model = Chain().eval()
    made = QuantizationSimModel(model, torch.randn(2, 3, 6, 6))
    made.compute_encodings([torch.randn(8, 3, 6, 6)])
    return made


def test_overwriting_changes_no_bit(sim):
    x = torch.randn(5, 3, 6, 6)
    kept = x.clone()
    recorded = sim.model(x).detach()  # nothing is overwritten while gradients are recorded
    with torch.no_grad():
        assert torch.equal(sim.model(x), recorded)
        assert torch.equal(sim.model(x), recorded)
    with torch.inference_mode():
        assert torch.equal(sim.model(x), recorded)
    assert torch.equal(x, kept)
    assert "owned = True" in sim.model.code and "unless_covered" in sim.model.code


def test_copies_and_pickles_compute_the_same(sim):
    x = torch.randn(5, 3, 6, 6)
    with torch.no_grad():
        expected = sim.model(x)
        assert torch.equal(copy.deepcopy(sim.model)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(sim.model))(x), expected)


def test_hooks_see_tensors_that_stay(sim):
    """A hook on a quantizer keeps its input and output; both must hold what they held."""
    x = torch.randn(5, 3, 6, 6)
    seen = []

    def hook(_, args, output):
        seen.append((args[0], args[0].clone(), output, output.clone()))

    handles = [q.register_forward_hook(hook) for q in sim.quantizers.values()]
    with torch.no_grad():
        expected = sim.model(x)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(sim.quantizers)
    assert all(torch.equal(a, b) and torch.equal(c, d) for a, b, c, d in seen)
    # Not everything lay on the grid before, so an input that was overwritten would show.
    assert any(not torch.equal(a, c) for a, _, c, _ in seen)
    with torch.no_grad():
        assert torch.equal(sim.model(x), expected)


def test_modes_and_global_hooks_see_tensors_that_stay(sim):
    from torch.utils._python_dispatch import TorchDispatchMode

    kept = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and "conv" in str(function):
                kept.append((made, made.clone()))
            return made

    with torch.no_grad(), Recorder():
        sim.model(torch.randn(5, 3, 6, 6))
    assert kept and all(torch.equal(a, b) for a, b in kept)
    x = torch.zeros(3)
    with torch.no_grad():
        assert _ownership.may_overwrite(x)
        assert not _ownership.may_overwrite(nn.Parameter(x))
        handle = nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
        try:
            assert not _ownership.may_overwrite(x)
        finally:
            handle.remove()
    assert not _ownership.may_overwrite(x)


@pytest.mark.parametrize("write", ["data", "in place", "replaced", "optimizer", "loaded"])
def test_new_ranges_count_however_they_are_written(write):
    """Scales are remembered; writes through .data leave no trace in a tensor's version."""
    quantizer = Quantizer(8)
    quantizer.set_range(-1.0, 1.0)
    x = torch.linspace(-3, 3, 50)
    with torch.no_grad():
        quantizer(x)
        if write == "data":
            quantizer.maximum.data.mul_(2)
            quantizer.minimum.data.mul_(2)
        elif write == "in place":
            quantizer.maximum.mul_(2)
            quantizer.minimum.mul_(2)
        elif write == "replaced":
            quantizer.maximum = nn.Parameter(quantizer.maximum * 2)
            quantizer.minimum = nn.Parameter(quantizer.minimum * 2)
        elif write == "loaded":
            other = Quantizer(8)
            other.set_range(-2.0, 2.0)
            quantizer.load_state_dict(other.state_dict())
    if write == "optimizer":
        quantizer.minimum.grad = torch.tensor(1.0)
        quantizer.maximum.grad = torch.tensor(-1.0)
        torch.optim.SGD(quantizer.parameters(), lr=1.0).step()
    fresh = Quantizer(8)
    fresh.set_range(-2.0, 2.0)
    with torch.no_grad():
        assert torch.equal(quantizer(x), fresh(x))
        assert torch.equal(copy.deepcopy(quantizer)(x), fresh(x))


def test_new_weights_count_however_they_are_written(sim):
    x = torch.randn(5, 3, 6, 6)
    model = copy.deepcopy(sim.model)
    with torch.no_grad():
        before = model(x)
        model.fc.weight.data.neg_()
        model.fc.bias.data.neg_()
        after = model(x)
    assert not torch.equal(before, after)


def test_owned_input_in_each_layout():
    quantizer = Quantizer(4)
    quantizer.set_range(-1.0, 1.0)
    x = torch.randn(2, 3, 5, 7)
    with torch.no_grad():
        expected = quantizer(x)
        for laid in (x.clone(), x.to(memory_format=torch.channels_last)):
            result = quantizer(laid, owned=True)
            assert result is laid and torch.equal(result, expected)
        strided = torch.randn(2, 3, 5, 14)[..., ::2].copy_(x)
        result = quantizer(strided, owned=True)
        assert torch.equal(result, expected) and torch.equal(strided, x)
        half = x.to(torch.bfloat16)
        assert quantizer(half, owned=True) is not half
    tracked = x.clone()
    assert quantizer(tracked, owned=True) is not tracked and torch.equal(tracked, x)
    assert np.array_equal(quantizer(x).detach(), expected)


def relu_network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU()).eval()


def test_a_relu_that_the_grid_covers_is_left_out_with_the_same_bits(monkeypatch):
    net, x = relu_network(), torch.randn(4, 3, 12, 12)
    sim = QuantizationSimModel(net, x)
    sim.compute_encodings(lambda model: model(x))
    sim.model.channels_last = False  # sums in the order that passes with gradients have
    assert "relu_unless_covered" in sim.model.code
    left_out = []
    covers = Quantizer.takes_negatives_to_zero

    def spy(self, tensor):
        left_out.append(covers(self, tensor))
        return left_out[-1]

    monkeypatch.setattr(Quantizer, "takes_negatives_to_zero", spy)
    with torch.no_grad():
        got = sim.model(x)
    assert left_out == [True, True]
    assert torch.equal(got, sim.model(x).detach())  # with gradients, ReLU runs
    assert left_out == [True, True]
    again = copy.deepcopy(sim.model)
    with torch.no_grad():
        assert torch.equal(again(x), got)
    with torch.no_grad():  # while calibrating, statistics are of what ReLU gives
        sim.compute_encodings(lambda model: model(x))
    assert all(q.get_min() == 0 for q in [sim.model.get_submodule("1").output_quantizers[0]])


def test_a_relu_stays_where_it_makes_a_difference():
    x = torch.tensor([-1.0, -0.0, 0.5, float("nan")])
    quantizer = Quantizer(8)
    with torch.no_grad():
        for low, covers in ((0.0, True), (-0.5, False)):
            quantizer.set_range(low, 1.0)
            assert quantizer.takes_negatives_to_zero(x) == covers
            kept = _ownership.relu_unless_covered(x.clone(), quantizer)
            assert torch.equal(kept[:3], x[:3] if covers else x[:3].relu()) and kept[3].isnan()
        quantizer.set_range(0.0, 1.0)
        assert not quantizer.takes_negatives_to_zero(x.double())
        hook = quantizer.register_forward_pre_hook(lambda *_: None)
        assert not quantizer.takes_negatives_to_zero(x)
        hook.remove()
        assert quantizer.takes_negatives_to_zero(x)
    assert torch.equal(_ownership.relu_unless_covered(x, quantizer)[:3], x[:3].relu())
