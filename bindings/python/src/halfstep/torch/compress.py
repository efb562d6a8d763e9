# SPDX-License-Identifier: Apache-2.0
# Compression of live PyTorch modules.
"""Smaller modules by SVD and channel pruning, under AIMET's names."""

from __future__ import annotations

import copy
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from .. import _compress as flow
from .._compress_parameters import ChannelPruningParameters, CompressionStats
from .._pool import check_pool
from ..compression import CompressionStats as EngineStats
from ..errors import (
    EmptyStatisticsError,
    InvalidArgumentError,
    InvalidStateError,
    UnknownNameError,
)
from ..model import Model
from ._network import Network, as_array, bound, nodes
from ._pruned import parameter, pruned
from ._skeleton import skeleton
from ._trace import evaluating
from .folding import _dummy, _replace
from .quantizer import Quantizer

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class ModelCompressor:
    """Makes live modules smaller."""

    @staticmethod
    def compress_model(
        model: nn.Module,
        eval_callback: Callable[[nn.Module, Any, bool], float],
        eval_iterations: Any,
        input_shape: Any,
        compress_scheme: Any,
        cost_metric: Any,
        parameters: Any,
        trainer: Any = None,
        visualization_url: str | None = None,
        *,
        data: Any = None,
        executor: Any = None,
        report: str | os.PathLike[str] | None = None,
        progress: Any = False,
    ) -> tuple[nn.Module, CompressionStats]:
        """Compress a module.

        The engine decides ranks and computes weights; each layer that is split becomes a
        `torch.nn.Sequential` of two, under its name, and layers that lose channels stay what they
        are, with smaller parameters. The result is an ordinary module.

        Parameters
        ----------
        model : torch.nn.Module
            The network, on the CPU or another device; it stays as it is.
        eval_callback : callable
            Gets a module in evaluation mode, the number of iterations and whether it is on a GPU;
            returns its score, higher is better.
        eval_iterations : int or None
            What `eval_callback` gets for networks of which one layer is compressed; it gets None
            for the network itself, before and after.
        input_shape : tuple, or torch.Tensor
            Shape of the input, batch included, or a list of shapes; or a dummy input.
        compress_scheme : CompressionScheme
            Spatial SVD, weight SVD or channel pruning.
        cost_metric : CostMetric
            What ratios speak of.
        parameters : SpatialSvdParameters, WeightSvdParameters or ChannelPruningParameters
            Ratios of layers, or how they are chosen.
        trainer : object, optional
            Its ``train_model(model, layer, train_flag=True)`` is called after each layer that was
            split or whose inputs were pruned, with a layer that has ``name`` and ``module``; and
            once before, with ``train_flag=False``.
        visualization_url : str, optional
            Not used: see `report`.
        data : torch.Tensor, or iterable of batches, optional
            Unlabeled inputs, ``[N, ...]``; of a tuple, such as a data loader's, the network's
            inputs come first. Layers are then split for what they are used for, behind the layers
            that were split before them, and a layer without bias may get one.
        executor : Executor or Pool, optional
            Evaluates in parallel: an executor of `concurrent.futures`, or a pool of
            `multiprocessing` or `ray.util.multiprocessing`. Other processes need a callback that
            can be pickled.
        report : path, optional
            Gets an HTML page: see `CompressionStats.write_html`.
        progress : bool or callable
            Whether to show bars, or a callback that cancels by returning False.

        Returns
        -------
        (torch.nn.Module, CompressionStats)

        Raises
        ------
        UntraceableModelError, UnsupportedOperatorError, InvalidArgumentError, UnknownNameError,
        NonFiniteValueError, EmptyStatisticsError, MalformedFileError, CancelledError

        Examples
        --------
        >>> import torch
        >>> from halfstep.torch import (
        ...     CompressionScheme, CostMetric, ModuleCompRatioPair, SpatialSvdParameters
        ... )
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> pairs = [ModuleCompRatioPair(net[0], 0.5)]
        >>> parameters = SpatialSvdParameters(
        ...     SpatialSvdParameters.Mode.manual, SpatialSvdParameters.ManualModeParams(pairs)
        ... )
        >>> small, stats = ModelCompressor.compress_model(
        ...     net, lambda model, iterations, use_cuda: 1.0, 1, (1, 3, 8, 8),
        ...     CompressionScheme.spatial_svd, CostMetric.mac, parameters
        ... )
        >>> [tuple(part.kernel_size) for part in small[0]], stats.mac_compression_ratio
        ([(3, 1), (1, 3)], '0.458333')
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if any(isinstance(part, Quantizer) for part in model.modules()):
            raise InvalidStateError("the model has quantizers: compress the original")
        scheme = flow.scheme_of(
            compress_scheme, ("weight_svd", "spatial_svd", "channel_pruning"), "compress_scheme"
        )
        if (scheme == "channel_pruning") != isinstance(parameters, ChannelPruningParameters):
            raise InvalidArgumentError(
                f"parameters: got {type(parameters).__name__} for {scheme.replace('_', ' ')}"
            )
        metric = flow.scheme_of(cost_metric, ("mac", "memory"), "cost_metric")
        check_pool(executor, eval_callback, "executor")
        cuda = any(tensor.is_cuda for tensor in model.parameters())

        def score(network: nn.Module, iterations: Any) -> float:
            with evaluating(network):
                return float(eval_callback(network, iterations, cuda))

        job = flow.Job(
            scheme,
            metric,
            parameters,
            score,
            (functools.partial(_evaluate, eval_callback), (cuda,)),
            eval_iterations,
            trainer,
            data,
            executor,
            progress,
        )
        dummy = _dummy(model, input_shape, None)
        takes_layers = data is None and scheme != "channel_pruning"
        result, stats = flow.compress(
            lambda network: _Backend(network, dummy, scheme, takes_layers), model, job
        )
        if report is not None:
            stats.write_html(report)
        return result, stats


def _evaluate(callback: Callable[..., float], model: nn.Module, iterations: Any, cuda: bool) -> Any:
    """Score a copy, perhaps in another process."""
    return callback(model.eval(), iterations, cuda)


class _Backend:
    """A live module as compression sees it."""

    def __init__(self, model: nn.Module, dummy: Any, scheme: str, takes_layers: bool) -> None:
        self.model = model
        self.scheme = scheme
        # Layers that are split for their weights alone need no network around them.
        part = skeleton(model, dummy) if takes_layers else None
        if part is not None:
            self.engine: Model = bound(part.data, part.parameters, model)
            state, calls = part.state, part.calls
        else:
            self.network = Network(model, dummy)
            self.engine = self.network.bound(model)
            state = self.network.exported.state
            every = nodes(self.network.exported.data).values()
            calls = Counter(name for node in every for name in node.inputs)
        self.layers: dict[str, str] = {}
        self.refusals: dict[str, str] = {}
        self.fixed: dict[str, str] = {}
        known: tuple[type, ...] = (*_CONVOLUTIONS, nn.Linear)
        if scheme == "channel_pruning":
            known += _TRANSPOSED
        for weight in state:
            name, _, key = weight.rpartition(".")
            if key != "weight":
                continue
            module = model.get_submodule(name)
            kind = type(module)
            if kind not in known:
                self.refusals[weight] = f"layer '{name}' is a {kind.__name__}"
            elif calls[weight] != 1:
                times = calls[weight]
                self.refusals[weight] = f"layer '{name}' is called {times} times with one weight"
            elif nn.utils.parametrize.is_parametrized(module):
                self.refusals[weight] = f"layer '{name}' is parametrized"
            else:
                self.layers[weight] = name

    def name_of(self, module: Any) -> str:
        for name, part in self.model.named_modules():
            if part is module or (isinstance(module, str) and name == module):
                return name
        what = module if isinstance(module, str) else type(module).__name__
        raise UnknownNameError(f"the model has no layer '{what}' that was given")

    def module(self, model: nn.Module, name: str) -> nn.Module:
        return model.get_submodule(name)

    def inputs(self, data: Any) -> dict[str, Any]:
        names = self.network.exported.inputs
        single = isinstance(data, (torch.Tensor, np.ndarray, dict))
        batches = [data] if single else list(data)
        if not batches:
            raise EmptyStatisticsError("data: no batches")
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for batch in batches:
            if isinstance(batch, (torch.Tensor, np.ndarray)):
                batch = (batch,)
            values = list(batch.values() if isinstance(batch, dict) else batch)
            if len(values) < len(names):
                raise InvalidArgumentError(
                    f"data: expected {len(names)} inputs a batch, got {len(values)}"
                )
            for name, value in zip(names, values, strict=False):
                value = value if isinstance(value, torch.Tensor) else torch.from_numpy(value)
                parts[name].append(as_array(value))
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}

    def example(self) -> dict[str, Any]:
        names, (args, kwargs) = self.network.exported.inputs, self.network.example
        generator = torch.Generator().manual_seed(0)

        def random(value: torch.Tensor) -> torch.Tensor:
            if not value.is_floating_point():
                return value
            return torch.randn(value.shape, generator=generator, dtype=torch.float32)

        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        return {name: as_array(random(x)) for name, x in zip(names, leaves, strict=False)}

    def outputs(self, model: nn.Module, inputs: dict[str, Any]) -> list[Any]:
        like = next(model.parameters())
        values = iter(inputs.values())

        def filled(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            value = torch.from_numpy(next(values)).to(like.device)
            return value.to(like.dtype) if value.is_floating_point() else value

        args, kwargs = tree_map(filled, self.network.example)
        with evaluating(model), torch.no_grad():
            results = tree_leaves(model(*args, **kwargs))
        return [as_array(x) for x in results if isinstance(x, torch.Tensor)]

    def swapped(self, smaller: Model, stats: EngineStats | None) -> nn.Module:
        if stats is None:
            return copy.deepcopy(self.model)
        if self.scheme == "channel_pruning":
            return pruned(self.model, self.layers, smaller, stats)
        chosen = [layer for layer in stats.layers if layer.pair is not None]
        result = _copy_without(self.model, [self.layers[layer.weight] for layer in chosen])
        values = smaller.initializers if chosen else {}
        for layer in chosen:
            assert layer.pair is not None
            name = self.layers[layer.weight]
            old = result.get_submodule(name)
            first, second = (values[part] for part in layer.pair)
            bias = None if layer.bias is None else values[layer.bias]
            if isinstance(old, nn.Linear):
                pair = _linear_pair(old, first, second, bias)
            else:
                pair = _convolution_pair(old, first, second, bias, self.scheme == "spatial_svd")
            if name:
                _replace(result, name, pair)
            else:
                result = pair.train(result.training)
        return result


def _copy_without(model: nn.Module, layers: Iterable[str]) -> nn.Module:
    """Copy a module, but for weights that nobody else has of layers that are to be replaced."""
    owners = Counter(map(id, dict(model.named_parameters(remove_duplicate=False)).values()))
    weights = [model.get_submodule(name).weight for name in layers]
    return copy.deepcopy(model, {id(w): w for w in weights if owners[id(w)] == 1})


def _filled(
    old: Any, pair: tuple[Any, Any], first: np.ndarray, second: np.ndarray, bias: Any
) -> nn.Sequential:
    for part, value in zip(pair, (first, second), strict=True):
        part.weight = parameter(old.weight, value)
    if bias is not None:
        pair[1].bias = parameter(old.weight if old.bias is None else old.bias, bias)
    return nn.Sequential(*pair)


def _linear_pair(old: nn.Linear, first: np.ndarray, second: np.ndarray, bias: Any) -> nn.Sequential:
    rank = first.shape[0]
    with torch.device("meta"):
        pair = (
            nn.Linear(old.in_features, rank, bias=False),
            nn.Linear(rank, old.out_features, bias=bias is not None),
        )
    return _filled(old, pair, first, second, bias)


def _convolution_pair(
    old: Any, first: np.ndarray, second: np.ndarray, bias: Any, is_spatial: bool
) -> nn.Sequential:
    """A pair of convolutions: each axis belongs to the one that has its kernel extent."""
    axes = range(len(old.kernel_size))
    rank = first.shape[0]
    # Spatial SVD: rows first, then columns. Weight SVD leaves all axes to the second layer.
    of_first = [is_spatial and axis == 0 for axis in axes]

    def settings(is_first: bool) -> dict[str, Any]:
        own = [flag == is_first for flag in of_first]

        def pick(values: Any, other: int) -> tuple[int, ...]:
            return tuple(v if mine else other for v, mine in zip(values, own, strict=True))

        padding = old.padding
        if not isinstance(padding, str):
            padding = pick(padding, 0)
        return {
            "kernel_size": tuple((first if is_first else second).shape[2:]),
            "stride": pick(old.stride, 1),
            "dilation": pick(old.dilation, 1),
            "padding": padding,
            "padding_mode": old.padding_mode,
        }

    with torch.device("meta"):
        pair = (
            type(old)(old.in_channels, rank, bias=False, **settings(True)),
            type(old)(rank, old.out_channels, bias=bias is not None, **settings(False)),
        )
    return _filled(old, pair, first, second, bias)
