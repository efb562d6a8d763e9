# SPDX-License-Identifier: Apache-2.0
# Between the engine's encodings and quantizers: in both directions, and from files.
"""Encodings of the engine as ranges of quantizers, and back."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .. import simulation as engine
from ..errors import EncodingMismatchError, FileAccessError, MalformedFileError
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


def check_encoding(quantizer: Quantizer, grid: engine.Encoding) -> None:
    """Raise if a grid has other groups than a quantizer.

    Raises
    ------
    EncodingMismatchError
    """
    expected, got = quantizer.minimum.numel(), len(grid.scales)
    block = (grid.block_axis, grid.block_size) if grid.granularity == "per_block" else None
    axis = None if grid.granularity == "per_tensor" else grid.axis
    if got == 1 and block is None:
        return
    if got != expected or axis != quantizer.channel_axis or block != quantizer.block:
        raise EncodingMismatchError(
            f"quantizer '{quantizer.name}': expected {expected} scales along axis"
            f" {quantizer.channel_axis}, got {got} along axis {axis}"
        )


def set_encoding(quantizer: Quantizer, grid: engine.Encoding) -> None:
    """Give a quantizer the engine's grid; a single scale serves all of its groups."""
    check_encoding(quantizer, grid)
    scales, zeros = grid.scales.copy(), grid.zero_points.copy()
    if len(scales) == 1:
        groups = quantizer.minimum.numel()
        scales, zeros = scales.repeat(groups), zeros.repeat(groups)
    quantizer.set_extra_state(
        quantizer.get_extra_state()
        | {
            "bits": grid.bits,
            "is_symmetric": grid.is_symmetric,
            "is_signed": grid.is_signed,
            "is_strict": grid.is_strict,
        }
    )
    quantizer.set_encoding(torch.from_numpy(scales), zeros)


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


def parsed(source: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
    """Return encodings as a dictionary; a path is read.

    Raises
    ------
    FileAccessError, MalformedFileError
    """
    if isinstance(source, Mapping):
        return dict(source)
    try:
        with open(source, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise FileAccessError(f"cannot read '{os.fspath(source)}': {error.strerror}") from error
    except ValueError as error:
        raise MalformedFileError(f"'{os.fspath(source)}' is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise MalformedFileError(f"'{os.fspath(source)}' is no JSON object")
    return content


#: Where the versions of the format keep encodings: lists of entries with names, or by name.
_SECTIONS = ("activation_encodings", "param_encodings", "encodings")


def joined(contents: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the encodings of several modules as one file's content, tensors named in full.

    Parameters
    ----------
    contents : mapping
        Content of a file, by the name of the module; one without a name stands alone.
    """
    if contents.keys() == {""}:
        return contents[""]
    result: dict[str, Any] = {}
    for place, content in contents.items():
        for key, value in content.items():
            if key not in _SECTIONS:
                result.setdefault(key, value)
            elif isinstance(value, list):
                entries = [entry | {"name": f"{place}.{entry['name']}"} for entry in value]
                result.setdefault(key, []).extend(entries)
            else:
                entries = {f"{place}.{name}": entry for name, entry in value.items()}
                result.setdefault(key, {}).update(entries)
    return result


def split(
    content: dict[str, Any], places: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Undo `joined`; also return the names that belong to no module."""
    if list(places) == [""]:
        return {"": content}, []
    unknown: list[str] = []
    result = {
        place: {
            key: ([] if isinstance(value, list) else {}) if key in _SECTIONS else value
            for key, value in content.items()
        }
        for place in places
    }
    for key in _SECTIONS:
        entries = content.get(key, {})
        named = isinstance(entries, Mapping)
        for entry in entries:
            name = str(entry if named else entry.get("name"))
            place = next((p for p in places if name.startswith(f"{p}.")), None)
            if place is None:
                unknown.append(name)
            elif named:
                result[place][key][name[len(place) + 1 :]] = entries[entry]
            else:
                result[place][key].append(entry | {"name": name[len(place) + 1 :]})
    return result, unknown


class Parameters:
    """Encodings of parameters: a file's content without the rest, and the names in it."""

    def __init__(self, content: dict[str, Any], names: list[str]) -> None:
        self.content, self.names = content, names


def parameter_encodings(
    source: Mapping[str, Any] | str | os.PathLike[str], roles: Mapping[str, bool]
) -> Parameters:
    content = parsed(source)
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
