# SPDX-License-Identifier: Apache-2.0
# Fake quantization of torch tensors against references in float64, AIMET's numbers and differences.
import json
import os
import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from halfstep.torch import Quantizer, _kernels  # noqa: E402
from halfstep.torch._kernels import Grid  # noqa: E402

GOLDEN = (
    pathlib.Path(
        os.environ.get("HALFSTEP_SHARED")
        or pathlib.Path(__file__).resolve().parents[4].parent / "shared"
    )
    / "reference/golden"
)

GRIDS = [
    Grid(4),
    Grid(8, signed=True),
    Grid(8, signed=True, symmetric=True),
    Grid(4, signed=True, symmetric=True, strict=True),
    Grid(6, symmetric=True),
    Grid(4, axis=1),
    Grid(8, signed=True, symmetric=True, axis=0),
    Grid(4, axis=-1),
    Grid(4, axis=0, block_axis=1, block_size=4),
    Grid(5, signed=True, symmetric=True, axis=1, block_axis=0, block_size=2),
    Grid(3, axis=1, block_axis=3, block_size=3),
]


def range_shape(grid, shape):
    if grid.axis is None:
        return ()
    if grid.block_axis is None:
        return (shape[grid.axis],)
    return (shape[grid.axis], -(-shape[grid.block_axis] // grid.block_size))


def case(grid, shape=(3, 6, 4, 5), seed=0):
    """Values that reach beyond the range, an upstream gradient, and ends of the range."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 1.5
    upstream = torch.randn(shape, generator=generator)
    groups = range_shape(grid, shape)
    spread = torch.rand(groups, generator=generator)
    if grid.symmetric and not grid.signed:
        minimum = torch.zeros(groups)
    else:
        minimum = -0.7 - spread
    maximum = (
        minimum * (grid.highest / grid.lowest)
        if grid.symmetric and grid.signed
        else 0.9 + 0.5 * torch.rand(groups, generator=generator)
    )
    return x, upstream, minimum, maximum


class StraightThroughRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rounded):
        return rounded.to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def reference(x, minimum, maximum, grid):
    """Fake quantization in float64 by autograd: only roundings pass straight through.

    The roundings themselves are those of float32, as the definition says.
    """
    scale32, zero32 = _kernels._grid_by_torch(minimum.detach(), maximum.detach(), grid)
    x64, low, high = (t.to(torch.float64) for t in (x, minimum, maximum))
    step = (high - low) / (grid.highest - grid.lowest)
    if grid.symmetric:
        zero = torch.zeros_like(step)
    else:
        zero = StraightThroughRound.apply(-low / step, zero32 - grid.lowest) + grid.lowest

    def spread(groups):
        return _kernels._spread(groups, x, grid)

    quotient = x.detach() * (1 / spread(scale32))
    rounded = StraightThroughRound.apply(x64 / spread(step), quotient.round())
    codes = rounded + spread(zero)
    codes = torch.where(codes < grid.lowest, grid.lowest, codes)
    codes = torch.where(codes > grid.highest, grid.highest, codes)
    return (codes - spread(zero)) * spread(step)


def leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equals_float64_autograd(grid):
    x, upstream, minimum, maximum = case(grid)
    ours = leaves(x, minimum, maximum)
    y = _kernels.fake_quantize(*ours, grid)
    y.backward(upstream)
    theirs = leaves(x, minimum, maximum)
    expected = reference(*theirs, grid)
    expected.backward(upstream.to(torch.float64))
    # One product in float32 with a scale rounded to float32: two roundings of 2^-24.
    torch.testing.assert_close(y.double(), expected, rtol=2.1 * 2**-24, atol=0)
    assert torch.equal(ours[0].grad, theirs[0].grad)
    # Each of up to 360 terms of a sum is a gradient (below 5) times a rounding error or a code over
    # the number of steps (below 1.3 with the range), with float32's error twice; the quotient's own
    # error, 2^-24 of a code, enters the rounding error by at most 2^8 codes.
    tolerance = x.numel() * 5 * 2**-23 * 4
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=2**-20, atol=tolerance)


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.axis is None], ids=str)
def test_scale_gradient_equals_a_difference(grid):
    # With the codes of an element held, its output is linear in the scale: moving both ends by a
    # factor changes inside values by code times step. The gradient of the ends along (min, max)
    # is that, less the part which the straight-through quotient takes: sum of g*x inside. The
    # zero point stays, because min/s does.
    x, upstream, minimum, maximum = case(grid)
    ends = leaves(minimum, maximum)
    y = _kernels.fake_quantize(x, *ends, grid)
    y.backward(upstream)
    scale, zero = _kernels.grid_from_range(minimum, maximum, grid)
    quotient = (x * (1 / scale)).round() + zero
    inside = (quotient >= grid.lowest) & (quotient <= grid.highest)
    factor = 1 + 2.0**-10
    codes = (quotient.clamp(grid.lowest, grid.highest) - zero).double()
    change = ((codes * scale.double() * factor - codes * scale.double()) * upstream).sum()
    expected = change / (factor - 1) - (upstream * x * inside).double().sum()
    along = ends[0].grad * minimum + ends[1].grad * maximum
    # Sums of 360 products below 8, in float32.
    assert abs(along.double() - expected) < x.numel() * 8 * 2**-22


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_other_devices_follow_the_same_arithmetic(grid):
    # The path for other devices, run on the CPU beside the engine's.
    for seed in range(3):
        x, upstream, minimum, maximum = case(grid, seed=seed)
        x.view(-1)[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -1e-9])
        ours = _kernels._grid_from_range(minimum, maximum, grid)
        theirs = _kernels._grid_by_torch(minimum, maximum, grid)
        assert all(map(torch.equal, ours, theirs))
        y = _kernels._forward_cpu(x, *ours, grid)
        z = _kernels._forward_torch(x, *ours, grid)
        assert torch.equal(y.view(torch.int32), z.view(torch.int32))
        backward = (upstream, x, minimum, *ours, grid, True)
        dx, low, high = _kernels._backward_cpu(*backward)
        dx2, low2, high2 = _kernels._backward_torch(*backward)
        assert torch.equal(dx, dx2)
        # Sums of up to 360 terms below 8, in float32 here and in float64 there.
        torch.testing.assert_close(low, low2, rtol=2**-18, atol=x.numel() * 8 * 2**-24)
        torch.testing.assert_close(high, high2, rtol=2**-18, atol=x.numel() * 8 * 2**-24)


def test_grids_of_many_ranges_are_the_same_bits():
    generator = torch.Generator().manual_seed(7)
    exponent = torch.rand(20_000, generator=generator) * 60 - 30
    minimum = -torch.rand(20_000, generator=generator) * 2**exponent
    maximum = torch.rand(20_000, generator=generator) * 2**exponent
    minimum[::7] = 0
    maximum[::11] = 0
    minimum[5], maximum[5] = 1.0, -1.0  # ends that training pushed past zero
    for grid in (
        Grid(2),
        Grid(8),
        Grid(16),
        Grid(8, True),
        Grid(8, True, True),
        Grid(4, True, True),
    ):
        ours = _kernels._grid_from_range(minimum, maximum, grid)
        assert all(map(torch.equal, ours, _kernels._grid_by_torch(minimum, maximum, grid)))
        # And back: the ends that a grid gives lead to the same grid.
        ends = _kernels.range_from_grid(*ours, grid)
        assert all(map(torch.equal, ours, _kernels._grid_from_range(*ends, grid)))


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden numbers beside the checkout")
def test_equals_aimet():
    cases = json.loads((GOLDEN / "torch_fakequant.json").read_text())
    arrays = np.load(GOLDEN / "torch_fakequant.npz")
    x, upstream = torch.tensor(arrays["x"]), torch.tensor(arrays["g"])
    grids = {
        "tensor": {},
        "channel0": {"axis": 0},
        "channel1": {"axis": 1},
        "block": {"axis": 0, "block_axis": 1, "block_size": 3},
    }
    for row in cases:
        grid = Grid(
            row["bw"],
            row["qmin"] < 0,
            row["symmetric"],
            row["mode"] == "strict",
            **grids[row["gran"]],
        )
        groups = range_shape(grid, x.shape)
        values, minimum, maximum = leaves(
            x, *(torch.tensor(row[key]).reshape(groups) for key in ("min_set", "max_set"))
        )
        scale, zero = _kernels.grid_from_range(minimum, maximum, grid)
        key = row["key"]
        # AIMET divides in float32, the engine in float64: an ulp.
        expected = torch.tensor(row["scale"]).reshape(groups)
        torch.testing.assert_close(scale, expected, rtol=2**-23, atol=0)
        assert torch.equal(zero.float(), -torch.tensor(row["offset"]).reshape(groups)), key
        y = _kernels.fake_quantize(values, minimum, maximum, grid)
        y.backward(upstream)
        step = float(scale.max())
        # A quotient beside a tie may round the other way after that ulp: a step, for few values.
        difference = (y.detach() - torch.tensor(arrays[f"{key}_y"])).abs()
        assert difference.max() <= step * 1.0001, key
        assert (difference > step / 2).float().mean() <= 0.02 or row["range"] == "tie", key
        torch.testing.assert_close(values.grad, torch.tensor(arrays[f"{key}_gx"]))
        if (difference > step / 2).any():
            continue  # a value that rounds the other way has another rounding error
        # As derived in FakeQuantizeGoldenTests.swift: float sums of terms below 8.
        tolerance = x.numel() * 8 * 2**-24
        for end, name in ((minimum, "min"), (maximum, "max")):
            expected = torch.tensor(row["grads"][name]).reshape(groups)
            torch.testing.assert_close(end.grad, expected, rtol=0, atol=tolerance, msg=key)


def test_layouts_and_types():
    grid = Grid(8, axis=1)
    x, upstream, minimum, maximum = case(grid, (2, 6, 8, 4))
    expected = _kernels.fake_quantize(x, minimum, maximum, grid)

    def gradients(values, gradient):
        inputs = leaves(values, minimum, maximum)
        _kernels.fake_quantize(*inputs, grid).backward(gradient)
        return [leaf.grad for leaf in inputs]

    wanted = gradients(x, upstream)
    layouts = {
        "channels last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(1, 3).contiguous().transpose(1, 3),
        "cut": torch.cat([x, x], 3)[..., :4],
        "backwards": x.flip(3).contiguous().flip(3),
    }
    for name, values in layouts.items():
        got = _kernels.fake_quantize(values, minimum, maximum, grid)
        assert torch.equal(got, expected), name
        for gradient in (upstream, upstream.to(memory_format=torch.channels_last)):
            results = gradients(values, gradient)
            assert torch.equal(results[0], wanted[0]), name
            # The order of the sums follows memory.
            for mine, other in zip(results[1:], wanted[1:], strict=True):
                torch.testing.assert_close(mine, other, rtol=2**-20, atol=x.numel() * 2**-22)
    last = layouts["channels last"]
    got = _kernels.fake_quantize(last, minimum, maximum, grid)
    assert got.is_contiguous(memory_format=torch.channels_last)

    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        values = x.to(dtype).requires_grad_()
        ends = leaves(minimum, maximum)
        got = _kernels.fake_quantize(values, *ends, grid)
        assert got.dtype == dtype
        exact = _kernels.fake_quantize(values.detach().float(), minimum, maximum, grid)
        assert torch.equal(got, exact.to(dtype))
        got.backward(upstream.to(dtype))
        assert values.grad.dtype == dtype and ends[0].grad.dtype == torch.float32

    # Large results get their memory elsewhere.
    large = torch.randn(2, 6, 320, 320)
    last = large.to(memory_format=torch.channels_last).requires_grad_()
    got = _kernels.fake_quantize(last, minimum, maximum, grid)
    assert torch.equal(got, _kernels.fake_quantize(large, minimum, maximum, grid))
    assert got.is_contiguous(memory_format=torch.channels_last)
    got.backward(large)
    plain = large.clone().requires_grad_()
    _kernels.fake_quantize(plain, minimum, maximum, grid).backward(large)
    assert torch.equal(last.grad, plain.grad)

    empty = _kernels.fake_quantize(torch.zeros(0, 6, 2), minimum, maximum, grid)
    assert empty.shape == (0, 6, 2)
    ends = torch.tensor(-1.0), torch.tensor(1.0)
    scalar = _kernels.fake_quantize(torch.tensor(0.4), *ends, Grid(2))
    assert scalar.shape == () and abs(scalar.item() - 2 / 3) < 1e-6


def test_same_bits_for_any_number_of_threads():
    import halfstep

    grid = Grid(8)
    x, upstream, minimum, maximum = case(grid, (4, 64, 40, 40))
    results = []
    threads = halfstep.thread_count()
    try:
        for count in (1, 2, 5):
            halfstep.set_thread_count(count)
            inputs = leaves(x, minimum, maximum)
            _kernels.fake_quantize(*inputs, grid).backward(upstream)
            results.append([leaf.grad for leaf in inputs])
    finally:
        halfstep.set_thread_count(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_errors_name_what_is_wrong():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="group 1.*not finite"):
        ends = torch.tensor([0.0, torch.nan, 0.0])
        _kernels.fake_quantize(x, ends, torch.ones(3), Grid(8, axis=1))
    with pytest.raises(Exception, match="expected 3 scales, got 2"):
        _kernels.fake_quantize(x, torch.zeros(2), torch.ones(2), Grid(8, axis=1))
    with pytest.raises(Exception, match="expected 3 scales, got 2"):
        _kernels._forward_torch(x, torch.ones(2), torch.zeros(2), Grid(8, axis=1))
    with pytest.raises(ValueError, match="axis 2 is outside rank 2"):
        _kernels.fake_quantize(x, torch.zeros(2), torch.ones(2), Grid(8, axis=2))
    with pytest.raises(ValueError, match="no range has scale"):
        _kernels.range_from_grid(torch.ones(1), torch.ones(1), Grid(8, True, True))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_cuda_equals_cpu(grid):
    x, upstream, minimum, maximum = case(grid)
    ours = leaves(x, minimum, maximum)
    y = _kernels.fake_quantize(*ours, grid)
    y.backward(upstream)
    theirs = leaves(x.cuda(), minimum.cuda(), maximum.cuda())
    z = _kernels.fake_quantize(*theirs, grid)
    z.backward(upstream.cuda())
    assert torch.equal(y, z.cpu())
    assert torch.equal(ours[0].grad, theirs[0].grad.cpu())
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        # Sums of up to 360 terms below 8, in float32 here and in float64 there.
        close = {"rtol": 2**-18, "atol": x.numel() * 8 * 2**-24}
        torch.testing.assert_close(mine.grad, other.grad.cpu(), **close)


def test_quantizer_equals_the_kernel():
    grid = GRIDS[6]
    x, _, minimum, maximum = case(grid)
    quantizer = Quantizer(8, True, channel_axis=0, shape=(3,), name="weight")
    quantizer.set_range(minimum, maximum)
    assert torch.equal(quantizer(x), _kernels.fake_quantize(x, minimum, maximum, grid))
