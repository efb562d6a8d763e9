# SPDX-License-Identifier: Apache-2.0
# Compression of live models, whatever the framework.
"""The steps of `compress_model` that `halfstep.torch` and `halfstep.keras` share.

The engine decides ranks and computes factors; a `Backend` hands a model to it and swaps layers.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from decimal import Decimal
from typing import Any, NamedTuple, Protocol

from ._compress_parameters import (
    AutomaticSelectionParameters,
    CompressionStats,
    GreedyCompressionRatioSelectionStats,
)
from ._pool import in_order
from ._prune import fixed_layers
from .compression import CompressionStats as EngineStats
from .compression import ModelCompressor, load_scores, save_scores
from .errors import InvalidArgumentError, MalformedFileError, UnsupportedOperatorError
from .model import Model


class Layer(NamedTuple):
    """What a trainer gets: a layer of the compressed model."""

    #: Name in the model.
    name: str
    #: The pair that stands for the layer now, or the layer.
    module: Any


class Backend(Protocol):
    """A live model as compression sees it."""

    #: The engine's model, its weights those of now.
    engine: Model
    #: Names in the live model of layers that can be swapped, by weight.
    layers: dict[str, str]
    #: Why layers cannot be swapped that the engine could split, by weight.
    refusals: dict[str, str]

    def name_of(self, module: Any) -> str:
        """Name of a layer in the live model."""

    def inputs(self, data: Any) -> dict[str, Any]:
        """Arrays of data, joined, by the engine's names of inputs."""

    #: Layers, by weight, whose inputs stay because the live model's program asks for their number.
    fixed: dict[str, str]

    def swapped(self, smaller: Model, stats: EngineStats | None) -> Any:
        """A copy of the live model with what compression did to it; without stats, as it is."""

    def example(self) -> dict[str, Any]:
        """Random inputs by the engine's names."""

    def outputs(self, model: Any, inputs: dict[str, Any]) -> list[Any]:
        """Arrays that a live model computes from inputs."""

    def module(self, model: Any, name: str) -> Any:
        """A layer of a live model, or the pair that took its place."""


class Job(NamedTuple):
    """Arguments of `compress_model`."""

    scheme: str
    metric: str
    parameters: Any
    #: Score of a model; gets the number of iterations as well.
    score: Callable[[Any, Any], float]
    #: The same as a function that another process can be given, and its other arguments.
    callback: tuple[Callable[..., float], tuple[Any, ...]]
    iterations: Any
    trainer: Any
    data: Any
    executor: Any
    progress: Any


def scheme_of(value: Any, known: Iterable[str], what: str) -> str:
    """Return the name of an enumeration's member, AIMET's as well, or of a text."""
    name = getattr(value, "name", value)
    if name not in known:
        raise InvalidArgumentError(f"{what}: expected one of {', '.join(known)}, got {value!r}")
    return str(name)


def compress(make: Callable[[Any], Backend], model: Any, job: Job) -> tuple[Any, CompressionStats]:
    """Compress a live model, which stays as it is."""
    backend = make(model)
    if job.scheme == "channel_pruning":
        backend.fixed = fixed_layers(backend, lambda: _compressor(backend, job, probes=True))
    if job.trainer is not None:
        job.trainer.train_model(model, model, train_flag=False)
    compressor = _compressor(backend, job)
    base = job.score(model, None)
    shown = _names(backend, compressor)
    ratios, selection, curves, label = _ratios(backend, compressor, shown, job)
    ranks = {weight: rank for weight, (_, rank) in ratios.items() if rank}
    if job.trainer is None:
        smaller, stats = compressor.compress(ranks=ranks, progress=job.progress)
        result = backend.swapped(smaller, stats)
    else:
        result, stats = _trained(make, backend, compressor, ranks, shown, job)
    names = backend.layers
    renamed = [layer._replace(name=names.get(layer.weight, layer.name)) for layer in stats.layers]
    refusals = {**stats.refusals, **backend.refusals, **backend.fixed}
    stats = stats._replace(layers=tuple(renamed), refusals=refusals)
    return result, CompressionStats(
        base,
        job.score(result, None),
        stats,
        [
            CompressionStats.LayerStats(shown[weight], ratio)
            for weight, (ratio, _) in ratios.items()
        ],
        selection,
        curves,
        label,
    )


def _compressor(
    backend: Backend, job: Job, chooses: bool = True, probes: bool = False
) -> ModelCompressor:
    """The engine's compressor of what a backend can swap."""
    costs = [cost.weight for cost in ModelCompressor(backend.engine).costs]
    left = [weight for weight in costs if weight not in backend.layers]
    named: list[str] = []
    for module in getattr(job.parameters.mode_params, "modules_to_ignore", ()) if chooses else ():
        name = backend.name_of(module)
        # Parts of the module stay as well, and layers that nothing compresses need no mention.
        named += [
            weight
            for weight, owner in backend.layers.items()
            if owner == name or owner.startswith(f"{name}.")
        ]
    settings: dict[str, Any] = {
        "cost_metric": job.metric,
        "multiplicity": job.parameters.multiplicity,
    }
    if job.scheme != "channel_pruning":
        data = job.data
        for weight in left:
            backend.refusals.setdefault(weight, f"'{weight}' is no weight of a layer")
        left += named
    else:
        # Inputs of layers that were to be ignored stay.
        samples = getattr(job.parameters, "num_reconstruction_samples", 0)
        data = job.data if job.data is not None else _part(job.parameters.data_loader, samples)
        settings |= {
            "importance": getattr(job.parameters, "importance", "reconstruction"),
            "reconstruct": samples > 0,
            "input_keepers": dict.fromkeys([*named, *backend.fixed]),
            "keeps_positions": True,
        }
        if probes:
            data = None
            settings |= {"importance": "magnitude", "reconstruct": False, "multiplicity": 1}
    return ModelCompressor(
        backend.engine,
        job.scheme,  # type: ignore[arg-type]
        layers_to_ignore=dict.fromkeys(left),
        data=None if data is None else backend.inputs(data),
        **settings,
    )


def _part(loader: Any, samples: int) -> Any:
    """Batches until there are as many pictures as AIMET reads: one for ten samples."""
    if loader is None or samples == 0:
        return None
    batches, count = [], 0
    for batch in loader:
        batches.append(batch)
        first = batch
        while isinstance(first, (tuple, list, dict)):
            first = next(iter(first.values() if isinstance(first, dict) else first))
        count += len(first)
        if count * 10 >= samples:
            break
    return batches


def _names(backend: Backend, compressor: ModelCompressor) -> dict[str, str]:
    """What layers are called in results, by weight: in channel pruning, as AIMET, by a reader."""
    result: dict[str, str] = {}
    for layer in compressor.layers:
        taken = set(result.values())
        names = [backend.layers[reader] for reader in layer.readers if reader in backend.layers]
        names += [backend.layers[layer.weight], layer.weight]
        result[layer.weight] = next(name for name in names if name not in taken)
    return result


# -------------------------------------------------------------------------------------------------
# Ratios


def _ratios(backend: Backend, compressor: ModelCompressor, shown: dict[str, str], job: Job) -> Any:
    """Ratio and rank of each layer to compress, scores, curves and what they show."""
    parameters = job.parameters.mode_params
    if job.parameters.mode.name == "manual":
        return _given(backend, compressor, shown, parameters), None, {}, "error"
    choice = parameters.greedy_params
    target = float(choice.target_comp_ratio)
    if isinstance(choice, AutomaticSelectionParameters):
        ranks = compressor.select(target, progress=job.progress)
        curves = compressor.ratio_curves()
        by_name = {shown[weight]: curve for weight, curve in curves.items()}
        return _actual(compressor, ranks), None, by_name, "error"
    scores = _scores(backend, compressor, shown, choice, job)
    weights = {name: weight for weight, name in shown.items()}
    ranks = compressor.select_greedy(
        target,
        {weights[name]: curve for name, curve in scores.items()},
        use_monotonic_fit=choice.use_monotonic_fit,
    )
    curves = {name: sorted(curve.items()) for name, curve in scores.items()}
    stats = GreedyCompressionRatioSelectionStats(scores)
    return _actual(compressor, ranks), stats, curves, "score"


def _given(
    backend: Backend, compressor: ModelCompressor, shown: dict[str, str], parameters: Any
) -> dict[str, tuple[float, int]]:
    """Ratios that the user gives, and what they are called."""
    weights = {name: weight for weight, name in backend.layers.items()}
    ratios: dict[str, tuple[float, int]] = {}
    for pair in parameters.list_of_module_comp_ratio_pairs:
        if pair.comp_ratio is None:
            continue
        name = backend.name_of(pair.module)
        if name not in weights or weights[name] in backend.fixed:
            raise UnsupportedOperatorError(_refusal(backend, name))
        try:
            found = compressor.read_by(weights[name])
        except UnsupportedOperatorError as error:
            # The engine's name of the layer may be another one.
            reason = str(error).partition("': ")[2] or str(error)
            raise UnsupportedOperatorError(f"layer '{name}': {reason}") from None
        for weight in found:
            ratio = float(pair.comp_ratio)
            if weight not in ratios:
                ratios[weight] = (ratio, compressor.rank(weight, ratio))
                shown[weight] = name
            elif ratios[weight][0] != ratio:
                raise InvalidArgumentError(
                    f"layers '{shown[weight]}' and '{name}' read the same channels: give them one"
                    f" ratio, not {ratios[weight][0]:g} and {ratio:g}"
                )
    return ratios


def _refusal(backend: Backend, name: str) -> str:
    parts = (f"{name}.", f"{name}/")
    known = {**backend.refusals, **backend.fixed}
    reasons = [reason for weight, reason in known.items() if weight.startswith(parts)]
    return reasons[0] if reasons else f"layer '{name}' is nothing that can be compressed"


def _actual(compressor: ModelCompressor, ranks: Mapping[str, int]) -> dict[str, Any]:
    return {weight: (compressor.ratio(weight, rank), rank) for weight, rank in ranks.items()}


def _scores(
    backend: Backend,
    compressor: ModelCompressor,
    shown: dict[str, str],
    choice: Any,
    job: Job,
) -> dict[str, dict[float, float]]:
    """Scores by layer and ratio: saved ones, and what is missing of them."""
    path = choice.saved_eval_scores_dict
    saved = read_scores(path) if path is not None and os.path.exists(path) else {}
    count = choice.num_comp_ratio_candidates
    ratios = [step / count for step in range(1, count)]
    if saved:
        # As in AIMET, a saved dictionary has ratios of its own.
        ratios = sorted(next(iter(saved.values())))
    result: dict[str, dict[float, float]] = {}
    missing: list[tuple[str, float, int]] = []
    for layer in compressor.layers:
        name = shown[layer.weight]
        result[name] = {r: s for r, s in saved.get(name, {}).items() if r in ratios}
        missing += [
            (layer.weight, ratio, compressor.rank(layer.weight, ratio))
            for ratio in ratios
            if ratio not in result[name]
        ]

    # Ratios that give the same rank give the same network.
    steps = list(dict.fromkeys((weight, rank) for weight, _, rank in missing))
    function, rest = (job.score, ()) if job.executor is None else job.callback

    def candidates() -> Iterator[Any]:
        for weight, rank in steps:
            smaller, stats = compressor.compress(ranks={weight: rank})
            yield backend.swapped(smaller, stats), job.iterations, *rest

    found: dict[tuple[str, int], float] = {}
    with closing(in_order(job.executor, function, candidates(), "executor")) as scored:
        for key, score in zip(steps, scored, strict=True):
            found[key] = float(score)
            if callable(job.progress) and job.progress(len(found), len(steps)) is False:
                from .errors import CancelledError

                raise CancelledError("compression was cancelled")
    for weight, ratio, rank in missing:
        result[shown[weight]][ratio] = found[weight, rank]
    if path is not None and missing:
        save_scores(result, path)
    return {name: dict(sorted(scores.items())) for name, scores in result.items()}


class _Unpickler(pickle.Unpickler):
    """Reads dictionaries of numbers; refuses everything that would run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("decimal", "Decimal"):
            return Decimal
        raise MalformedFileError(f"scores: a pickle with {module}.{name} is not read")


def read_scores(path: str | os.PathLike[str]) -> dict[str, dict[float, float]]:
    """Read scores by layer and ratio: JSON, or a pickle that AIMET wrote.

    Raises
    ------
    MalformedFileError
    """
    with open(path, "rb") as file:
        data = file.read()
    try:
        if data[:1] != b"\x80":
            return load_scores(path)
        document = _Unpickler(io.BytesIO(data)).load()
        return {
            str(name): {float(ratio): float(score) for ratio, score in scores.items()}
            for name, scores in document.items()
        }
    except (json.JSONDecodeError, UnicodeDecodeError, pickle.UnpicklingError, EOFError) as error:
        raise MalformedFileError(f"scores '{os.fspath(path)}': {error}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise MalformedFileError(
            f"scores '{os.fspath(path)}': expected numbers by layer and ratio"
        ) from error


# -------------------------------------------------------------------------------------------------
# Layer by layer


def _trained(
    make: Callable[[Any], Backend],
    backend: Backend,
    compressor: ModelCompressor,
    ranks: Mapping[str, int],
    shown: Mapping[str, str],
    job: Job,
) -> tuple[Any, EngineStats]:
    """Compress layer by layer, and let the trainer work after each."""
    # A plan of the whole, for its costs; layers are compressed again as training leaves them.
    _, stats = compressor.compress(ranks=ranks)
    details = {layer.weight: layer for layer in stats.layers}
    result = backend.swapped(backend.engine, None)
    for layer in compressor.layers:
        rank = ranks.get(layer.weight)
        if rank is None:
            continue
        now = make(result)
        now.fixed = backend.fixed
        smaller, report = _compressor(now, job, chooses=False).compress(ranks={layer.weight: rank})
        result = now.swapped(smaller, report)
        if job.scheme != "channel_pruning":
            details[layer.weight] = next(x for x in report.layers if x.weight == layer.weight)
        name = shown[layer.weight]
        job.trainer.train_model(result, Layer(name, now.module(result, name)))
    return result, stats._replace(layers=tuple(details.values()))
