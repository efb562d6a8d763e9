# SPDX-License-Identifier: Apache-2.0
# A quantizer as a trainable module.
"""Fake quantization as a module whose range can be trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import InvalidArgumentError, InvalidStateError, ShapeMismatchError
from . import _kernels
from ._ownership import may_overwrite

Observer = Callable[[torch.Tensor], None]


class Quantizer(nn.Module):
    """Rounds tensors to an integer grid and back; the ends of its range are parameters.

    Values pass through unchanged while the quantizer is off (`enabled`) or has no range yet, and
    while an `observer` watches them for calibration.

    Parameters
    ----------
    bits : int
        Width of the codes, 2 to 16.
    is_symmetric : bool
        Whether zero is code 0 of a signed grid (or the lowest of an unsigned one) wherever the
        range lies.
    is_signed : bool, optional
        Whether codes start at ``-2**(bits - 1)``; by default, symmetric ones do.
    is_strict : bool
        Whether the lowest signed code is left out.
    channel_axis : int, optional
        Axis with one range an index; by default one range serves all.
    block : tuple of int, optional
        Axis that is cut into blocks, and elements of a block.
    shape : sequence of int
        Shape of the range: ``()``, ``(channels,)`` or ``(channels, blocks)``.
    name : str
        Tensor that is quantized, for messages.

    Attributes
    ----------
    minimum, maximum : torch.nn.Parameter
        Ends of the range, float32. They take gradients while the quantizer is `learnable`,
        `enabled` and not `frozen`.
    observer : callable or None
        Called with each input instead of quantizing it. It is not copied, pickled or saved.

    Examples
    --------
    >>> import torch
    >>> quantizer = Quantizer(bits=2, name="x")
    >>> quantizer.set_range(-0.5, 1.0)
    >>> quantizer(torch.tensor([-3.0, 0.05, 0.3, 9.0]))
    tensor([-0.5000,  0.0000,  0.5000,  1.0000], grad_fn=<_FakeQuantizeBackward>)
    """

    def __init__(
        self,
        bits: int = 8,
        is_symmetric: bool = False,
        is_signed: bool | None = None,
        is_strict: bool = False,
        channel_axis: int | None = None,
        block: tuple[int, int] | None = None,
        shape: Sequence[int] = (),
        name: str = "",
    ) -> None:
        super().__init__()
        self.name = name
        self.channel_axis = channel_axis
        self.block = None if block is None else (int(block[0]), int(block[1]))
        if self.block is not None and (channel_axis is None or self.block[1] < 1):
            raise InvalidArgumentError(
                f"quantizer '{name}': a block needs a channel axis and a positive size"
            )
        self._check_bits(bits)
        self._bits = int(bits)
        self._is_symmetric = bool(is_symmetric)
        self._is_signed = bool(is_symmetric if is_signed is None else is_signed)
        self._is_strict = bool(is_strict)
        self._enabled = True
        self._frozen = False
        self._learnable = True
        self._has_range = False
        self.observer: Observer | None = None
        self._known: tuple[Any, tuple[torch.Tensor, torch.Tensor]] | None = None
        # NaN stands for a range that is not known; it is never computed with.
        self.minimum = nn.Parameter(torch.full(tuple(shape), torch.nan), requires_grad=False)
        self.maximum = nn.Parameter(torch.full(tuple(shape), torch.nan), requires_grad=False)

    # --------------------------------------------------------------------------------------------
    # What kind of grid

    def _check_bits(self, bits: int) -> None:
        if not 2 <= int(bits) <= 16:
            raise InvalidArgumentError(
                f"quantizer '{self.name}': expected 2 to 16 bits, got {bits}"
            )

    @property
    def bits(self) -> int:
        """Width of the codes; the range stays when it changes."""
        return self._bits

    @bits.setter
    def bits(self, bits: int) -> None:
        self._refuse_if_frozen("bits")
        self._check_bits(bits)
        self._bits = int(bits)

    #: AIMET's name for `bits`.
    bitwidth = bits

    @property
    def is_symmetric(self) -> bool:
        """Whether zero points are 0; setting it to another value forgets the range."""
        return self._is_symmetric

    @is_symmetric.setter
    def is_symmetric(self, is_symmetric: bool) -> None:
        self._refuse_if_frozen("is_symmetric")
        if bool(is_symmetric) != self._is_symmetric:
            self._is_symmetric = self._is_signed = bool(is_symmetric)
            self.clear_range()

    #: AIMET's name for `is_symmetric`.
    symmetric = is_symmetric

    @property
    def is_signed(self) -> bool:
        """Whether codes start at ``-2**(bits - 1)``; a change forgets a symmetric range."""
        return self._is_signed

    @is_signed.setter
    def is_signed(self, is_signed: bool) -> None:
        self._refuse_if_frozen("is_signed")
        if bool(is_signed) != self._is_signed and self._is_symmetric:
            self.clear_range()
        self._is_signed = bool(is_signed)

    @property
    def is_strict(self) -> bool:
        """Whether the lowest signed code is left out."""
        return self._is_strict

    @property
    def grid(self) -> _kernels.Grid:
        """The kind of grid, as the kernels take it."""
        axis, size = self.block if self.block is not None else (None, 0)
        return _kernels.Grid(
            self._bits,
            self._is_signed,
            self._is_symmetric,
            self._is_strict,
            self.channel_axis,
            axis,
            size,
        )

    # --------------------------------------------------------------------------------------------
    # Switches

    @property
    def enabled(self) -> bool:
        """Whether values are quantized; otherwise they pass through."""
        return self._enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._enabled = bool(enabled)
        self._update_gradients()

    @property
    def frozen(self) -> bool:
        """Whether the range is kept: by training, by calibration, and by `set_range`."""
        return self._frozen

    @frozen.setter
    def frozen(self, frozen: bool) -> None:
        if frozen and not self._has_range:
            raise InvalidStateError(f"quantizer '{self.name}' has no range to keep")
        self._frozen = bool(frozen)
        self._update_gradients()

    @property
    def learnable(self) -> bool:
        """Whether training moves the range, while it is neither frozen nor switched off."""
        return self._learnable

    @learnable.setter
    def learnable(self, learnable: bool) -> None:
        self._learnable = bool(learnable)
        self._update_gradients()

    @property
    def has_range(self) -> bool:
        """Whether the range is known."""
        return self._has_range

    #: AIMET's question whether a quantizer was calibrated.
    def is_initialized(self) -> bool:
        """Return whether the range is known."""
        return self._has_range

    def freeze(self) -> None:
        """Keep the range as it is."""
        self.frozen = True

    def _update_gradients(self) -> None:
        moves = self._learnable and self._enabled and self._has_range and not self._frozen
        for end in (self.minimum, self.maximum):
            if end.requires_grad != moves:
                end.requires_grad_(moves)
            if not moves:
                end.grad = None

    def _refuse_if_frozen(self, what: str) -> None:
        if self._frozen:
            raise InvalidStateError(f"quantizer '{self.name}' is frozen: {what} cannot change")

    # --------------------------------------------------------------------------------------------
    # Range

    @torch.no_grad()
    def set_range(self, minimum: Any, maximum: Any) -> None:
        """Set both ends of the range.

        Parameters
        ----------
        minimum, maximum : torch.Tensor or float
            Finite ends of the range's shape; one number serves all groups.

        Raises
        ------
        InvalidStateError
            If the quantizer is frozen.
        InvalidArgumentError, ShapeMismatchError
            For an end that is not finite, ends in the wrong order, or another number of groups.
        """
        self._refuse_if_frozen("its range")
        low = self._as_ends(minimum, "minimum")
        high = self._as_ends(maximum, "maximum")
        if bool((low > high).any()):
            raise InvalidArgumentError(f"quantizer '{self.name}': minimum is above maximum")
        self.minimum.copy_(low)
        self.maximum.copy_(high)
        self._has_range = True
        self._update_gradients()

    def _as_ends(self, values: Any, what: str) -> torch.Tensor:
        ends = torch.as_tensor(values).detach().to(torch.float32)
        if not bool(ends.isfinite().all()):
            raise InvalidArgumentError(f"quantizer '{self.name}': {what} is not finite")
        if ends.numel() not in (1, self.minimum.numel()):
            raise ShapeMismatchError(
                f"quantizer '{self.name}' {what}: expected {self.minimum.numel()} values,"
                f" got {ends.numel()}"
            )
        shape = self.minimum.shape
        return ends.reshape(()).expand(shape) if ends.numel() == 1 else ends.reshape(shape)

    @torch.no_grad()
    def set_encoding(self, scale: Any, zero_point: Any) -> None:
        """Set the range whose grid is exactly this one.

        Parameters
        ----------
        scale : torch.Tensor or array_like
            Positive steps, one a group.
        zero_point : torch.Tensor or array_like
            Codes that stand for 0, one a group.

        Raises
        ------
        InvalidStateError
            If the quantizer is frozen.
        InvalidArgumentError, ShapeMismatchError
            If no range of this kind of quantizer has the grid, or for another number of groups.
        """
        self._refuse_if_frozen("its range")
        scales = torch.as_tensor(scale, dtype=torch.float32).reshape(-1)
        zeros = torch.as_tensor(zero_point, dtype=torch.int32).reshape(-1).expand(scales.shape)
        if scales.numel() != self.minimum.numel():
            raise ShapeMismatchError(
                f"quantizer '{self.name}': expected {self.minimum.numel()} scales,"
                f" got {scales.numel()}"
            )
        try:
            low, high = _kernels.range_from_grid(scales, zeros, self.grid)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"quantizer '{self.name}': {error}") from None
        self.set_range(low, high)

    @torch.no_grad()
    def clear_range(self) -> None:
        """Forget the range; values pass through until there is a new one."""
        self._refuse_if_frozen("its range")
        self.minimum.fill_(torch.nan)
        self.maximum.fill_(torch.nan)
        self._has_range = False
        self._update_gradients()

    def get_min(self) -> torch.Tensor | None:
        """Return the lowest reals of the grid, or None without a range."""
        return self._reals(self.grid.lowest)

    def get_max(self) -> torch.Tensor | None:
        """Return the highest reals of the grid, or None without a range."""
        return self._reals(self.grid.highest)

    def _reals(self, code: int) -> torch.Tensor | None:
        if not self._has_range:
            return None
        scale, zero_point = self.get_scale_and_zero_point()
        return scale * (code - zero_point)

    @torch.no_grad()
    def get_scale_and_zero_point(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scales (float32) and zero points (int32), on the quantizer's device.

        Raises
        ------
        InvalidStateError
            If there is no range yet.
        """
        if not self._has_range:
            raise InvalidStateError(f"quantizer '{self.name}' has no range yet")
        return _kernels.grid_from_range(self.minimum, self.maximum, self.grid)

    def get_encoding(self) -> dict[str, Any] | None:
        """Return the grid as NumPy arrays and plain numbers, or None without a range.

        Keys: ``scale`` (float32) and ``zero_point`` (int32), both of the range's shape, ``bits``,
        ``is_symmetric``, ``is_signed``, ``is_strict``, ``channel_axis`` and ``block``.
        """
        if not self._has_range:
            return None
        scale, zero_point = self.get_scale_and_zero_point()
        return {
            "scale": scale.numpy(force=True),
            "zero_point": zero_point.numpy(force=True),
            "bits": self._bits,
            "is_symmetric": self._is_symmetric,
            "is_signed": self._is_signed,
            "is_strict": self._is_strict,
            "channel_axis": self.channel_axis,
            "block": self.block,
        }

    # --------------------------------------------------------------------------------------------
    # Work

    def forward(self, x: torch.Tensor, owned: bool = False) -> torch.Tensor:
        """Return the tensor on the grid, in its own type and layout.

        Parameters
        ----------
        x : torch.Tensor
            Values of any floating-point type; others pass through.
        owned : bool
            Whether nobody else needs `x`: it may then be overwritten and returned.
        """
        if self.observer is not None:
            self.observer(x)
            return x
        if not (self._enabled and self._has_range) or not x.is_floating_point():
            return x
        if x.device != self.minimum.device:
            raise InvalidStateError(
                f"quantizer '{self.name}' is on {self.minimum.device}, its input on {x.device}:"
                " move the simulation, sim.model.to(device), not the model it was made from"
            )
        grid = self.grid
        if torch.compiler.is_compiling() or x.device.type != "cpu":
            return _kernels.fake_quantize(x, self.minimum, self.maximum, grid)
        scale, zero_point = self._current(grid)
        if (
            owned
            and not (self._forward_pre_hooks or self._forward_hooks)
            and may_overwrite(x)
            and _kernels.fake_quantize_in_place(x, scale, zero_point, grid)
        ):
            return x
        return _kernels.fake_quantize(x, self.minimum, self.maximum, grid, scale, zero_point)

    def takes_negatives_to_zero(self, x: torch.Tensor) -> bool:
        """Return whether rounding a tensor, now, takes all that is below 0 to 0.

        No if somebody watches what goes in.
        """
        if self.observer is not None or not (self._enabled and self._has_range):
            return False
        if self._forward_pre_hooks or self._forward_hooks:
            return False
        if x.dtype != torch.float32 or x.device.type != "cpu" or x.device != self.minimum.device:
            return False
        grid = self.grid
        if grid.axis is not None or grid.block_axis is not None:
            return False
        return int(self._current(grid)[1]) == grid.lowest

    def _current(self, grid: _kernels.Grid) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scales and zero points of a range on the CPU, computed when it has changed.

        Whether it has is read from the ends themselves: a write through ``.data`` leaves no trace
        in a tensor's version, and neither does another tensor in its place.
        """
        low, high = self.minimum.detach(), self.maximum.detach()
        key = (grid, low.numpy().tobytes(), high.numpy().tobytes())
        if self._known is None or self._known[0] != key:
            self._known = (key, _kernels.grid_from_range(low, high, grid))
        return self._known[1]

    # --------------------------------------------------------------------------------------------
    # Saving and copying

    def get_extra_state(self) -> dict[str, Any]:
        """Return what belongs to the state besides the ends of the range."""
        return {
            "bits": self._bits,
            "is_symmetric": self._is_symmetric,
            "is_signed": self._is_signed,
            "is_strict": self._is_strict,
            "enabled": self._enabled,
            "frozen": self._frozen,
            "learnable": self._learnable,
            "has_range": self._has_range,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what `get_extra_state` returned."""
        self._check_bits(state["bits"])
        self._bits = int(state["bits"])
        for key in state.keys() - {"bits"}:
            if f"_{key}" not in self.__dict__:
                raise InvalidArgumentError(f"quantizer '{self.name}': unknown state '{key}'")
            self.__dict__[f"_{key}"] = bool(state[key])
        self._update_gradients()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["observer"] = state["_known"] = None
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> Quantizer:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return clone

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # Ranges stay float32 where a model is moved to half or double precision, because the grid
        # is defined in float32 arithmetic.
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            if result.dtype == tensor.dtype or not tensor.is_floating_point():
                return result
            return tensor.to(result.device)

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        kind = "symmetric" if self._is_symmetric else "asymmetric"
        if self._is_strict:
            kind = f"strict {kind}"
        parts = [f"{'int' if self._is_signed else 'uint'}{self._bits}", kind]
        if self.block is not None:
            parts.append(f"per block of {self.block[1]} on axis {self.block[0]}")
        elif self.channel_axis is not None:
            parts.append(f"per channel on axis {self.channel_axis}")
        if self._has_range and self.minimum.device.type != "meta":
            low, high = self.minimum.min().item(), self.maximum.max().item()
            parts.append(f"range {low:.6g} to {high:.6g}")
        else:
            parts.append("no range")
        if not self._enabled:
            parts.append("off")
        if self._frozen:
            parts.append("frozen")
        elif not self._learnable:
            parts.append("fixed")
        return ", ".join(parts)
