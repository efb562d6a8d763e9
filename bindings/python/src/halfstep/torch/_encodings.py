# SPDX-License-Identifier: Apache-2.0
# Between the engine's encodings and quantizers: in both directions, and from files.
"""Encodings of the engine as ranges of quantizers, and back."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from .. import simulation as engine
from ..errors import FileAccessError, InvalidArgumentError, MalformedFileError
from ..quantizers import GRANULARITIES
from .quantizer import Quantizer


def make_quantizer(site: engine.Quantizer, sim: engine.QuantizationSimModel) -> Quantizer:
    """Return a module for a place that the engine quantizes."""
    options: dict[str, Any] = {
        "bits": site.bits,
        "is_symmetric": site.is_symmetric,
        "name": site.tensor,
    }
    if site.has_encoding:
        grid = sim.encoding(site.tensor)
        options |= {"is_signed": grid.is_signed, "is_strict": grid.is_strict}
        if grid.granularity == "per_channel":
            options |= {"channel_axis": grid.axis, "shape": grid.scales.shape}
        elif grid.granularity == "per_block":
            blocks = sim.model.initializers[site.tensor].shape
            shape = (blocks[grid.axis], len(grid.scales) // blocks[grid.axis])
            options |= {
                "channel_axis": grid.axis,
                "block": (grid.block_axis, grid.block_size),
                "shape": shape,
            }
    return Quantizer(**options)


def from_raw(raw: tuple[Any, ...]) -> engine.Encoding:
    scales, zero_points, granularity, axis, block_axis, block_size, *rest = raw
    return engine.Encoding(
        np.frombuffer(scales, np.float32),
        np.frombuffer(zero_points, np.int32),
        GRANULARITIES[granularity],
        axis,
        block_axis,
        block_size,
        *rest,
    )


def set_encoding(quantizer: Quantizer, grid: engine.Encoding) -> None:
    """Give a quantizer the engine's grid."""
    if len(grid.scales) != quantizer.minimum.numel():
        raise InvalidArgumentError(
            f"quantizer '{quantizer.name}': expected {quantizer.minimum.numel()} scales,"
            f" got {len(grid.scales)}"
        )
    quantizer.set_extra_state(
        quantizer.get_extra_state()
        | {
            "bits": grid.bits,
            "is_symmetric": grid.is_symmetric,
            "is_signed": grid.is_signed,
            "is_strict": grid.is_strict,
        }
    )
    quantizer.set_encoding(torch.from_numpy(grid.scales.copy()), grid.zero_points.copy())


def encoding_of(quantizer: Quantizer) -> engine.Encoding:
    """Return a quantizer's grid as the engine takes it."""
    grid = quantizer.get_encoding()
    assert grid is not None
    block = grid["block"] or (0, 0)
    per = "per_block" if grid["block"] else "per_tensor"
    if grid["channel_axis"] is not None and not grid["block"]:
        per = "per_channel"
    return engine.Encoding(
        np.asarray(grid["scale"], np.float32).reshape(-1),
        np.asarray(grid["zero_point"], np.int32).reshape(-1),
        per,
        grid["channel_axis"] or 0,
        *block,
        grid["bits"],
        grid["is_signed"],
        grid["is_symmetric"],
        grid["is_strict"],
    )


class Parameters:
    """Encodings of parameters: a file's content without the rest, and the names in it."""

    def __init__(self, content: dict[str, Any], names: list[str]) -> None:
        self.content, self.names = content, names


def parameter_encodings(
    source: Mapping[str, Any] | str | os.PathLike[str], roles: Mapping[str, bool]
) -> Parameters:
    if isinstance(source, Mapping):
        content = dict(source)
    else:
        try:
            with open(source, encoding="utf-8") as file:
                content = json.load(file)
        except OSError as error:
            raise FileAccessError(f"cannot read '{os.fspath(source)}': {error.strerror}") from error
        except ValueError as error:
            raise MalformedFileError(f"'{os.fspath(source)}' is no JSON: {error}") from error
    if "encodings" in content:  # 2.0.0 does not tell parameters from the rest
        kept = [entry for entry in content["encodings"] if roles.get(entry.get("name"), False)]
        return Parameters(content | {"encodings": kept}, [entry["name"] for entry in kept])
    if "param_encodings" not in content:
        content = {"version": "0.6.1", "param_encodings": content}
    entries = content["param_encodings"]
    empty: Any = [] if isinstance(entries, list) else {}
    names = [e["name"] for e in entries] if isinstance(entries, list) else list(entries)
    return Parameters(content | {"activation_encodings": empty}, names)


def write(path: str, write: Callable[[Any], Any]) -> None:
    """Write a file that appears whole or not at all."""
    aside = f"{path}.{os.getpid()}.tmp"
    try:
        with open(aside, "wb") as file:
            write(file)
        os.replace(aside, path)
    except OSError as error:
        raise FileAccessError(f"cannot write '{path}': {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(aside)
