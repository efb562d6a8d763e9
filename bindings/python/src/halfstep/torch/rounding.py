# SPDX-License-Identifier: Apache-2.0
# Rounding of weights and correction of biases for live PyTorch modules.
"""AdaRound, sequential MSE and bias correction, as the engine does them."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import simulation as engine
from .._faces import scheme_name
from .._progress import Progress
from ..errors import (
    FileAccessError,
    InvalidArgumentError,
    InvalidStateError,
    UnknownNameError,
)
from ..model import Model
from ..rounding import RoundedLayer
from ._calibration import Forward, gather
from ._encodings import set_encoding, write
from ._network import as_array
from .errors import UntraceableModelError
from .folding import _LiveModel
from .quantizer import Quantizer
from .simulation import QuantizationSimModel

#: Advice where a network is no graph.
_INSTEAD = (
    "rounding needs a graph of the whole network: change that line, or round the modules that can"
    " be traced one by one with apply_adaround, on data that they get, and put the results in"
    " their places"
)
#: AIMET's constants of gradient AdaRound.
_REGULARIZATION, _BETA, _WARM_START = 0.01, (20, 2), 0.2


@dataclass(frozen=True)
class AdaroundParameters:
    """Data and constants of AdaRound.

    Parameters
    ----------
    data_loader : iterable
        Batches of unlabeled data, such as a `DataLoader`.
    num_batches : int
        Batches to use at most.
    default_num_iterations : int, optional
        Steps of gradient descent for each layer; if given, ``method="auto"`` is ``"gradient"``.
    default_reg_param, default_beta_range, default_warm_start : float, pair of int, float
        The paper's constants, of gradient descent alone.
    forward_fn : callable, optional
        Called with the model and a batch, to run it. By default the batch goes in; of a tuple the
        first item if the model has one input.
    """

    data_loader: Iterable[Any]
    num_batches: int
    default_num_iterations: int | None = None
    default_reg_param: float = _REGULARIZATION
    default_beta_range: Sequence[int] = _BETA
    default_warm_start: float = _WARM_START
    forward_fn: Forward | None = None

    def __post_init__(self) -> None:
        if self.num_batches < 1:
            raise InvalidArgumentError(f"num_batches: expected 1 or more, got {self.num_batches}")


@dataclass(frozen=True)
class QuantParams:
    """Widths and ranges that biases are corrected for; AIMET's names.

    Parameters
    ----------
    weight_bw, act_bw : int
        Widths of weights and activations.
    round_mode : str
        Only ``"nearest"``.
    quant_scheme : str
        As for `QuantizationSimModel`.
    config_file : str or path, optional
        A runtime configuration, built in by name or a JSON file; per channel by default.
    """

    weight_bw: int = 8
    act_bw: int = 8
    round_mode: str = "nearest"
    quant_scheme: Any = "tf_enhanced"
    config_file: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.round_mode != "nearest":
            raise InvalidArgumentError(f"round_mode: expected 'nearest', got {self.round_mode!r}")


def apply_adaround(
    model: nn.Module,
    dummy_input: Any,
    params: AdaroundParameters,
    path: str | os.PathLike[str],
    filename_prefix: str,
    default_param_bw: int = 4,
    param_bw_override_list: Iterable[tuple[nn.Module, int]] | None = None,
    ignore_quant_ops_list: Iterable[nn.Module] | None = None,
    default_quant_scheme: Any = "tf_enhanced",
    default_config_file: str | os.PathLike[str] | None = None,
    *,
    method: str = "auto",
    progress: bool | Progress = True,
    **options: Any,
) -> nn.Module:
    """Round weights so that the network's outputs change least, with unlabeled data.

    Fold batch norms first. Build the simulation from the model that comes back, with the same
    widths, and let it take the file by `QuantizationSimModel.set_and_freeze_param_encodings` before
    `compute_encodings`.

    Parameters
    ----------
    model : torch.nn.Module
        The float network; it is not changed.
    dummy_input : torch.Tensor, or tuple or dict of them
        Inputs that the module accepts.
    params : AdaroundParameters
        The data.
    path, filename_prefix : str
        Where ``<prefix>.encodings`` is written: the grids of the rounded weights.
    default_param_bw : int
        Width of weights, 2 to 16.
    param_bw_override_list : iterable of (torch.nn.Module, int), optional
        Layers with other widths; every layer finds those before it rounded to theirs.
    ignore_quant_ops_list : iterable of torch.nn.Module, optional
        Layers that stay in float; none of `param_bw_override_list`.
    default_quant_scheme : str
        How ranges are chosen, as for `QuantizationSimModel`.
    default_config_file : str or path, optional
        A runtime configuration, built in by name or a JSON file; per channel by default.
    method : str
        ``"auto"``, ``"gram"``, ``"gradient"`` or ``"sequential_mse"``, as for
        `halfstep.Model.adaround`. ``"auto"`` is ``"gradient"`` where `params` says how many
        iterations.
    progress : bool or callable
        True shows a bar on a terminal if tqdm is installed. A callable gets the number of layers
        done and in all, and cancels by returning False or raising.
    **options
        As `halfstep.Model.adaround` takes them, such as ``seed``, ``activation_bits``.

    Returns
    -------
    torch.nn.Module
        A float copy of the model with rounded weights.

    Raises
    ------
    UntraceableModelError, UnsupportedOperatorError, InvalidStateError
        For the model.
    EmptyStatisticsError, NonFiniteValueError, ShapeMismatchError, InvalidArgumentError
        For the data.
    UnknownNameError, InvalidConfigurationError, FileAccessError
    CancelledError
        If `progress` returned False. No file is written then, as after any error.

    References
    ----------
    Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020,
    arXiv:2004.10568.

    Examples
    --------
    >>> import tempfile, torch
    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    >>> data = [torch.randn(8, 3, 8, 8) for _ in range(2)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     params = AdaroundParameters(data, num_batches=2)
    ...     rounded = apply_adaround(net, data[0], params, folder, "net", progress=False)
    ...     sim = QuantizationSimModel(rounded, data[0], default_param_bw=4)
    ...     sim.set_and_freeze_param_encodings(f"{folder}/net.encodings")
    >>> weight = rounded[0].weight
    >>> torch.equal(sim.quantizer("0.weight")(weight), weight)
    True
    """
    target = os.path.join(_folder(path), f"{_file_name(filename_prefix)}.encodings")
    if params.default_num_iterations is not None:
        options.setdefault("iterations", params.default_num_iterations)
        method = "gradient" if method == "auto" else method
    options.setdefault("reg_param", params.default_reg_param)
    options.setdefault("beta_range", tuple(params.default_beta_range))
    options.setdefault("warm_start", params.default_warm_start)
    work = _Work(model, dummy_input)
    values = gather(work.network, model, params.data_loader, params.num_batches, params.forward_fn)
    options |= {
        "method": method,
        "quant_scheme": scheme_name(default_quant_scheme),
        "config": default_config_file,
    }
    overrides = [(work.name(layer), bits) for layer, bits in param_bw_override_list or ()]
    ignored = work.operators(work.name(layer) for layer in ignore_quant_ops_list or ())
    rounded = work.round(values, default_param_bw, overrides, ignored, options, progress)
    content = _parameters_only(work.changed, rounded, options)
    work.write_back()
    write(target, lambda file: file.write(content))
    return work.model


def apply_seq_mse(
    sim: QuantizationSimModel,
    data_loader: Iterable[Any],
    num_candidates: int = 20,
    forward_fn: Forward | None = None,
    modules_to_exclude: Iterable[nn.Module] | None = None,
    *,
    num_batches: int | None = None,
    progress: bool | Progress = True,
    **options: Any,
) -> None:
    """Search weight scales for the least error of each layer's output, layer after layer.

    The weights of the simulation stay; the quantizers of the weights that were searched get their
    grids, which are kept from then on. Call it before `compute_encodings`.

    Parameters
    ----------
    sim : QuantizationSimModel
        Its weights' widths hold.
    data_loader : iterable
        Batches of unlabeled data.
    num_candidates : int
        Scales that are tried.
    forward_fn : callable, optional
        Called with the model and a batch, to run it.
    modules_to_exclude : iterable of torch.nn.Module, optional
        Layers of ``sim.model`` whose weights are not searched.
    num_batches : int, optional
        Batches to use at most.
    progress, **options
        As for `apply_adaround`.

    Raises
    ------
    UntraceableModelError
        If the simulation consists of separate modules, because its Python code is no graph; the
        message names the line and says what can be done instead.
    EmptyStatisticsError, NonFiniteValueError, ShapeMismatchError, InvalidArgumentError
    UnknownNameError, CancelledError
        The simulation is then as it was.
    """
    if sim._obstacle:
        raise UntraceableModelError(f"{sim._obstacle}; {_INSTEAD}")
    part = sim._parts[0]
    names = {id(module): name for name, module in sim.model.named_modules()}
    excluded: list[str] = list(part.excluded)
    for module in modules_to_exclude or ():
        if id(module) not in names:
            raise UnknownNameError(f"layer {module!r} is not part of the simulated model")
        excluded += part.operators_of(names[id(module)])
    values = gather(part.network, sim.model, data_loader, num_batches, forward_fn)
    changed = part.network.bound(part.original)
    options |= {
        "method": "sequential_mse",
        "num_candidates": num_candidates,
        "quant_scheme": part.options["quant_scheme"],
        "config": part.options["config"],
        "percentile": part.options["percentile"],
        "activation_bits": part.options["activation_bits"],
    }
    usual = part.options["param_bits"]
    overrides = []
    for node, modules in part.network.exported.scopes.items():
        quantizer = part.quantizers.get(f"{modules[-1]}.weight" if modules else "")
        if quantizer is not None and (quantizer.frozen or not quantizer.enabled):
            excluded.append(node)
        elif quantizer is not None and quantizer.bits != usual and node not in excluded:
            overrides.append((node, quantizer.bits))
    rounded = _by_width(changed, values, usual, overrides, excluded, options, progress)
    for bits, layers in rounded.items():
        found = _simulation(changed, bits, options)
        for layer in layers:
            quantizer = part.quantizers.get(layer.weight)
            if quantizer is not None:
                set_encoding(quantizer, found.encoding(layer.weight))
                quantizer.frozen = True


def correct_bias(
    model: nn.Module,
    quant_params: QuantParams,
    num_quant_samples: int,
    data_loader: Iterable[Any],
    num_bias_correct_samples: int,
    conv_bn_dict: Any = None,
    perform_only_empirical_bias_corr: bool = True,
    layers_to_ignore: Iterable[nn.Module] = (),
    *,
    dummy_input: Any = None,
    forward_fn: Forward | None = None,
    progress: bool | Progress = True,
    **options: Any,
) -> tuple[RoundedLayer, ...]:
    """Correct biases, in place, for what rounding weights to nearest does to means of outputs.

    Parameters
    ----------
    model : torch.nn.Module
        The float network. Layers without a bias may get one.
    quant_params : QuantParams
        Widths and ranges.
    num_quant_samples, num_bias_correct_samples : int
        Samples that ranges and means are measured on; the larger number serves both.
    data_loader : iterable
        Batches of unlabeled data.
    conv_bn_dict : optional
        Not needed; accepted as AIMET has it.
    perform_only_empirical_bias_corr : bool
        False corrects analytically, by the means that batch norms let expect, and runs no data. The
        model must still have its batch norms; they are folded, in place.
    layers_to_ignore : iterable of torch.nn.Module
        Layers that stay in float.
    dummy_input : optional
        Inputs that the module accepts; by default the first batch.
    forward_fn : callable, optional
        Called with the model and a batch, to run it.
    progress, **options
        As for `apply_adaround`.

    Returns
    -------
    tuple of halfstep.RoundedLayer
        What became of each layer.

    Raises
    ------
    UntraceableModelError, UnsupportedOperatorError, EmptyStatisticsError, NonFiniteValueError,
    ShapeMismatchError, InvalidArgumentError, UnknownNameError, InvalidConfigurationError,
    CancelledError
        The model is then as it was.
    """
    count = max(num_quant_samples, num_bias_correct_samples)
    if count < 1:
        raise InvalidArgumentError(f"num_bias_correct_samples: expected 1 or more, got {count}")
    batches = _Peekable(data_loader)
    if dummy_input is None:
        dummy_input = _example(batches.first())
    work = _Work(model, dummy_input, in_place=True)
    values, folds = None, ()
    if perform_only_empirical_bias_corr:
        values = gather(work.network, model, batches.until(count), None, forward_fn)
        values = {name: value[:count] for name, value in values.items()}
    else:
        folds = work.changed.fold_batch_norms()
        if not folds:
            raise InvalidStateError(
                "perform_only_empirical_bias_corr: the model has no batch norms that fold, which"
                " alone tell means of activations; correct before folding, or with data"
            )
    layers = work.changed.correct_biases(
        values,
        quant_params.weight_bw,
        quant_params.config_file,
        activation_bits=quant_params.act_bw,
        quant_scheme=scheme_name(quant_params.quant_scheme),
        excluded_layers=work.operators(work.name(layer) for layer in layers_to_ignore),
        progress=progress,
        **options,
    )
    work.write_back({fold.batch_norm for fold in folds})
    return layers


# ------------------------------------------------------------------------------------------------


class _Work(_LiveModel):
    """A module that is rounded: a copy, or itself."""

    def __init__(self, model: nn.Module, dummy_input: Any, in_place: bool = False) -> None:
        if isinstance(model, nn.Module):
            if any(isinstance(part, Quantizer) for part in model.modules()):
                raise InvalidStateError("the model has quantizers: round the original")
            self._names = {id(part): name for name, part in model.named_modules()}
        try:
            super().__init__(model if in_place else copy.deepcopy(model), dummy_input, None)
        except UntraceableModelError as error:
            raise UntraceableModelError(f"{error}; {_INSTEAD}") from error

    def name(self, layer: nn.Module | str) -> str:
        """Return a layer's name in the model."""
        name = layer if isinstance(layer, str) else self._names.get(id(layer))
        if name is None or name not in self._names.values():
            raise UnknownNameError(f"layer {layer!r} is not part of the model")
        return name

    def operators(self, layers: Iterable[str]) -> list[str]:
        """Return the operators of the graph that layers compute."""
        found: list[str] = []
        for layer in layers:
            own = [n for n, inside in self.network.exported.scopes.items() if layer in inside]
            if not own:
                raise UnknownNameError(f"layer '{layer}' computes nothing in the graph")
            found += own
        return found

    def round(
        self,
        values: dict[str, np.ndarray],
        param_bits: int,
        overrides: list[tuple[str, int]],
        ignored: list[str],
        options: dict[str, Any],
        progress: bool | Progress,
    ) -> dict[int, tuple[RoundedLayer, ...]]:
        """Round the engine's model; return what became of layers, by width."""
        widths = [(op, bits) for layer, bits in overrides for op in self.operators([layer])]
        return _by_width(self.changed, values, param_bits, widths, ignored, options, progress)

    def write_back(self, folded: Set[str] = frozenset()) -> None:
        """Give the module the weights and biases that the engine's model holds now."""
        held = self.changed.initializers
        state = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        values = {n: held[n] for n in self.network.exported.state if n in held and n in state}
        self._write_back(folded)
        with torch.no_grad():
            for name, value in values.items():
                # Weights that reach their layer through a transposition, for instance.
                if not np.array_equal(as_array(state[name]), value):
                    state[name].copy_(torch.from_numpy(value.copy()).reshape(state[name].shape))


def _by_width(
    model: Model,
    values: dict[str, np.ndarray],
    usual: int,
    overrides: list[tuple[str, int]],
    ignored: list[str],
    options: dict[str, Any],
    progress: bool | Progress,
) -> dict[int, tuple[RoundedLayer, ...]]:
    """Round with the usual width and those of single operators; results by width."""
    weighted = {layer.name for layer in model.inspect()}
    layers = model.adaround(
        values,
        usual,
        **options,
        layer_bits={name: bits for name, bits in overrides if name in weighted},
        excluded_layers=ignored,
        progress=progress,
    )
    result: dict[int, tuple[RoundedLayer, ...]] = {usual: ()}
    for layer in layers:
        result[layer.bits] = (*result.get(layer.bits, ()), layer)
    return result


def _simulation(model: Model, bits: int, options: dict[str, Any]) -> engine.QuantizationSimModel:
    sim = engine.QuantizationSimModel(
        model,
        param_bits=bits,
        # Layers may be rounded with float activations; grids of weights do not depend on it.
        activation_bits=options.get("activation_bits", 8) or 8,
        quant_scheme=options["quant_scheme"],
        config=options["config"],
        percentile=options.get("percentile", 100.0),
    )
    return sim


def _parameters_only(
    model: Model, rounded: dict[int, tuple[RoundedLayer, ...]], options: dict[str, Any]
) -> bytes:
    """Return the grids of the weights that were rounded, as JSON of version 1.0.0."""
    usual = next(iter(rounded))
    sim = _simulation(model, usual, options)
    grids = {}
    for bits, layers in rounded.items():
        found = sim if bits == usual else _simulation(model, bits, options)
        grids |= {layer.weight: found.encoding(layer.weight) for layer in layers}
    for site in sim.quantizers:
        if site.tensor not in grids:
            sim.set_enabled(site.tensor, False)
    for tensor, grid in grids.items():
        sim.set_precision(tensor, grid.bits, grid.is_symmetric)
        sim.set_encoding(tensor, grid)
    return sim.encodings_json("1.0.0")


def _folder(path: str | os.PathLike[str]) -> str:
    folder = os.fspath(path)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise FileAccessError(f"cannot make folder '{folder}': {error.strerror}") from error
    return folder


def _file_name(prefix: str) -> str:
    if not prefix or os.path.basename(prefix) != prefix:
        raise InvalidArgumentError(f"filename_prefix: expected a name, got {prefix!r}")
    return prefix


def _example(batch: Any) -> Any:
    if isinstance(batch, (tuple, list)):
        batch = batch[0]
    return batch[:1] if isinstance(batch, torch.Tensor) else batch


class _Peekable:
    """Batches whose first can be looked at."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._iterator = iter(batches)
        self._seen: list[Any] = []

    def first(self) -> Any:
        from ..errors import EmptyStatisticsError

        for batch in self._iterator:
            self._seen.append(batch)
            return batch
        raise EmptyStatisticsError("data_loader: no batches")

    def until(self, count: int) -> Iterable[Any]:
        """Give batches until they have as many samples as wanted."""
        taken = 0
        while taken < count:
            batch = self._seen.pop() if self._seen else next(self._iterator, None)
            if batch is None:
                return
            yield batch
            leaf = torch.utils._pytree.tree_leaves(batch)[0]
            taken += len(leaf) if getattr(leaf, "ndim", 0) else 1
