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

import torch
from torch import nn

from .. import simulation as engine
from .._faces import scheme_name
from ..errors import (
    EncodingMismatchError,
    InvalidArgumentError,
    InvalidStateError,
    UnknownNameError,
)
from . import _borders, _simulated
from ._encodings import joined, parameter_encodings, parsed, set_encoding, split, write
from ._export import ONNX, file_name, make_folder
from ._network import Network
from ._part import Part, Quantizers, quantizers
from ._program import SimulatedModule
from ._trace import as_arguments, evaluating
from ._watching import Range, merge, share
from .errors import UntraceableModelError
from .quantizer import Quantizer

_NOTHING: Any = object()


class QuantizationSimModel:
    """A live module simulated on integer hardware, to be calibrated, trained and exported.

    The engine places the quantizers in the graph of the module. `model` runs that graph with the
    original's own modules, which hold the quantizers. It can be copied (`copy.deepcopy`), pickled,
    and saved with `save_checkpoint`.

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
    default_data_type : optional
        Integers only: ``"int"``, or AIMET's enumeration. Accepted as AIMET has it.
    percentile : float
        For the scheme of that name, 50 to 100.
    block_size : int, optional
        Input channels that share a scale, in weights that the configuration quantizes per channel;
        all of a channel by default. The last block may be smaller.
    fallback : str, optional
        ``"modules"``: if Python code that branches on values defeats tracing, the largest modules
        that can be traced are simulated each for itself, with a warning that says which. `model`
        then is of the original's class and runs its Python code; only these modules run graphs.
        Without it, such a model is an error.

    Attributes
    ----------
    model : torch.nn.Module
        The network with quantizers.

    Raises
    ------
    UntraceableModelError
        If the module's Python code cannot be made a graph; the message names the line. With a
        fallback, if that holds for every module of it.
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
        default_data_type: Any = None,
        *,
        percentile: float = 100.0,
        fallback: str | None = None,
        block_size: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if getattr(default_data_type, "name", default_data_type) not in (None, "int"):
            raise InvalidArgumentError(f"default_data_type: expected int, got {default_data_type}")
        if fallback not in (None, "modules"):
            raise InvalidArgumentError(f"fallback: expected None or 'modules', got {fallback!r}")
        if any(isinstance(part, Quantizer) for part in model.modules()):
            raise InvalidStateError(
                "the model has quantizers already: build the simulation from the original"
            )
        device = _simulated.device_of(model)
        self._options = {
            "param_bits": default_param_bw,
            "activation_bits": default_output_bw,
            "quant_scheme": scheme_name(quant_scheme),
            "config": config_file,
            "percentile": percentile,
            "block_size": block_size,
        }
        self._original = model if in_place else copy.deepcopy(model)
        args, keywords = as_arguments(dummy_input)
        leaves = torch.utils._pytree.tree_leaves((args, keywords))
        self._inputs = sum(isinstance(leaf, torch.Tensor) for leaf in leaves)
        #: Why there is no graph of the whole network, if there is none.
        self._obstacle = ""
        try:
            part = Part(self._original, dummy_input, self._options)
            self._parts: tuple[Part, ...] = (part,)
            self.model: nn.Module = SimulatedModule(self._original, part.program, part.refresh)
        except UntraceableModelError as error:
            if fallback is None:
                raise UntraceableModelError(
                    f'{error}; fallback="modules" quantizes what can be traced'
                ) from error
            self._obstacle = str(error)
            self._parts = _borders.find(self._original, dummy_input, self._options, error)
            self.model = self._original
        missing = [part.name_of(tensor) for part in self._parts for tensor in part.missing]
        if missing:
            warnings.warn(
                f"{len(missing)} tensors that only exist in the ONNX graph stay unquantized: "
                + ", ".join(missing[:5]),
                stacklevel=2,
            )
        if device is not None:
            self.model.to(device)
        self.onnx = ONNX(self)

    # ---------------------------------------------------------------------------------------------
    # Parts: one, unless the network could not be traced as a whole

    @property
    def _part(self) -> Part:
        """The only part.

        Raises
        ------
        UntraceableModelError
            If the network is simulated module by module.
        """
        if self._obstacle:
            raise UntraceableModelError(
                f"this needs a graph of the whole network, which is simulated by modules:"
                f" {self._obstacle}"
            )
        return self._parts[0]

    @property
    def _network(self) -> Network:
        return self._part.network

    @property
    def _quantizers(self) -> dict[str, Quantizer]:
        return quantizers(self._parts)

    @property
    def _roles(self) -> dict[str, bool]:
        return {p.name_of(tensor): role for p in self._parts for tensor, role in p.roles.items()}

    def _engine(self, keeps_ranges: bool) -> engine.QuantizationSimModel:
        return self._part.engine(keeps_ranges)

    # ---------------------------------------------------------------------------------------------
    # Calibration

    def compute_encodings(
        self,
        forward_pass_callback: Callable[..., Any] | Iterable[Any],
        forward_pass_callback_args: Any = _NOTHING,
        *,
        group: Any = None,
    ) -> None:
        """Choose the grids of all quantizers that are not frozen.

        Parameters are quantized while data runs through, computed tensors are not. The network is
        in evaluation mode meanwhile. If anything raises, ranges and modes stay as they were.

        Parameters
        ----------
        forward_pass_callback : callable, or iterable of batches
            Called once with `model` (and the next argument, if that is given), to run calibration
            data through it. Or the data itself, such as a `DataLoader`: of a batch that
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
        before = [(quantizer, Range(quantizer)) for quantizer in self._quantizers.values()]
        try:
            sims = [part.engine(keeps_ranges=False) for part in self._parts]
            for part, sim in zip(self._parts, sims, strict=True):
                part.pull(sim, roles=(True,))
            try:
                with evaluating(self.model), torch.no_grad(), contextlib.ExitStack() as stack:
                    for part, sim in zip(self._parts, sims, strict=True):
                        stack.enter_context(part.watching(sim))
                    if callable(forward_pass_callback):
                        given = forward_pass_callback_args
                        forward_pass_callback(self.model, *(() if given is _NOTHING else (given,)))
                    else:
                        self._run_batches(forward_pass_callback)
            except Exception as error:
                if group is not None:
                    share(f"{type(error).__name__}: {error}", group)
                raise
            if group is not None:
                merge(sims, share([sim.statistics() for sim in sims], group))
            for part, sim in zip(self._parts, sims, strict=True):
                with part.naming():
                    sim.finish_calibration()
                part.pull(sim, roles=(False,))
        except BaseException:
            for quantizer, held in before:
                held.restore(quantizer)
            raise

    def _run_batches(self, batches: Iterable[Any]) -> None:
        single = self._inputs == 1
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

    # ---------------------------------------------------------------------------------------------
    # Quantizers

    @property
    def quantizers(self) -> Quantizers:
        """Quantizers by the name that their tensor has in the exported ONNX model.

        Called, as in AIMET, it goes through the quantizers.
        """
        return Quantizers(self._quantizers)

    def named_quantizers(self) -> Iterator[tuple[str, Quantizer]]:
        """Go through the quantizers with their names in `model`."""
        yield from _simulated.quantizers_of(self.model)

    def named_qmodules(self) -> Iterator[tuple[str, nn.Module]]:
        """Go through the modules of `model` that hold quantizers, with their names.

        The network itself is among them, without a name, if it holds those of its inputs.
        """
        for name, module in self.model.named_modules():
            if any(kind in module._modules for kind in _simulated.HOLDERS):
                yield name, module

    def qmodules(self) -> Iterator[nn.Module]:
        """Go through the modules of `model` that hold quantizers."""
        for _, module in self.named_qmodules():
            yield module

    def set_percentile_value(self, percentile_value: float) -> None:
        """Set the share of values within ranges, 50 to 100, for the scheme ``"percentile"``.

        The next `compute_encodings` goes by it.

        Raises
        ------
        InvalidArgumentError
        """
        if not 50 <= percentile_value <= 100:
            raise InvalidArgumentError(
                f"percentile_value: expected 50 to 100, got {percentile_value}"
            )
        for options in (self._options, *(part.options for part in self._parts)):
            options["percentile"] = float(percentile_value)
        for part in self._parts:
            part.refresh.forget()

    def fold_param_quantizers(self) -> None:
        """Give parameters the values that their quantizers round them to, and freeze these.

        The function of `model` and what is exported stay, as rounding twice changes nothing.

        Raises
        ------
        InvalidStateError
            Naming a quantizer that has no range; nothing changes then.
        """
        _simulated.fold_parameters(self.model)

    def quantizer(self, tensor: str) -> Quantizer:
        """Return the quantizer of a tensor of the exported ONNX model.

        Raises
        ------
        UnknownNameError
        """
        if tensor not in self._quantizers:
            raise UnknownNameError(f"tensor '{tensor}' has no quantizer")
        return self._quantizers[tensor]

    def exclude_layers_from_quantization(
        self, layers_to_exclude: Iterable[nn.Module | str]
    ) -> None:
        """Switch off what the engine would not quantize without these layers.

        Parameters
        ----------
        layers_to_exclude : iterable of torch.nn.Module or str
            Modules of `model`, or their names.

        Raises
        ------
        UnknownNameError
            For a layer that `model` does not have, or that computes nothing.
        """
        names = {id(module): name for name, module in self.model.named_modules()}
        excluded: dict[Part, list[str]] = {part: [] for part in self._parts}
        for layer in layers_to_exclude:
            name = layer if isinstance(layer, str) else names.get(id(layer))
            if name is None or name not in names.values():
                raise UnknownNameError(f"layer {layer!r} is not part of the simulated model")
            found = {part: part.operators_of(name) for part in self._parts}
            if not any(found.values()):
                raise UnknownNameError(f"layer '{name}' computes nothing in the graph")
            for part, operators in found.items():
                excluded[part] += operators
        for part, operators in excluded.items():
            if operators:
                part.exclude(operators)

    def exclude_param_from_quantization(self, param_name_to_exclude: str) -> None:
        """Switch off the quantizers of all parameters of a name, such as ``"weight"``.

        Raises
        ------
        UnknownNameError
            If no quantized parameter has it.
        """
        found = [
            quantizer
            for name, quantizer in self._quantizers.items()
            if self._roles[name] and name.rpartition(".")[2] == param_name_to_exclude
        ]
        if not found:
            raise UnknownNameError(f"no quantized parameter is named '{param_name_to_exclude}'")
        for quantizer in found:
            quantizer.enabled = False

    # ---------------------------------------------------------------------------------------------
    # Files

    def encodings(self, version: str = "1.0.0") -> dict[str, Any]:
        """Return the encodings as the parsed JSON that `export` writes."""
        return joined(
            {part.place: part.engine(keeps_ranges=True).encodings(version) for part in self._parts}
        )

    def _encodings_json(self, version: str) -> bytes:
        if not self._obstacle:
            return self._engine(keeps_ranges=True).encodings_json(version)
        return json.dumps(self.encodings(version), indent=2).encode()

    def save_encodings_to_json(
        self, path: str | os.PathLike[str], filename_prefix: str, encoding_version: str = "1.0.0"
    ) -> None:
        """Write ``<filename_prefix>.json`` with the encodings."""
        data = self._encodings_json(encoding_version)
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
        ONNX model. May be called any number of times. A network that is simulated by modules has no
        ONNX model, and tensors are called by their module and their name in its graph; a warning
        says so.

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
        if self._obstacle:
            data = self._encodings_json(encoding_version)
            make_folder(path)
            name = os.path.join(path, f"{file_name(filename_prefix)}.encodings")
            write(name, lambda file: file.write(data))
            warnings.warn(
                f"'{filename_prefix}.onnx' is not written, since the network is simulated by"
                f" modules: {self._obstacle}",
                stacklevel=2,
            )
        else:
            self._engine(keeps_ranges=True).export(path, filename_prefix, encoding_version)
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
        partial: bool = True,
        requires_grad: bool | None = None,
        allow_overwrite: bool = True,
        *,
        freeze: bool = False,
    ) -> engine.LoadReport:
        """Take encodings from JSON of any version.

        Parameters
        ----------
        encodings : dict or path
            Parsed JSON, or a file.
        strict : bool
            Whether an entry without a quantizer here, or of another width or symmetry, is an error.
            Otherwise the former is reported and the latter taken over.
        partial : bool
            Whether quantizers that the file does not name stay as they are. Otherwise they are
            switched off.
        requires_grad : bool, optional
            Whether training moves the ranges that are loaded; by default as before. A weight's
            range that is not to move is frozen, since it would follow the weight otherwise.
        allow_overwrite : bool
            Whether `compute_encodings` and further loading may change what is loaded. Otherwise it
            is frozen, and training does not move it either.
        freeze : bool
            The same as ``allow_overwrite=False``.

        Returns
        -------
        LoadReport

        Raises
        ------
        EncodingMismatchError
            If strict, and for grids that cannot belong to their tensor; nothing changes then.
        InvalidArgumentError
            If ranges are to be trained and kept at once.
        MalformedFileError, UnsupportedVersionError, FileAccessError
        """
        freeze = freeze or not allow_overwrite
        if freeze and requires_grad:
            raise InvalidArgumentError(
                "requires_grad: ranges that nothing may overwrite do not learn"
            )
        places = [part.place for part in self._parts]
        content, unknown = split(parsed(encodings), places)
        loaded = []
        different: list[str] = []
        for part in self._parts:
            sim = part.engine(keeps_ranges=True)
            with part.naming():
                report = sim.load_encodings(content[part.place], strict=False)
                part.check(sim)
            loaded.append((part, sim, report))
            unknown += [part.name_of(tensor) for tensor in report.unknown]
            different += [part.name_of(text) for text in report.different]
        problems = [f"'{tensor}' has no quantizer here" for tensor in unknown] + different
        if strict and problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise EncodingMismatchError(f"encodings do not match the model: {problems[0]}{more}")
        missing: list[str] = []
        for part, sim, report in loaded:
            part.take(sim, report.missing if partial else (), freeze, requires_grad)
            missing += [part.name_of(tensor) for tensor in report.missing]
        return engine.LoadReport(tuple(unknown), tuple(missing), tuple(different))

    def load_and_freeze_encodings(
        self, encoding_path: Mapping[str, Any] | str | os.PathLike[str], strict: bool = False
    ) -> engine.LoadReport:
        """Do what `load_encodings` does, and keep the grids from then on."""
        return self.load_encodings(encoding_path, strict, freeze=True)

    def quantizer_state_dict(self) -> dict[str, Any]:
        """Return the part of the model's `state_dict` that belongs to quantizers.

        ``other.model.load_state_dict(sim.quantizer_state_dict(), strict=False)`` gives another
        simulation of the same network the ranges and switches.
        """
        own = {name for name, _ in _simulated.quantizers_of(self.model)}
        state = self.model.state_dict()
        return {key: value for key, value in state.items() if key.rpartition(".")[0] in own}

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
        content, _ = split(parameters.content, [part.place for part in self._parts])
        loaded = []
        for part in self._parts:
            sim = part.engine(keeps_ranges=True)
            with part.naming():
                sim.load_encodings(content[part.place], strict=False)
                part.check(sim)
            loaded.append(
                (part, sim, [n for n in part.quantizers if part.name_of(n) in parameters.names])
            )
        for part, sim, names in loaded:
            for name in names:
                quantizer = part.quantizers[name]
                if quantizer.frozen:
                    quantizer.frozen = False
                set_encoding(quantizer, sim.encoding(name))
                quantizer.enabled = True
                quantizer.frozen = True

    def __repr__(self) -> str:
        return f"<halfstep.torch.QuantizationSimModel with {len(self._quantizers)} quantizers>"
