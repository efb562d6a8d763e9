# SPDX-License-Identifier: Apache-2.0
# The QuantizationSimModel class for live PyTorch modules.
"""Quantization simulation of a live `torch.nn.Module`."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import simulation as engine
from ..errors import (
    EmptyStatisticsError,
    FileAccessError,
    HalfstepError,
    InvalidArgumentError,
    InvalidStateError,
    UnknownNameError,
)
from ..quantizers import GRANULARITIES
from . import _simulated
from ._network import Network, as_array
from ._trace import evaluating
from .quantizer import Quantizer

#: Names of range schemes, AIMET's among them, as the engine knows them.
_SCHEMES = {
    None: "min_max",
    "min_max": "min_max",
    "tf": "min_max",
    "post_training_tf": "min_max",
    "training_range_learning_with_tf_init": "min_max",
    "tf_enhanced": "sqnr",
    "sqnr": "sqnr",
    "post_training_tf_enhanced": "sqnr",
    "training_range_learning_with_tf_enhanced_init": "sqnr",
    "percentile": "percentile",
    "post_training_percentile": "percentile",
    "mse": "mse",
    "entropy": "entropy",
}


class QuantizationSimModel:
    """A live module simulated on integer hardware, to be calibrated, trained and exported.

    The engine places the quantizers in the graph of the module. `model` runs that graph with the
    original's own modules, which hold the quantizers.

    Parameters
    ----------
    model : torch.nn.Module
        The network.
    dummy_input : torch.Tensor, or tuple or dict of them
        Inputs that the module accepts, ``[N, ...]``.
    quant_scheme : str, optional
        How ranges are chosen: ``"min_max"`` (the default), ``"tf_enhanced"`` (``"sqnr"``),
        ``"percentile"``, ``"mse"``, ``"entropy"``; AIMET's enumerations are understood by name.
    default_output_bw, default_param_bw : int
        Width of computed tensors and of parameters, 2 to 16 bits.
    in_place : bool
        Whether `model` itself gets the quantizers, and is trained; otherwise a copy does.
    config_file : str or path, optional
        A runtime configuration, built in by name or a JSON file; per channel by default.
    percentile : float
        For the scheme of that name, 50 to 100.

    Attributes
    ----------
    model : torch.nn.Module
        The network with quantizers.

    Raises
    ------
    UntraceableModelError
        If the module's Python code cannot be made a graph; the message names the line.
    UnknownNameError, InvalidArgumentError, InvalidConfigurationError, NonFiniteValueError

    Examples
    --------
    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    >>> sim = QuantizationSimModel(net, torch.randn(1, 3, 8, 8))
    >>> sim.compute_encodings(lambda model: model(torch.randn(4, 3, 8, 8)))
    >>> sim.model(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 4, 6, 6])
    >>> sim.model.get_submodule("0").param_quantizers["weight"].bits
    8
    """

    def __init__(
        self,
        model: nn.Module,
        dummy_input: Any,
        quant_scheme: Any = None,
        default_output_bw: int = 8,
        default_param_bw: int = 8,
        in_place: bool = False,
        config_file: str | os.PathLike[str] | None = None,
        *,
        percentile: float = 100.0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if any(isinstance(part, Quantizer) for part in model.modules()):
            raise InvalidStateError(
                "the model has quantizers already: build the simulation from the original"
            )
        scheme = getattr(quant_scheme, "value", quant_scheme)
        scheme = getattr(quant_scheme, "name", scheme) if scheme not in _SCHEMES else scheme
        if scheme not in _SCHEMES:
            known = ", ".join(name for name in _SCHEMES if name)
            raise UnknownNameError(f"quant_scheme {quant_scheme!r}: expected one of {known}")
        _simulated.device_of(model)
        self._options = {
            "param_bits": default_param_bw,
            "activation_bits": default_output_bw,
            "quant_scheme": _SCHEMES[scheme],
            "config": config_file,
            "percentile": percentile,
        }
        self._excluded: tuple[str, ...] = ()
        self._network = Network(model, dummy_input)
        self._original = model if in_place else copy.deepcopy(model)
        first = engine.QuantizationSimModel(self._network.bound(self._original), **self._options)
        self._roles = {site.tensor: site.is_parameter for site in first.quantizers}
        self.model, self._quantizers, missing = _simulated.build(
            self._original,
            self._network.exported,
            first.quantizers,
            lambda site: _make_quantizer(site, first),
        )
        if missing:
            warnings.warn(
                f"{len(missing)} tensors that only exist in the ONNX graph stay unquantized: "
                + ", ".join(missing[:5]),
                stacklevel=2,
            )
        self._missing = missing
        self._share_ranges(first.quantizers)
        #: Computed tensors: what calibration has to watch.
        constants = set(self._network.exported.state)
        self._watched = tuple(
            name
            for name, quantizer in self._quantizers.items()
            if not self._roles[name] and name not in constants and not self._is_constant(name)
        )
        self._pull(first)
        device = _simulated.device_of(self._original)
        if device is not None:
            self.model.to(device)
        self.model._before_forward = _Refresh(self)
        self.onnx = _ONNX(self)

    # ---------------------------------------------------------------------------------------------
    # Between the engine and the modules

    def _is_constant(self, tensor: str) -> bool:
        constants = getattr(self._original, "traced_constants", None)
        return constants is not None and tensor in constants._buffers

    def _share_ranges(self, sites: Iterable[engine.Quantizer]) -> None:
        """Let tensors on one grid share the ends of its range: training moves them as one."""
        for site in sites:
            quantizer, leader = (self._quantizers.get(n) for n in (site.tensor, site.tied_to))
            if quantizer is not None and leader is not None and quantizer is not leader:
                quantizer.minimum, quantizer.maximum = leader.minimum, leader.maximum

    def _engine(self, keeps_ranges: bool) -> engine.QuantizationSimModel:
        """Return an engine simulation of the present weights and quantizers.

        Ranges of frozen quantizers are kept; those of others only if asked for.
        """
        model = self._network.bound(self._original)
        sim = engine.QuantizationSimModel(model, **self._options, excluded_layers=self._excluded)
        placed = {site.tensor: site for site in sim.quantizers}
        for name in placed.keys() - self._quantizers.keys():
            sim.set_enabled(name, False)
        for name, quantizer in self._quantizers.items():
            site = placed.get(name)
            if site is None:
                continue
            if (quantizer.bits, quantizer.is_symmetric) != (site.bits, site.is_symmetric):
                sim.set_precision(name, quantizer.bits, quantizer.is_symmetric)
            if quantizer.has_range and (keeps_ranges or quantizer.frozen):
                sim.set_encoding(name, _encoding_of(quantizer))
            if not quantizer.enabled:
                sim.set_enabled(name, False)
        for name, quantizer in self._quantizers.items():
            if name in placed and quantizer.frozen:
                sim.set_frozen(name, True)
        return sim

    def _pull(self, sim: engine.QuantizationSimModel) -> None:
        """Give every quantizer that is not frozen the engine's grid."""
        for site in sim.quantizers:
            quantizer = self._quantizers.get(site.tensor)
            if quantizer is not None and site.has_encoding and not quantizer.frozen:
                _set_encoding(quantizer, sim.encoding(site.tensor))

    # ---------------------------------------------------------------------------------------------
    # Calibration

    def compute_encodings(
        self,
        forward_pass_callback: Callable[..., Any] | Iterable[Any],
        forward_pass_callback_args: Any = None,
        *,
        group: Any = None,
    ) -> None:
        """Choose the grids of all quantizers that are not frozen.

        Parameters are quantized while data runs through, computed tensors are not. The network is
        in evaluation mode meanwhile. If anything raises, ranges and modes stay as they were.

        Parameters
        ----------
        forward_pass_callback : callable, or iterable of batches
            Called once with `model` (and the next argument, if that is not None), to run
            calibration data through it. Or the data itself, such as a `DataLoader`: of a batch that
            is a tuple or list, the first item goes in if the network has one input; a dict by name.
        forward_pass_callback_args : optional
            Handed to the callback.
        group : torch.distributed.ProcessGroup or True, optional
            Processes that share the data (True: all of them). All of them get the grids that one
            process would have chosen from all data, bit for bit.

        Raises
        ------
        EmptyStatisticsError
            If no data has reached a quantizer.
        NonFiniteValueError
            Naming a tensor that held a NaN or an infinity.
        DeviceMismatchError
        """
        _simulated.device_of(self.model)
        before = {name: _Range(quantizer) for name, quantizer in self._quantizers.items()}
        try:
            sim = self._engine(keeps_ranges=False)
            for site in sim.quantizers:
                quantizer = self._quantizers.get(site.tensor)
                if quantizer is not None and site.is_parameter and not quantizer.frozen:
                    _set_encoding(quantizer, sim.encoding(site.tensor))
            try:
                with evaluating(self.model), torch.no_grad(), self._watching(sim):
                    if callable(forward_pass_callback):
                        given = forward_pass_callback_args
                        forward_pass_callback(self.model, *(() if given is None else (given,)))
                    else:
                        self._run_batches(forward_pass_callback)
            except Exception as error:
                if group is not None:
                    _share(f"{type(error).__name__}: {error}", group)
                raise
            if group is not None:
                _merge(sim, _share(sim.statistics(), group))
            sim.finish_calibration()
            self._pull(sim)
        except BaseException:
            for name, quantizer in self._quantizers.items():
                before[name].restore(quantizer)
            raise

    def _run_batches(self, batches: Iterable[Any]) -> None:
        single = len(self._network.exported.inputs) == 1
        device = _simulated.device_of(self.model)
        for batch in batches:
            batch = torch.utils._pytree.tree_map(
                lambda x: x.to(device) if isinstance(x, torch.Tensor) and device else x, batch
            )
            if isinstance(batch, Mapping):
                self.model(**batch)
            elif isinstance(batch, (tuple, list)):
                self.model(*(batch[:1] if single else batch))
            else:
                self.model(batch)

    @contextlib.contextmanager
    def _watching(self, sim: engine.QuantizationSimModel) -> Iterator[None]:
        """Hand what computed tensors hold to the engine's statistics."""
        enabled = {site.tensor for site in sim.quantizers if site.is_enabled}
        watched = [name for name in self._watched if name in enabled]
        refresh, self.model._before_forward = self.model._before_forward, None
        try:
            for name in watched:
                self._quantizers[name].observer = _Observer(sim, name)
            # Other activation quantizers let values pass, as they do in the engine.
            idle = [
                q
                for n, q in self._quantizers.items()
                if not self._roles[n] and n not in watched and q.enabled
            ]
            for quantizer in idle:
                quantizer.observer = _ignore
            yield
        finally:
            for quantizer in self._quantizers.values():
                quantizer.observer = None
            self.model._before_forward = refresh

    # ---------------------------------------------------------------------------------------------
    # Quantizers

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """Quantizers by the name that their tensor has in the exported ONNX model."""
        return dict(self._quantizers)

    def named_quantizers(self) -> Iterator[tuple[str, Quantizer]]:
        """Go through the quantizers with their names in `model`."""
        yield from _simulated.quantizers_of(self.model)

    def quantizer(self, tensor: str) -> Quantizer:
        """Return the quantizer of a tensor of the exported ONNX model.

        Raises
        ------
        UnknownNameError
        """
        if tensor not in self._quantizers:
            raise UnknownNameError(f"tensor '{tensor}' has no quantizer")
        return self._quantizers[tensor]

    def exclude_layers_from_quantization(self, layers: Iterable[nn.Module | str]) -> None:
        """Switch off what the engine would not quantize without these layers.

        Parameters
        ----------
        layers : iterable of torch.nn.Module or str
            Modules of `model`, or their names.

        Raises
        ------
        UnknownNameError
            For a layer that `model` does not have, or that computes nothing.
        """
        names = {id(module): name for name, module in self.model.named_modules()}
        excluded = list(self._excluded)
        for layer in layers:
            name = layer if isinstance(layer, str) else names.get(id(layer))
            if name is None or name not in names.values():
                raise UnknownNameError(f"layer {layer!r} is not part of the simulated model")
            scopes = self._network.exported.scopes
            found = [node for node, modules in scopes.items() if name in modules]
            if not found:
                raise UnknownNameError(f"layer '{name}' computes nothing in the graph")
            excluded += [node for node in found if node not in excluded]
        self._excluded = tuple(excluded)
        model = self._network.bound(self._original)
        sim = engine.QuantizationSimModel(model, **self._options, excluded_layers=self._excluded)
        placed = {site.tensor for site in sim.quantizers}
        for name, quantizer in self._quantizers.items():
            if name not in placed:
                if quantizer.frozen:
                    quantizer.frozen = False
                quantizer.enabled = False

    # ---------------------------------------------------------------------------------------------
    # Files

    def encodings(self, version: str = "1.0.0") -> dict[str, Any]:
        """Return the encodings as the parsed JSON that `export` writes."""
        return self._engine(keeps_ranges=True).encodings(version)

    def save_encodings_to_json(
        self, path: str | os.PathLike[str], filename_prefix: str, encoding_version: str = "1.0.0"
    ) -> None:
        """Write ``<filename_prefix>.json`` with the encodings."""
        data = self._engine(keeps_ranges=True).encodings_json(encoding_version)
        _write(os.path.join(path, f"{filename_prefix}.json"), lambda file: file.write(data))

    def export(
        self,
        path: str | os.PathLike[str],
        filename_prefix: str,
        dummy_input: Any = None,
        *,
        encoding_version: str = "1.0.0",
    ) -> None:
        """Write the network without quantizers, and its encodings.

        ``<prefix>.onnx`` and ``<prefix>.pth`` hold the network in float32 with its present weights
        (the latter as a pickled module), ``<prefix>.encodings`` the grids, by tensor names of the
        ONNX model. May be called any number of times.

        Parameters
        ----------
        path : path
            A folder; it is created if its parent exists.
        filename_prefix : str
            A file name without folders.
        dummy_input : optional
            Not needed: the graph is that of construction. Accepted as AIMET has it.
        encoding_version : str
            ``"0.6.1"``, ``"1.0.0"`` or ``"2.0.0"``.

        Raises
        ------
        InvalidStateError
            Before there are encodings, naming a tensor without.
        FileAccessError, InvalidArgumentError, UnsupportedVersionError
        """
        sim = self._engine(keeps_ranges=True)
        sim.export(path, filename_prefix, encoding_version)
        original = self.get_original_model().cpu()
        _write(
            os.path.join(path, f"{filename_prefix}.pth"), lambda file: torch.save(original, file)
        )

    def get_original_model(self) -> nn.Module:
        """Return a copy of the original with the present weights, without quantizers."""
        clone = copy.deepcopy(self._original)
        _simulated.strip(clone)
        return clone

    def load_encodings(
        self,
        encodings: Mapping[str, Any] | str | os.PathLike[str],
        strict: bool = True,
        *,
        freeze: bool = False,
    ) -> engine.LoadReport:
        """Take encodings from JSON of any version.

        Parameters
        ----------
        encodings : dict or path
            Parsed JSON, or a file.
        strict : bool
            Whether any mismatch is an error. Otherwise the file's widths and symmetry are taken
            over, and quantizers that it does not name are switched off.
        freeze : bool
            Whether the quantizers that are loaded keep their grid from now on.

        Returns
        -------
        LoadReport

        Raises
        ------
        EncodingMismatchError
            If strict, and for grids that cannot belong to their tensor; nothing changes then.
        MalformedFileError, UnsupportedVersionError, FileAccessError
        """
        sim = self._engine(keeps_ranges=True)
        report = sim.load_encodings(encodings, strict)
        for site in sim.quantizers:
            quantizer = self._quantizers.get(site.tensor)
            if quantizer is None:
                continue
            if not quantizer.frozen and site.has_encoding:
                _set_encoding(quantizer, sim.encoding(site.tensor))
            quantizer.enabled = site.is_enabled
            if freeze and site.is_enabled and site.has_encoding:
                quantizer.frozen = True
        return report

    def load_and_freeze_encodings(
        self, encodings: Mapping[str, Any] | str | os.PathLike[str], strict: bool = False
    ) -> engine.LoadReport:
        """Do what `load_encodings` does, and keep the grids from then on."""
        return self.load_encodings(encodings, strict, freeze=True)

    def set_and_freeze_param_encodings(
        self, encoding_path: Mapping[str, Any] | str | os.PathLike[str]
    ) -> None:
        """Take the encodings of parameters from JSON, and keep them from then on.

        Parameters
        ----------
        encoding_path : dict or path
            A file as `export` writes it, or one with parameters only, as AdaRound writes it.

        Raises
        ------
        EncodingMismatchError
            Naming a parameter that has no quantizer here, or a grid that does not fit.
        FileAccessError, MalformedFileError
        """
        parameters = _parameter_encodings(encoding_path, self._roles)
        unknown = [name for name in parameters.names if not self._roles.get(name, False)]
        if unknown:
            from ..errors import EncodingMismatchError

            raise EncodingMismatchError(
                "no quantized parameter is named " + ", ".join(f"'{n}'" for n in unknown[:5])
            )
        sim = self._engine(keeps_ranges=True)
        sim.load_encodings(parameters.content, strict=False)
        for name in parameters.names:
            quantizer = self._quantizers[name]
            if quantizer.frozen:
                quantizer.frozen = False
            _set_encoding(quantizer, sim.encoding(name))
            quantizer.enabled = True
            quantizer.frozen = True

    def __repr__(self) -> str:
        return f"<halfstep.torch.QuantizationSimModel with {len(self._quantizers)} quantizers>"


class _ONNX:
    """What `QuantizationSimModel.onnx` offers."""

    def __init__(self, sim: QuantizationSimModel) -> None:
        self._sim = sim

    def export(
        self,
        args: Any,
        f: str | os.PathLike[str] | None = None,
        *,
        export_int32_bias: bool = False,
        prequantize_constants: bool = False,
    ) -> None:
        """Write an ONNX model whose QuantizeLinear and DequantizeLinear pairs carry the encodings.

        Parameters
        ----------
        args : path, or inputs
            The file to write. Or inputs, as AIMET has it: then `f` is the file.
        f : path, optional
            The file to write.
        export_int32_bias : bool
            Whether biases become 32-bit integers.
        prequantize_constants : bool
            Whether constants are stored as integers.

        Raises
        ------
        FileAccessError, InvalidStateError
        """
        path = args if f is None else f
        self._sim._engine(keeps_ranges=True).export_qdq(
            path, prequantize_constants=prequantize_constants, int32_bias=export_int32_bias
        )


class _Observer:
    """Hands the values of one tensor to the engine's statistics."""

    def __init__(self, sim: engine.QuantizationSimModel, tensor: str) -> None:
        self.sim, self.tensor = sim, tensor

    def __call__(self, value: torch.Tensor) -> None:
        if value.numel():
            self.sim._handle.observe_value(self.tensor, as_array(value))


def _ignore(value: torch.Tensor) -> None:
    """Watch nothing."""


class _Refresh:
    """Keeps the grids of parameters that training does not learn on the present weights.

    Called before each run. A copy of the network shares the engine's rules, and looks at its own
    weights.
    """

    def __init__(self, sim: QuantizationSimModel) -> None:
        self.sim = sim
        self.model = sim.model
        self.rules: engine.QuantizationSimModel | None = None
        self.seen: dict[str, tuple[int, int]] = {}
        self.pairs: list[tuple[str, Quantizer, nn.Module, str]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Refresh:
        clone = object.__new__(_Refresh)
        clone.sim, clone.rules = self.sim, self.rules
        clone.model = copy.deepcopy(self.model, memo)
        clone.seen, clone.pairs = dict(self.seen), None
        return clone

    def _find(self) -> list[tuple[str, Quantizer, nn.Module, str]]:
        pairs = []
        for name, role in self.sim._roles.items():
            owner, _, key = name.rpartition(".")
            if not role or name not in self.sim._quantizers:
                continue
            module = self.model.get_submodule(owner)
            pairs.append((name, module.param_quantizers[key], module, key))
        return pairs

    @torch.compiler.disable
    def __call__(self) -> None:
        if self.pairs is None:
            self.pairs = self._find()
        for name, quantizer, module, key in self.pairs:
            if quantizer.learnable or quantizer.frozen or not quantizer.enabled:
                continue
            weight = getattr(module, key)
            version = (weight._version, weight.data_ptr())
            if self.seen.get(name) == version:
                continue
            if self.rules is None:
                self.rules = self.sim._engine(keeps_ranges=False)
            raw = self.rules._handle.parameter_encoding(name, as_array(weight))
            _set_encoding(quantizer, _from_raw(raw))
            self.seen[name] = version


class _Range:
    """The range of a quantizer, to be put back."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.state = quantizer.get_extra_state()
        self.minimum = quantizer.minimum.detach().clone()
        self.maximum = quantizer.maximum.detach().clone()

    def restore(self, quantizer: Quantizer) -> None:
        with torch.no_grad():
            quantizer.minimum.copy_(self.minimum)
            quantizer.maximum.copy_(self.maximum)
        quantizer.set_extra_state(self.state)


# -------------------------------------------------------------------------------------------------
# Encodings and quantizers


def _make_quantizer(site: engine.Quantizer, sim: engine.QuantizationSimModel) -> Quantizer:
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


def _from_raw(raw: tuple[Any, ...]) -> engine.Encoding:
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


def _set_encoding(quantizer: Quantizer, grid: engine.Encoding) -> None:
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


def _encoding_of(quantizer: Quantizer) -> engine.Encoding:
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


class _Parameters:
    """Encodings of parameters: a file's content without the rest, and the names in it."""

    def __init__(self, content: dict[str, Any], names: list[str]) -> None:
        self.content, self.names = content, names


def _parameter_encodings(
    source: Mapping[str, Any] | str | os.PathLike[str], roles: Mapping[str, bool]
) -> _Parameters:
    if isinstance(source, Mapping):
        content = dict(source)
    else:
        from ..errors import MalformedFileError

        try:
            with open(source, encoding="utf-8") as file:
                content = json.load(file)
        except OSError as error:
            raise FileAccessError(f"cannot read '{os.fspath(source)}': {error.strerror}") from error
        except ValueError as error:
            raise MalformedFileError(f"'{os.fspath(source)}' is no JSON: {error}") from error
    if "encodings" in content:  # 2.0.0 does not tell parameters from the rest
        kept = [entry for entry in content["encodings"] if roles.get(entry.get("name"), False)]
        return _Parameters(content | {"encodings": kept}, [entry["name"] for entry in kept])
    if "param_encodings" not in content:
        content = {"version": "0.6.1", "param_encodings": content}
    entries = content["param_encodings"]
    empty: Any = [] if isinstance(entries, list) else {}
    names = [e["name"] for e in entries] if isinstance(entries, list) else list(entries)
    return _Parameters(content | {"activation_encodings": empty}, names)


def _share(mine: bytes | str, group: Any) -> list[bytes | str]:
    """Return what the other processes of a group observed, or what they failed with.

    A process that has failed takes part as well, so that none waits for ever.
    """
    import torch.distributed as distributed

    chosen = None if group is True else group
    everyone: list[Any] = [None] * distributed.get_world_size(chosen)
    distributed.all_gather_object(everyone, mine, group=chosen)
    del everyone[distributed.get_rank(chosen)]
    return everyone


def _merge(sim: engine.QuantizationSimModel, others: list[bytes | str]) -> None:
    """Add what other processes observed."""
    for other in others:
        if isinstance(other, str):
            raise InvalidStateError(f"calibration failed in another process: {other}")
        sim.merge_statistics(other)


def _write(path: str, write: Callable[[Any], Any]) -> None:
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


__all__ = ["EmptyStatisticsError", "HalfstepError", "QuantizationSimModel"]
