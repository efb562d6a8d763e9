# SPDX-License-Identifier: Apache-2.0
# What Model.adaround and Model.correct_biases share: arguments in, report out.
"""Arguments and reports of rounding."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ._progress import Reporter
from .errors import EmptyStatisticsError, InvalidArgumentError, UnknownNameError

#: Numbers of the methods.
_METHODS: dict[str, int] = {"auto": 0, "gram": 1, "gradient": 2, "sequential_mse": 3}


class RoundedLayer(NamedTuple):
    """What rounding made of a layer."""

    #: Node name, or operator and first output if the node has no name.
    name: str
    #: Name of the weight.
    weight: str
    #: Width of the weight's codes.
    bits: int
    #: Noise over signal with the layer rounded to nearest, on held-out data: of the layer's output,
    #: or, for bias correction, of the outputs of the quantized network.
    noise_before: float
    #: Noise over signal with what was kept; never larger.
    noise_after: float
    #: How the kept weights were found; ``"nearest"`` if nothing did better.
    kept: str


class RoundingProgress(NamedTuple):
    """How far rounding is."""

    #: Layers that are done.
    completed: int
    #: Layers in all.
    total: int
    #: Name of the layer at work; ``"calibration"`` before the first.
    layer: str
    #: Share of that layer that is done, 0 to 1.
    fraction: float
    #: About how many seconds the rest will take; None while too little is done to tell.
    seconds_left: float | None


#: Gets a `RoundingProgress` now and then; cancels by returning False.
Details = Callable[[RoundingProgress], object]

#: The engine's estimate of the time left takes the place of tqdm's, which knows only whole layers.
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}s [{elapsed}{postfix}]"


class Settings(NamedTuple):
    """Keyword arguments of both methods."""

    param_bits: int
    method: str
    config: str | os.PathLike[str] | None
    activation_bits: int | None
    quant_scheme: str
    percentile: float
    excluded_layers: Iterable[str]
    max_rows: int
    max_bytes: int
    seed: int
    floor_or_ceil: bool
    iterations: int
    block_size: int | None
    cache: str | os.PathLike[str] | None
    reg_param: float = 0.01
    beta_range: Sequence[float] = (20, 2)
    warm_start: float = 0.2
    num_candidates: int = 20
    layer_bits: Mapping[str, int] | None = None
    details: Details | None = None

    def constants(self) -> tuple[float, float, float, float, int]:
        """Give what gradient descent and the search of scales work with, as the engine takes it."""
        if len(self.beta_range) != 2:
            raise InvalidArgumentError(f"beta_range: expected two numbers, got {self.beta_range}")
        # The engine's zeros are defaults, and its negative numbers none.
        for name, value in (("reg_param", self.reg_param), ("warm_start", self.warm_start)):
            if not value >= 0:
                raise InvalidArgumentError(f"{name}: expected 0 or more, got {value}")
        for name, given in (
            ("beta_range", min(self.beta_range)),
            ("num_candidates", self.num_candidates),
        ):
            if not 1 <= given <= 1000:
                raise InvalidArgumentError(f"{name}: expected 1 to 1000, got {given}")
        start, end = self.beta_range
        return (self.reg_param or -1.0, start, end, self.warm_start or -1.0, self.num_candidates)


def _joined(data: Any, infos: tuple[Any, ...]) -> dict[str, Any]:
    """Turn arrays, or batches of arrays, into one dict of arrays."""
    import numpy as np

    from ._arrays import as_inputs

    if isinstance(data, Mapping) or hasattr(data, "__dlpack__") or isinstance(data, np.ndarray):
        return as_inputs(data, infos)
    batches = [as_inputs(batch, infos) for batch in data]
    if not batches:
        raise EmptyStatisticsError("data: no batches")
    if len(batches) == 1:
        return batches[0]
    names = batches[0].keys()
    for number, batch in enumerate(batches):
        if batch.keys() != names:
            raise InvalidArgumentError(
                f"data: batch {number} has inputs {sorted(batch)}, the first {sorted(names)}"
            )
    return {name: np.concatenate([batch[name] for batch in batches]) for name in names}


def round_model(
    method: Any, what: str, infos: tuple[Any, ...], data: Any, settings: Settings, progress: Any
) -> tuple[RoundedLayer, ...]:
    """Call a native method that rounds."""
    from .simulation import _SCHEMES, block_size_of

    if settings.method not in _METHODS:
        raise UnknownNameError(f"method {settings.method!r}: expected one of {', '.join(_METHODS)}")
    if settings.quant_scheme not in _SCHEMES:
        raise UnknownNameError(
            f"quant_scheme {settings.quant_scheme!r}: expected one of {', '.join(_SCHEMES)}"
        )
    activation_bits = 32 if settings.activation_bits is None else settings.activation_bits
    limits = {"max_rows": settings.max_rows, "max_bytes": settings.max_bytes}
    widths = {"param_bits": settings.param_bits, "activation_bits": activation_bits}
    for name, value in {**limits, **widths}.items():
        if not 1 <= value < 2**62 or (name in widths and value > 32):
            raise InvalidArgumentError(f"{name}: expected 1 or more, got {value}")
    layer_bits = dict(settings.layer_bits or {})
    for name, value in layer_bits.items():
        if not 2 <= value <= 16:
            raise InvalidArgumentError(f"layer_bits: '{name}': expected 2 to 16, got {value}")
    config = None if settings.config is None else os.fspath(settings.config)
    values = None if data is None else _joined(data, infos)
    reporter = Reporter(progress, what, "layer", _BAR)
    with reporter as report:
        rows = method(
            values,
            _METHODS[settings.method],
            settings.param_bits,
            activation_bits,
            _SCHEMES[settings.quant_scheme],
            settings.percentile,
            config,
            tuple(settings.excluded_layers),
            settings.max_rows,
            settings.max_bytes,
            settings.seed & (2**64 - 1),
            settings.floor_or_ceil,
            settings.iterations,
            block_size_of(settings.block_size),
            *settings.constants(),
            tuple(layer_bits),
            array("i", layer_bits.values()).tobytes(),
            None if settings.cache is None else os.fspath(settings.cache),
            report,
            _teller(reporter, settings.details),
        )
    return tuple(RoundedLayer(*row) for row in rows)


def _teller(reporter: Reporter, details: Details | None) -> Callable[..., object] | None:
    """What the native module calls within layers; None if nobody looks."""
    if reporter.bar is None and details is None:
        return None

    def tell(*state: Any) -> object:
        progress = RoundingProgress(*state)
        if reporter.bar is not None and progress.seconds_left is not None:
            reporter.note(f"about {math.ceil(progress.seconds_left)} s left")
        return None if details is None else details(progress)

    return tell
