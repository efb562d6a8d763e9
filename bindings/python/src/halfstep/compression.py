# SPDX-License-Identifier: Apache-2.0
# The ModelCompressor class: smaller networks by SVD and by channel pruning.
"""Compression: weight SVD, spatial SVD, channel pruning, and the choice of ratios."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from typing import Any, Literal, NamedTuple

from . import _core
from ._progress import Progress, Reporter
from .model import Model

_SCHEMES = {"weight_svd": 0, "spatial_svd": 1, "channel_pruning": 2}
_IMPORTANCES = {"reconstruction": 0, "magnitude": 1}
_METRICS = {"mac": 0, "memory": 1}
#: Ratios at which `ModelCompressor.ratio_curves` looks, one more.
_CURVE_STEPS = 64


class LayerCost(NamedTuple):
    """What a convolution or matrix product costs for one sample."""

    #: Node name, or operator and first output if the node has no name.
    name: str
    #: Operator, such as ``"Conv"``.
    op_type: str
    #: Name of the weight.
    weight: str
    #: Multiply-accumulates.
    macs: int
    #: Elements of the weight; biases are not counted.
    parameters: int


class CompressibleLayer(NamedTuple):
    """A layer that can be split, or whose output channels can be pruned.

    Layers whose outputs are added, or that are coupled in another way, lose the same channels: the
    first of them stands for all.
    """

    #: Node name, or operator and first output if the node has no name.
    name: str
    #: Operator, such as ``"Conv"``.
    op_type: str
    #: Name of the weight.
    weight: str
    #: Multiply-accumulates.
    macs: int
    #: Elements of the weight.
    parameters: int
    #: Largest rank, or number of channels that can be pruned.
    maximum_rank: int
    #: Weights of the layers that write the channels; of the layer alone where layers are split.
    writers: tuple[str, ...] = ()
    #: Weights of the layers that read the channels; of the layer alone where layers are split.
    readers: tuple[str, ...] = ()

    @property
    def maximum_channels(self) -> int:
        """`maximum_rank` under the name that it has in channel pruning."""
        return self.maximum_rank


class CompressedLayer(NamedTuple):
    """What happened to a layer."""

    #: Node name before compression.
    name: str
    #: Operator, such as ``"Conv"``.
    op_type: str
    #: Rank, or channels that stayed of those that can be pruned; None if none was chosen.
    rank: int | None
    #: Largest rank or number of channels; 0 if the layer cannot be split or pruned.
    maximum_rank: int
    #: Multiply-accumulates before and after (of both layers if it was split).
    macs: tuple[int, int]
    #: Elements of weights before and after.
    parameters: tuple[int, int]
    #: Name of the weight before compression.
    weight: str
    #: Names of the pair's weights; None if the layer stayed as it was.
    pair: tuple[str, str] | None
    #: Name of the second layer's bias, or of one that was fitted when the layer lost channels; None
    #: if there is none.
    bias: str | None
    #: Noise over signal of the layer's output on held-out rows, with the factors that are best for
    #: the weight alone and with those that were kept; when it loses inputs, with its old weights
    #: and with those that were kept. None without data.
    noise: tuple[float, float] | None

    @property
    def channels(self) -> int | None:
        """`rank` under the name that it has in channel pruning."""
        return self.rank

    @property
    def maximum_channels(self) -> int:
        """`maximum_rank` under the name that it has in channel pruning."""
        return self.maximum_rank


class PrunedConstant(NamedTuple):
    """A constant that lost channels along an axis."""

    #: Name before; a constant that several nodes read may occur for each.
    name: str
    #: Name in the compressed model.
    result: str
    #: Axis of the channels.
    axis: int
    #: Indices that stay, rising.
    kept: tuple[int, ...]


class CompressionStats(NamedTuple):
    """What compression did; ``str`` gives a table."""

    #: Every layer, in the order in which they ran before.
    layers: tuple[CompressedLayer, ...]
    #: Multiply-accumulates before and after.
    macs: tuple[int, int]
    #: Elements of weights before and after.
    parameters: tuple[int, int]
    #: Layers that cannot be split or pruned, and why.
    refusals: dict[str, str]
    #: Constants that lost channels, and which of them stay: an entry for each axis.
    constants: tuple[PrunedConstant, ...] = ()

    @property
    def mac_ratio(self) -> float:
        """Multiply-accumulates after over before."""
        return self.macs[1] / self.macs[0] if self.macs[0] else 1.0

    @property
    def memory_ratio(self) -> float:
        """Weights after over before."""
        return self.parameters[1] / self.parameters[0] if self.parameters[0] else 1.0

    def __str__(self) -> str:
        lines = [f"macs {self.mac_ratio:.6f}, memory {self.memory_ratio:.6f} of before"]
        width = max((len(layer.name) for layer in self.layers), default=0)
        for layer in self.layers:
            rank = "-" if layer.rank is None else f"{layer.rank}/{layer.maximum_rank}"
            ratio = layer.macs[1] / layer.macs[0] if layer.macs[0] else 1.0
            what = "keeps" if self.constants else "rank"
            line = f"{layer.name:{width}}  {what} {rank:>9}  macs {ratio:.4f}"
            if layer.noise is not None:
                line += f"  noise {layer.noise[1]:.2e} (plain {layer.noise[0]:.2e})"
            lines.append(line)
        return "\n".join(lines)


class ModelCompressor:
    """Compresses a network, as often as wanted; the model it was made of stays as it is.

    Parameters
    ----------
    model : Model
        A trained network.
    scheme : {"spatial_svd", "weight_svd", "channel_pruning"}
        A vertical and a horizontal kernel instead of each kernel, a 1×1 layer to fewer channels
        before each layer (and two products instead of one), or fewer output channels of layers: a
        layer's ratio is then the share of its channels that stays, and sizes are their number.
    cost_metric : {"mac", "memory"}
        What ratios speak of: compressed cost over original cost.
    multiplicity : int
        Ranks and numbers of channels are rounded up to multiples of this.
    layers_to_ignore : iterable of str
        Layers that stay as they are, by node name, weight, or weight without ``.weight``.
    input_shapes : mapping of str to tuple of int
        Shapes of inputs whose extents are open; an open first extent counts as 1.
    data : array, mapping of str to array, or iterable of these, optional
        Unlabeled inputs (copied; a few hundred samples are plenty). With them, each layer's factors
        minimize the error of its output behind the layers that were split before it, the bias takes
        the means, and `select` goes by what ranks do to the layers' outputs. Factors that are best
        for the weight alone stay where they do better on rows that were held out.
    importance : {"reconstruction", "magnitude"}
        Which channels go first in channel pruning: those that the layers reading them miss least
        once the other channels make up for them, or those that are read with the smallest squared
        weights. The first needs data.
    reconstruct : bool
        Whether channel pruning fits the layers that lose inputs to the channels that are left,
        which needs data. New weights that do no better on rows that were held out are not kept.
    input_keepers : iterable of str
        Layers that keep all channels that they read, named as `layers_to_ignore`; AIMET's modules
        to ignore are such. Only for channel pruning.
    keeps_positions : bool
        Whether channels stay that Split, Slice and Gather pick by position: for networks that are
        described in a program of which nothing but weights can be changed.

    Raises
    ------
    InvalidArgumentError, UnknownNameError, UnsupportedOperatorError, and for data
    EmptyStatisticsError, NonFiniteValueError, ShapeMismatchError

    References
    ----------
    Jaderberg et al., "Speeding up Convolutional Neural Networks with Low Rank Expansions", 2014.
    arXiv:1405.3866
    Zhang et al., "Accelerating Very Deep Convolutional Networks for Classification and Detection",
    2015. arXiv:1505.06798
    He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", 2017. arXiv:1707.06168

    Examples
    --------
    >>> import halfstep
    >>> model = halfstep.Model.load("net.onnx")
    >>> compressor = halfstep.ModelCompressor(model, scheme="weight_svd")
    >>> smaller, stats = compressor.compress({"conv2": 0.5})
    >>> stats.mac_ratio < 1
    True
    """

    __slots__ = ("_handle", "layers")

    def __init__(
        self,
        model: Model,
        scheme: Literal["spatial_svd", "weight_svd", "channel_pruning"] = "spatial_svd",
        *,
        cost_metric: Literal["mac", "memory"] = "mac",
        multiplicity: int = 1,
        layers_to_ignore: Iterable[str] = (),
        input_shapes: Mapping[str, tuple[int, ...]] | None = None,
        data: Any = None,
        importance: Literal["reconstruction", "magnitude"] = "reconstruction",
        reconstruct: bool = True,
        input_keepers: Iterable[str] = (),
        keeps_positions: bool = False,
    ) -> None:
        from .errors import InvalidArgumentError

        if scheme not in _SCHEMES:
            raise InvalidArgumentError(f"scheme: expected one of {list(_SCHEMES)}, got {scheme!r}")
        if cost_metric not in _METRICS:
            raise InvalidArgumentError(
                f"cost_metric: expected one of {list(_METRICS)}, got {cost_metric!r}"
            )
        if importance not in _IMPORTANCES:
            raise InvalidArgumentError(
                f"importance: expected one of {list(_IMPORTANCES)}, got {importance!r}"
            )
        if multiplicity < 1:
            raise InvalidArgumentError(f"multiplicity: expected 1 or more, got {multiplicity}")
        shapes = {} if input_shapes is None else dict(input_shapes)
        self._handle = _core.compressor_create(
            model._handle,
            _SCHEMES[scheme],
            _METRICS[cost_metric],
            multiplicity,
            tuple(layers_to_ignore),
            tuple(shapes),
            tuple(tuple(int(extent) for extent in shape) for shape in shapes.values()),
            _IMPORTANCES[importance],
            reconstruct,
            tuple(input_keepers),
            keeps_positions,
        )
        weights = [cost[2] for cost in self._handle.costs()]
        #: Layers that can be split or pruned, in the order in which they run.
        self.layers = tuple(
            CompressibleLayer(
                *layer,
                *(tuple(weights[i] for i in self._handle.members(index, role)) for role in (0, 1)),
            )
            for index, layer in enumerate(self._handle.layers())
        )
        if data is not None:
            from .rounding import _joined

            self._handle.calibrate(_joined(data, model.inputs))

    @property
    def costs(self) -> tuple[LayerCost, ...]:
        """Costs of every convolution and matrix product, in the order in which they run."""
        return tuple(LayerCost(*cost) for cost in self._handle.costs())

    @property
    def refusals(self) -> dict[str, str]:
        """Layers that cannot be split or pruned, and why."""
        return dict(self._handle.refusals())

    def read_by(self, layer: str) -> tuple[str, ...]:
        """Return the weights, as in `layers`, of what a layer reads.

        AIMET gives ratios of channel pruning to layers that read the channels, this package to
        layers that write them. Where layers are split, it is the layer itself.

        Raises
        ------
        UnknownNameError
        UnsupportedOperatorError
            With the reason, if no channel that the layer reads can be pruned.
        """
        return tuple(self.layers[index].weight for index in self._handle.find_read(layer))

    def rank(self, layer: str, ratio: float) -> int:
        """Return the rank that a ratio means for a layer; 0 for 1 and more, which leave it."""
        return self._handle.units(self._handle.find(layer), ratio)

    def ratio(self, layer: str, rank: int) -> float:
        """Return the ratio that a rank of a layer amounts to.

        Raises
        ------
        UnknownNameError, UnsupportedOperatorError, InvalidArgumentError
        """
        return self._handle.ratio(self._handle.find(layer), rank)

    def _units(self, ratios: Mapping[str, float] | float) -> list[int]:
        if not isinstance(ratios, Mapping):
            return [self._handle.units(i, ratios) for i in range(len(self.layers))]
        units = [0] * len(self.layers)
        for name, ratio in ratios.items():
            index = self._handle.find(name)
            units[index] = self._handle.units(index, ratio)
        return units

    def _named(self, units: list[int]) -> dict[str, int]:
        return {layer.weight: rank for layer, rank in zip(self.layers, units, strict=True) if rank}

    def compress(
        self,
        ratios: Mapping[str, float] | float | None = None,
        *,
        ranks: Mapping[str, int] | None = None,
        progress: bool | Progress = False,
    ) -> tuple[Model, CompressionStats]:
        """Compress.

        Parameters
        ----------
        ratios : mapping of str to float, or float
            Cost wanted over original cost of each layer, or of all layers; in channel pruning the
            share of the layer's channels that stays. 1 and more leave a layer as it is.
        ranks : mapping of str to int
            Ranks of layers, or numbers of channels, instead of ratios, as from `select`.
        progress : bool or callable
            Whether to show a bar, or a callback that cancels by returning False.

        Returns
        -------
        (Model, CompressionStats)

        Raises
        ------
        InvalidArgumentError, UnknownNameError, UnsupportedOperatorError, NonFiniteValueError,
        CancelledError
        EmptyStatisticsError
            Without data, for channel pruning that needs some.
        """
        from .errors import InvalidArgumentError

        units = [0] * len(self.layers) if ratios is None else self._units(ratios)
        for name, rank in (ranks or {}).items():
            if rank < 1:
                raise InvalidArgumentError(f"rank of '{name}': expected 1 or more, got {rank}")
            units[self._handle.find(name)] = rank
        with Reporter(progress, "compressing", "‰") as report:
            handle, total, layers, constants = self._handle.compress(tuple(units), report)
        stats = CompressionStats(
            tuple(_compressed(layer) for layer in layers),
            (total[4], total[5]),
            (total[6], total[7]),
            self.refusals,
            tuple(PrunedConstant(*constant) for constant in constants),
        )
        return Model._wrap(handle), stats

    def select(self, target: float, *, progress: bool | Progress = False) -> dict[str, int]:
        """Choose ranks without evaluating the network.

        The sum of the layers' relative errors (see `error_curves`) is least among all choices
        within the target.

        Parameters
        ----------
        target : float
            Cost wanted over original cost, in (0, 1].
        progress : bool or callable
            Whether to show a bar, or a callback that cancels by returning False.

        Returns
        -------
        dict of str to int
            Ranks by weight, of the layers to split.

        Raises
        ------
        InvalidArgumentError
            If the target is out of range or cannot be reached.
        NonFiniteValueError, CancelledError
        """
        with Reporter(progress, "choosing ranks", "‰") as report:
            return self._named(self._handle.select(target, report))

    def error_curves(self, *, progress: bool | Progress = False) -> dict[str, tuple[float, ...]]:
        """The share of each layer that each rank loses when nothing else is compressed.

        Of the power of the layer's output around its mean with data, else of its squared weight. In
        channel pruning the sum over the layers that read the channels, so that it may exceed 1. The
        first call does the work; `select` counts as one.

        Parameters
        ----------
        progress : bool or callable
            Whether to show a bar, or a callback that cancels by returning False.

        Returns
        -------
        dict of str to tuple of float
            By weight the shares of ranks 0, 1, ..., falling from 1 to 0: up to the largest rank, or
            with data to the largest that does not cost more than the layer.

        Raises
        ------
        NonFiniteValueError, CancelledError
        """
        with Reporter(progress, "measuring layers", "‰") as report:
            return {
                layer.weight: tuple(self._handle.errors(index, report))
                for index, layer in enumerate(self.layers)
            }

    def ratio_curves(
        self, *, progress: bool | Progress = False
    ) -> dict[str, list[tuple[float, float]]]:
        """Return `error_curves` over ratios, by weight, for `compression_report.write_html`."""
        result: dict[str, list[tuple[float, float]]] = {}
        errors = self.error_curves(progress=progress)
        for index, layer in enumerate(self.layers):
            curve = errors[layer.weight]
            points = []
            for step in range(1, _CURVE_STEPS):
                rank = self._handle.units(index, step / _CURVE_STEPS)
                if rank < len(curve):
                    points.append((step / _CURVE_STEPS, curve[rank]))
            result[layer.weight] = points
        return result

    def evaluate(
        self,
        eval_callback: Callable[[Model], float],
        *,
        num_candidates: int = 10,
        pool: Any = None,
        path: str | os.PathLike[str] | None = None,
    ) -> dict[str, dict[float, float]]:
        """Score the network at every ratio of every layer, one layer at a time.

        Parameters
        ----------
        eval_callback : callable
            Gets a compressed model and returns its score; higher is better.
        num_candidates : int
            Ratios are ``1 / num_candidates`` to ``(num_candidates - 1) / num_candidates``.
        pool : Executor or Pool, optional
            Evaluates in parallel: an executor of `concurrent.futures`, or a pool of
            `multiprocessing` or `ray.util.multiprocessing`. Other processes need a callback that
            can be pickled.
        path : path, optional
            JSON file that gets the scores as they come; those it has already are not made again.

        Returns
        -------
        dict
            ``{weight: {ratio: score}}``, for `select_greedy`.

        Raises
        ------
        InvalidArgumentError
            With what to pass instead, for a pool that calls cannot be handed to.
        """
        from ._pool import check_pool, in_order

        check_pool(pool, eval_callback, "pool")
        scores = load_scores(path) if path is not None and os.path.exists(path) else {}
        ratios = [step / num_candidates for step in range(1, num_candidates)]
        missing = [
            (layer.weight, ratio)
            for layer in self.layers
            for ratio in ratios
            if ratio not in scores.setdefault(layer.weight, {})
        ]
        models = ((self.compress({weight: ratio})[0],) for weight, ratio in missing)
        with closing(in_order(pool, eval_callback, models, "pool")) as found:
            for index, ((weight, ratio), score) in enumerate(zip(missing, found, strict=True), 1):
                scores[weight][ratio] = float(score)
                if path is not None and (index == len(missing) or missing[index][0] != weight):
                    save_scores(scores, path)
        return {
            layer.weight: {ratio: scores[layer.weight][ratio] for ratio in ratios}
            for layer in self.layers
        }

    def select_greedy(
        self,
        target: float,
        scores: Mapping[str, Mapping[float, float]],
        *,
        use_monotonic_fit: bool = False,
    ) -> dict[str, int]:
        """Choose ranks from scores of networks in which one layer is compressed, as AIMET does.

        Parameters
        ----------
        target : float
            Cost wanted over original cost, in (0, 1]; met within 0.001 where scores allow it.
        scores : mapping
            From `evaluate`: the same ratios for every layer.
        use_monotonic_fit : bool
            Whether a rising polynomial of degree 7 replaces each layer's scores first.

        Returns
        -------
        dict of str to int
            Ranks by weight, of the layers to split.

        Raises
        ------
        InvalidArgumentError
        """
        from array import array

        from .errors import InvalidArgumentError

        ratios: list[float] | None = None
        flat = array("d")
        for layer in self.layers:
            curve = scores.get(layer.weight, scores.get(layer.name))
            if curve is None:
                raise InvalidArgumentError(f"scores: layer '{layer.name}' is missing")
            own = sorted(float(ratio) for ratio in curve)
            if ratios is None:
                ratios = own
            if own != ratios:
                raise InvalidArgumentError(f"scores: layer '{layer.name}' has ratios of its own")
            byratio = {float(ratio): float(score) for ratio, score in curve.items()}
            flat.extend(byratio[ratio] for ratio in ratios)
        return self._named(
            self._handle.select_greedy(target, array("d", ratios or [0.5]), flat, use_monotonic_fit)
        )


def _compressed(values: tuple[Any, ...]) -> CompressedLayer:
    """What the native module reports of a layer."""
    name, op, rank, maximum, a, b, c, d, weight, first, second, bias, plain, kept = values
    return CompressedLayer(
        name,
        op,
        rank or None,
        maximum,
        (a, b),
        (c, d),
        weight,
        (first, second) if second else None,
        bias or None,
        None if kept < 0 else (plain, kept),
    )


def save_scores(scores: Mapping[str, Mapping[float, float]], path: str | os.PathLike[str]) -> None:
    """Write scores as JSON; the file appears whole or not at all."""
    temporary = f"{os.fspath(path)}.part"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({name: {repr(k): v for k, v in c.items()} for name, c in scores.items()}, file)
    os.replace(temporary, path)


def load_scores(path: str | os.PathLike[str]) -> dict[str, dict[float, float]]:
    """Read scores that `save_scores` wrote."""
    with open(path, encoding="utf-8") as file:
        return {n: {float(k): v for k, v in c.items()} for n, c in json.load(file).items()}
