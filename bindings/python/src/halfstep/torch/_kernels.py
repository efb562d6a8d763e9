# SPDX-License-Identifier: Apache-2.0
# Fake quantization of torch tensors: the engine's kernels on the CPU, torch's own ops elsewhere.
"""Fake quantization as an operation that autograd and `torch.compile` know.

On the CPU everything is computed by the engine. On other devices torch's own operations follow the
same arithmetic, one rounding at a time, so that the results are the same bits; only the sums of
range gradients may differ in their last digits. Whatever the input's type, the arithmetic is
float32, and results come back in the input's type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .. import _core
from .._faces import highest_code, lowest_code
from ..errors import InvalidArgumentError, ShapeMismatchError
from ._memory import pool


class Grid(NamedTuple):
    """What kind of integer grid a tensor is rounded to, and which elements share a scale."""

    bits: int = 8
    signed: bool = False
    symmetric: bool = False
    strict: bool = False
    #: Axis with one scale an index; None for one scale in all.
    axis: int | None = None
    #: Axis that is cut into blocks with a scale each; None for no blocks.
    block_axis: int | None = None
    block_size: int = 0

    @property
    def lowest(self) -> int:
        """Lowest code."""
        return lowest_code(self.bits, self.signed, self.strict)

    @property
    def highest(self) -> int:
        """Highest code."""
        return highest_code(self.bits, self.signed)

    def packed(self) -> list[int]:
        """Return the fields as integers, for torch's operator schemas."""
        return [-1000 if field is None else int(field) for field in self]


def _unpacked(fields: Sequence[int]) -> Grid:
    bits, signed, symmetric, strict, axis, block_axis, size = fields
    return Grid(
        bits,
        bool(signed),
        bool(symmetric),
        bool(strict),
        None if axis == -1000 else axis,
        None if block_axis == -1000 else block_axis,
        size,
    )


def _axis(axis: int | None, rank: int) -> int:
    if axis is None:
        return 0
    if not -rank <= axis < rank:
        raise InvalidArgumentError(f"axis {axis} is outside rank {rank}")
    return axis % rank


# ------------------------------------------------------------------------------------------------
# Grids between the ends of ranges


def grid_from_range(
    minimum: torch.Tensor, maximum: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales (float32) and zero points (int32) of the grids between the ends of ranges.

    Parameters
    ----------
    minimum, maximum : torch.Tensor
        Ends, one a group, any shape. On the CPU they must be finite.
    grid : Grid
        The kind of grid.
    """
    if torch.compiler.is_compiling():
        return _grid_op(minimum.detach(), maximum.detach(), grid.packed())
    return _grid_from_range(minimum.detach(), maximum.detach(), grid)


def _grid_from_range(
    minimum: torch.Tensor, maximum: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    if minimum.device.type == "cpu":
        scale = torch.empty(minimum.shape)
        zero_point = torch.empty(minimum.shape, dtype=torch.int32)
        _core.encoding_from_range(
            _floats(minimum),
            _floats(maximum),
            grid.bits,
            grid.signed,
            grid.symmetric,
            grid.strict,
            scale.numpy(),
            zero_point.numpy(),
        )
        return scale, zero_point
    return _grid_by_torch(minimum, maximum, grid)


def _grid_by_torch(
    minimum: torch.Tensor, maximum: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    # The engine's hs_encoding_from_range, operation by operation in float64.
    steps = grid.highest - grid.lowest
    low = minimum.to(torch.float64).clamp(max=0)
    width = maximum.to(torch.float64).clamp(min=0) - low
    least = min(torch.finfo(torch.float32).eps, 0.01 / ((1 << grid.bits) - 1))
    step = (width / steps).clamp(min=least)
    if grid.symmetric:
        zero_point = torch.zeros(minimum.shape, dtype=torch.int32, device=minimum.device)
    else:
        zero_point = ((-low / step).round().clamp(max=steps) + grid.lowest).to(torch.int32)
    return step.to(torch.float32), zero_point


def range_from_grid(
    scale: torch.Tensor, zero_point: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ends (float32, on the CPU) from which `grid_from_range` makes exactly this grid.

    Raises
    ------
    InvalidArgumentError
        If no range does, such as for a symmetric grid with a zero point other than 0.
    """
    scale = scale.detach().to("cpu", torch.float32).contiguous()
    zero_point = zero_point.detach().to("cpu", torch.int32).contiguous()
    minimum = torch.empty(scale.shape)
    maximum = torch.empty(scale.shape)
    _core.encoding_to_range(
        scale.numpy(),
        zero_point.numpy(),
        grid.bits,
        grid.signed,
        grid.symmetric,
        grid.strict,
        minimum.numpy(),
        maximum.numpy(),
    )
    return minimum, maximum


# ------------------------------------------------------------------------------------------------
# CPU: the engine's kernels


def _floats(tensor: torch.Tensor) -> Any:
    """Return a row-major float32 NumPy view of a CPU tensor, or of a copy if it is none."""
    return tensor.to(torch.float32).contiguous().numpy(force=True)


#: Position of each axis of a channels-last tensor in memory order.
_CHANNELS_LAST = {4: ((0, 2, 3, 1), (0, 3, 1, 2)), 5: ((0, 2, 3, 4, 1), (0, 4, 1, 2, 3))}


def _memory_order(x: torch.Tensor) -> tuple[int, ...] | None:
    """Return the order of axes in which a channels-last tensor is dense, if it is one."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return _CHANNELS_LAST[4][0]
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return _CHANNELS_LAST[5][0]
    return None


def in_memory_order(x: torch.Tensor) -> torch.Tensor:
    """Return a channels-last tensor with its axes in the order in which it is dense."""
    order = None if x.is_contiguous() else _memory_order(x)
    return x if order is None else x.permute(order)


def _layout(grid: Grid, rank: int, order: tuple[int, ...] | None) -> tuple[int, int, int, int]:
    """Return granularity, channel axis, block axis and block size, as the engine counts them."""
    granularity = 2 if grid.block_axis is not None else 0 if grid.axis is None else 1
    if granularity == 0:
        return 0, 0, 0, 0
    axes = [_axis(grid.axis, rank), _axis(grid.block_axis, rank)]
    if order is not None:
        axes = [_CHANNELS_LAST[rank][1][axis] for axis in axes]
    return granularity, axes[0], axes[1] if granularity == 2 else 0, grid.block_size


class _Dense(NamedTuple):
    """A CPU tensor in float32, its axes in the order in which memory has them."""

    values: torch.Tensor
    #: The order of axes if it is not row-major.
    order: tuple[int, ...] | None

    def like(self, other: torch.Tensor) -> torch.Tensor:
        """Return another tensor of the same shape in float32 and in this order of axes."""
        other = other.to(torch.float32)
        return other if self.order is None else other.permute(self.order)

    def restored(self, result: torch.Tensor) -> torch.Tensor:
        """Return what was computed in this order with its axes where they were."""
        if self.order is None:
            return result
        return result.permute(_CHANNELS_LAST[result.dim()][1])


def _dense(x: torch.Tensor) -> _Dense:
    values = x.detach().to(torch.float32)
    if values.is_contiguous():
        return _Dense(values, None)
    order = _memory_order(values)
    return (
        _Dense(values.contiguous(), None) if order is None else _Dense(values.permute(order), order)
    )


def _round_into(
    dense: _Dense, out: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, grid: Grid
) -> None:
    _core.fake_quantize(
        dense.values.numpy(),
        _floats(scale),
        zero_point.numpy(),
        out.numpy(),
        *_layout(grid, out.dim(), dense.order),
        grid.bits,
        grid.signed,
        grid.strict,
    )


def _forward_cpu(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, grid: Grid
) -> torch.Tensor:
    dense = _dense(x)
    out = pool.empty(dense.values.shape)
    _round_into(dense, out, scale, zero_point, grid)
    return dense.restored(out).to(x.dtype)


def fake_quantize_in_place(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, grid: Grid
) -> bool:
    """Round a float32 tensor on the CPU where it lies, if it is dense; return whether it is.

    No gradient passes through. The caller sees to it that nobody needs the values as they were.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    dense = _dense(x)
    if dense.values.data_ptr() != x.data_ptr():
        return False
    _round_into(dense, dense.values, scale, zero_point, grid)
    return True


def _backward_cpu(
    upstream: torch.Tensor,
    x: torch.Tensor,
    minimum: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    grid: Grid,
    wants_range: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dense = _dense(x)
    out = pool.empty(dense.values.shape)
    low = torch.empty(scale.shape if wants_range else (0,))
    high = torch.empty_like(low)
    _core.fake_quantize_backward(
        dense.values.numpy(),
        _floats(scale),
        zero_point.numpy(),
        # A gradient laid out like the input is read in place; another one the engine copies.
        dense.like(upstream).numpy(force=True),
        out.numpy(),
        _floats(minimum) if wants_range else None,
        low.numpy() if wants_range else None,
        high.numpy() if wants_range else None,
        *_layout(grid, x.dim(), dense.order),
        grid.bits,
        grid.signed,
        grid.symmetric,
        grid.strict,
    )
    return dense.restored(out).to(x.dtype), low, high


# ------------------------------------------------------------------------------------------------
# Other devices: torch's own ops


def _spread(groups: torch.Tensor, x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return one value a group so that it broadcasts against the tensor."""
    if grid.axis is None and grid.block_axis is None:
        expected = 1
    else:
        channels = _axis(grid.axis, x.dim())
        expected = x.shape[channels]
        if grid.block_axis is not None:
            expected *= -(-x.shape[_axis(grid.block_axis, x.dim())] // grid.block_size)
    if groups.numel() != expected:
        raise ShapeMismatchError(
            f"grid for tensor {list(x.shape)}: expected {expected} scales, got {groups.numel()}"
        )
    if grid.axis is None and grid.block_axis is None:
        return groups.reshape(())
    shape = [1] * x.dim()
    shape[channels] = x.shape[channels]
    if grid.block_axis is None:
        return groups.reshape(shape)
    blocks = _axis(grid.block_axis, x.dim())
    extent = x.shape[blocks]
    spread = groups.reshape(shape[channels], -1).repeat_interleave(grid.block_size, 1)[:, :extent]
    shape[blocks] = extent
    return (spread if channels < blocks else spread.t()).reshape(shape)


def _gathered(values: torch.Tensor, grid: Grid, like: torch.Tensor) -> torch.Tensor:
    """Return float64 sums over each group's elements, shaped as the scales."""
    if grid.axis is None and grid.block_axis is None:
        return values.sum(dtype=torch.float64).reshape(like.shape)
    channels = _axis(grid.axis, values.dim())
    if grid.block_axis is None:
        rest = [axis for axis in range(values.dim()) if axis != channels]
        sums = values.sum(rest, dtype=torch.float64) if rest else values.to(torch.float64)
        return sums.reshape(like.shape)
    values = values.movedim((channels, _axis(grid.block_axis, values.dim())), (0, 1))
    values = values.flatten(2).sum(2, dtype=torch.float64) if values.dim() > 2 else values
    missing = -values.shape[1] % grid.block_size
    values = torch.nn.functional.pad(values.to(torch.float64), (0, missing))
    return values.reshape(values.shape[0], -1, grid.block_size).sum(2).reshape(like.shape)


def _quotients(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x/s, s, and the ends of the grid relative to the zero point, all to broadcast."""
    step = _spread(scale, x, grid)
    zeros = _spread(zero_point, x, grid).to(torch.float32)
    return x.to(torch.float32) * (1 / step), step, grid.lowest - zeros, grid.highest - zeros


def _forward_torch(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, grid: Grid
) -> torch.Tensor:
    quotients, step, low, high = _quotients(x, scale, zero_point, grid)
    # fmax takes the bound in place of NaN, and adding 0 makes negative zeros positive.
    codes = torch.fmin(torch.fmax(quotients.round(), low), high) + 0.0
    return (codes * step).to(x.dtype)


def _backward_torch(
    upstream: torch.Tensor,
    x: torch.Tensor,
    minimum: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    grid: Grid,
    wants_range: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gradient = upstream.to(torch.float32)
    quotients, step, low, high = _quotients(x, scale, zero_point, grid)
    quotients = torch.fmin(torch.fmax(quotients, low - 1), high + 1)
    codes = quotients.round()
    below = codes < low
    above = codes > high
    result = gradient.masked_fill(below | above, 0)
    if not wants_range:
        empty = torch.empty(0, device=x.device)
        return result.to(x.dtype), empty, empty
    outside = torch.where(below, low, high) * (below | above)
    slope = _gathered(result * (codes - quotients) + gradient * outside, grid, scale)
    steps = grid.highest - grid.lowest
    lower = -slope / steps
    upper = slope / steps
    if not grid.symmetric:
        step64 = scale.to(torch.float64)
        shift = _gathered(gradient * (below | above), grid, scale) * step64
        tilt = minimum.to(torch.float64).clamp(max=0) / (step64 * step64 * steps)
        lower = lower + shift * (1 / step64 + tilt)
        upper = upper - shift * tilt
    return result.to(x.dtype), lower.to(torch.float32), upper.to(torch.float32)


# ------------------------------------------------------------------------------------------------
# Operations


def _forward(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, grid: Grid
) -> torch.Tensor:
    on_cpu = x.device.type == "cpu"
    return (_forward_cpu if on_cpu else _forward_torch)(x, scale, zero_point, grid)


def _backward(
    upstream: torch.Tensor,
    x: torch.Tensor,
    minimum: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    grid: Grid,
    wants_range: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    on_cpu = x.device.type == "cpu"
    compute = _backward_cpu if on_cpu else _backward_torch
    return compute(upstream, x, minimum, scale, zero_point, grid, wants_range)


class _FakeQuantize(torch.autograd.Function):
    """Fake quantization whose gradients reach the input and the ends of the range."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        minimum: torch.Tensor,
        maximum: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        grid: Grid,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, minimum, scale, zero_point)
        ctx.grid = grid
        return _forward(x, scale, zero_point, grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, minimum, scale, zero_point = ctx.saved_tensors
        wants_range = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        gradient, low, high = _backward(
            upstream, x, minimum, scale, zero_point, ctx.grid, wants_range
        )
        return (
            gradient if ctx.needs_input_grad[0] else None,
            low.to(minimum.dtype) if ctx.needs_input_grad[1] else None,
            high.to(minimum.dtype) if ctx.needs_input_grad[2] else None,
            None,
            None,
            None,
        )


def fake_quantize(
    x: torch.Tensor,
    minimum: torch.Tensor,
    maximum: torch.Tensor,
    grid: Grid,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    """Round a tensor to the grid between the ends of a range, half to even.

    Parameters
    ----------
    x : torch.Tensor
        Floating-point values of any layout.
    minimum, maximum : torch.Tensor
        Ends, one a group: ``()``, ``[channels]`` or ``[channels, blocks]``.
    grid : Grid
        The kind of grid.
    scale, zero_point : torch.Tensor, optional
        What `grid_from_range` made of the ends, if that is known already.

    Returns
    -------
    torch.Tensor
        Same shape and type. Gradients: straight-through inside the grid for `x`, and those of
        range learning (Bhalgat et al., "LSQ+", 2020, arXiv:2004.09576) for the ends.

    Raises
    ------
    NonFiniteValueError
        If an end is NaN or infinite (checked on the CPU only).
    ShapeMismatchError, InvalidArgumentError
        If the groups do not fit the tensor.
    """
    if scale is None or zero_point is None:
        scale, zero_point = grid_from_range(minimum, maximum, grid)
    if torch.compiler.is_compiling():
        return _fake_quantize_op(x, minimum, maximum, scale, zero_point, grid.packed())
    if torch.is_grad_enabled() and (
        x.requires_grad or minimum.requires_grad or maximum.requires_grad
    ):
        return _FakeQuantize.apply(x, minimum, maximum, scale, zero_point, grid)
    return _forward(x, scale, zero_point, grid)


# What torch.compile sees: opaque operators with shapes, and the gradient of each.


@torch.library.custom_op("halfstep::grid_from_range", mutates_args=())
def _grid_op(
    minimum: torch.Tensor, maximum: torch.Tensor, grid: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    return _grid_from_range(minimum, maximum, _unpacked(grid))


@_grid_op.register_fake
def _(
    minimum: torch.Tensor, maximum: torch.Tensor, grid: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.empty_like(minimum, dtype=torch.float32)
    return scale, torch.empty_like(minimum, dtype=torch.int32)


@torch.library.custom_op("halfstep::fake_quantize", mutates_args=())
def _fake_quantize_op(
    x: torch.Tensor,
    minimum: torch.Tensor,
    maximum: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    grid: Sequence[int],
) -> torch.Tensor:
    return _forward(x, scale, zero_point, _unpacked(grid)).contiguous()


@_fake_quantize_op.register_fake
def _(
    x: torch.Tensor,
    minimum: torch.Tensor,
    maximum: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    grid: Sequence[int],
) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("halfstep::fake_quantize_backward", mutates_args=())
def _fake_quantize_backward_op(
    upstream: torch.Tensor,
    x: torch.Tensor,
    minimum: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    grid: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    result, low, high = _backward(
        upstream, x, minimum, scale, zero_point, _unpacked(grid), wants_range=True
    )
    return result.contiguous(), low, high


@_fake_quantize_backward_op.register_fake
def _(
    upstream: torch.Tensor,
    x: torch.Tensor,
    minimum: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    grid: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low = torch.empty_like(scale)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), low, torch.empty_like(low)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, minimum, _, scale, zero_point, grid = inputs
    ctx.save_for_backward(x, minimum, scale, zero_point)
    ctx.grid = grid


def _compiled_backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    result, low, high = _fake_quantize_backward_op(upstream, *ctx.saved_tensors, ctx.grid)
    return result, low, high, None, None, None


_fake_quantize_op.register_autograd(_compiled_backward, setup_context=_setup_context)
