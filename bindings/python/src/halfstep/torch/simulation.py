# SPDX-License-Identifier: Apache-2.0
# The QuantizationSimModel class for live PyTorch modules.
"""Quantization simulation of a live `torch.nn.Module`."""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .. import simulation as engine
from .._faces import scheme_name
from ..errors import (
    EmptyStatisticsError,
    EncodingMismatchError,
    HalfstepError,
    InvalidStateError,
    UnknownNameError,
)
from . import _simulated
from ._encodings import encoding_of, make_quantizer, parameter_encodings, set_encoding, write
from ._network import Network
from ._trace import evaluating
from ._watching import Observer, Range, Refresh, ignore, merge, share
from .quantizer import Quantizer


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
        _simulated.device_of(model)
        self._options = {
            "param_bits": default_param_bw,
            "activation_bits": default_output_bw,
            "quant_scheme": scheme_name(quant_scheme),
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
            lambda site: make_quantizer(site, first),
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
        self.model._before_forward = Refresh(self)
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
                sim.set_encoding(name, encoding_of(quantizer))
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
                set_encoding(quantizer, sim.encoding(site.tensor))

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
        before = {name: Range(quantizer) for name, quantizer in self._quantizers.items()}
        try:
            sim = self._engine(keeps_ranges=False)
            for site in sim.quantizers:
                quantizer = self._quantizers.get(site.tensor)
                if quantizer is not None and site.is_parameter and not quantizer.frozen:
                    set_encoding(quantizer, sim.encoding(site.tensor))
            try:
                with evaluating(self.model), torch.no_grad(), self._watching(sim):
                    if callable(forward_pass_callback):
                        given = forward_pass_callback_args
                        forward_pass_callback(self.model, *(() if given is None else (given,)))
                    else:
                        self._run_batches(forward_pass_callback)
            except Exception as error:
                if group is not None:
                    share(f"{type(error).__name__}: {error}", group)
                raise
            if group is not None:
                merge(sim, share(sim.statistics(), group))
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
                self._quantizers[name].observer = Observer(sim, name)
            # Other activation quantizers let values pass, as they do in the engine.
            idle = [
                q
                for n, q in self._quantizers.items()
                if not self._roles[n] and n not in watched and q.enabled
            ]
            for quantizer in idle:
                quantizer.observer = ignore
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
        write(os.path.join(path, f"{filename_prefix}.json"), lambda file: file.write(data))

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
        write(os.path.join(path, f"{filename_prefix}.pth"), lambda file: torch.save(original, file))

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
                set_encoding(quantizer, sim.encoding(site.tensor))
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
        parameters = parameter_encodings(encoding_path, self._roles)
        unknown = [name for name in parameters.names if not self._roles.get(name, False)]
        if unknown:
            raise EncodingMismatchError(
                "no quantized parameter is named " + ", ".join(f"'{n}'" for n in unknown[:5])
            )
        sim = self._engine(keeps_ranges=True)
        sim.load_encodings(parameters.content, strict=False)
        for name in parameters.names:
            quantizer = self._quantizers[name]
            if quantizer.frozen:
                quantizer.frozen = False
            set_encoding(quantizer, sim.encoding(name))
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


__all__ = ["EmptyStatisticsError", "HalfstepError", "QuantizationSimModel"]
