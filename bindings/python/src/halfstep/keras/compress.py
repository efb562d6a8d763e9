# SPDX-License-Identifier: Apache-2.0
# Compression of Keras models.
"""Smaller Keras models by SVD and channel pruning, under AIMET's names."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import tree

from .. import _compress as flow
from .._compress_parameters import ChannelPruningParameters, CompressionStats
from .._pool import check_pool
from ..compression import CompressionStats as EngineStats
from ..errors import InvalidArgumentError, UnknownNameError
from ..model import Model
from ._network import Network
from ._pruned import pruned
from ._rebuild import Names, clone, copy_weights, rebuild
from ._walk import functional
from .rounding import _arrays

_CONVOLUTIONS = ("Conv1D", "Conv2D", "Conv3D")
#: Layers that channel pruning can change besides.
_PRUNABLE = (
    *("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose", "DepthwiseConv1D"),
    *("DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D"),
)


class ModelCompressor:
    """Makes Keras models smaller."""

    @staticmethod
    def compress_model(
        model: keras.Model,
        eval_callback: Callable[[keras.Model, Any, bool], float],
        eval_iterations: Any,
        input_shape: Any = None,
        compress_scheme: Any = "spatial_svd",
        cost_metric: Any = "mac",
        parameters: Any = None,
        trainer: Any = None,
        visualization_url: str | None = None,
        *,
        data: Any = None,
        executor: Any = None,
        report: str | os.PathLike[str] | None = None,
        progress: Any = False,
    ) -> tuple[keras.Model, CompressionStats]:
        """Compress a model.

        The engine decides ranks and computes weights; a layer that is split becomes two, named
        after it with ``_0`` and ``_1`` behind, and layers that lose channels keep their names. The
        result is an ordinary model, not compiled.

        Parameters
        ----------
        model : keras.Model
            A functional or sequential model, built; it is not changed.
        eval_callback : callable
            Gets a model, the number of iterations and False; returns its score, higher is better.
        eval_iterations : int or None
            What `eval_callback` gets for networks of which one layer is compressed; it gets None
            for the network itself, before and after.
        input_shape : tuple, optional
            Not used: a model knows its own.
        compress_scheme : CompressionScheme
            Spatial SVD, weight SVD or channel pruning.
        cost_metric : CostMetric
            What ratios speak of.
        parameters : SpatialSvdParameters, WeightSvdParameters or ChannelPruningParameters
            Ratios of layers, or how they are chosen; layers, or their names.
        trainer : object, optional
            Its ``train_model(model, layer, train_flag=True)`` is called after each layer that was
            split or whose inputs were pruned, with a layer that has ``name`` and ``module``, the
            two layers or the one; and once before, with ``train_flag=False``.
        visualization_url : str, optional
            Not used: see `report`.
        data : array, dict of arrays, or iterable of batches, optional
            Unlabeled inputs, ``[N, ...]``; of a tuple, such as a dataset's, the first item counts.
            Layers are then split for what they are used for, and may get a bias.
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
        (keras.Model, CompressionStats)

        Raises
        ------
        UnsupportedOperatorError, InvalidArgumentError, UnknownNameError, NonFiniteValueError,
        EmptyStatisticsError, MalformedFileError, CancelledError

        Examples
        --------
        >>> net = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(8, 3, name="conv")])
        >>> pairs = [ModuleCompRatioPair("conv", 0.5)]
        >>> parameters = SpatialSvdParameters(
        ...     SpatialSvdParameters.Mode.manual, SpatialSvdParameters.ManualModeParams(pairs)
        ... )
        >>> small, stats = ModelCompressor.compress_model(
        ...     net, lambda model, iterations, use_cuda: 1.0, 1, None,
        ...     CompressionScheme.spatial_svd, CostMetric.mac, parameters
        ... )
        >>> [layer.kernel_size for layer in small.layers[1:]]
        [(3, 1), (1, 3)]
        """
        scheme = flow.scheme_of(
            compress_scheme, ("weight_svd", "spatial_svd", "channel_pruning"), "compress_scheme"
        )
        if (scheme == "channel_pruning") != isinstance(parameters, ChannelPruningParameters):
            raise InvalidArgumentError(
                f"parameters: got {type(parameters).__name__} for {scheme.replace('_', ' ')}"
            )
        metric = flow.scheme_of(cost_metric, ("mac", "memory"), "cost_metric")
        check_pool(executor, eval_callback, "executor")
        job = flow.Job(
            scheme,
            metric,
            parameters,
            lambda network, iterations: float(eval_callback(network, iterations, False)),
            (functools.partial(eval_callback), (False,)),
            eval_iterations,
            trainer,
            data,
            executor,
            progress,
        )
        result, stats = flow.compress(lambda network: _Backend(network, scheme), model, job)
        if report is not None:
            stats.write_html(report)
        return result, stats


class _Backend:
    """A Keras model as compression sees it."""

    def __init__(self, model: keras.Model, scheme: str) -> None:
        self.model = model
        self.scheme = scheme
        self.network = Network(model)
        self.engine: Model = self.network.bound()
        self.layers: dict[str, str] = {}
        self.refusals: dict[str, str] = {}
        self.fixed: dict[str, str] = {}
        known = (*_CONVOLUTIONS, "Dense")
        operators: tuple[str, ...] = ("Conv", "Gemm", "MatMul")
        if scheme == "channel_pruning":
            known += _PRUNABLE
            operators += ("ConvTranspose",)
        calls = Counter(id(operation) for operation in self.network.layers.values())
        for node in self.network.builder.nodes:
            if node.op not in operators or len(node.inputs) < 2:
                continue
            weight = node.inputs[1]
            if weight not in self.network.parameters:
                continue
            layer = self.network.layers[node.label]
            kind = type(layer).__name__
            if kind not in known:
                self.refusals[weight] = f"layer '{node.label}' is a {kind}"
            elif calls[id(layer)] != 1:
                times = calls[id(layer)]
                self.refusals[weight] = f"layer '{node.label}' is called {times} times"
            else:
                self.layers[weight] = node.label

    def name_of(self, module: Any) -> str:
        for label, layer in self.network.layers.items():
            if layer is module or (isinstance(module, str) and module in (label, layer.name)):
                return label
        what = module if isinstance(module, str) else getattr(module, "name", module)
        raise UnknownNameError(f"the model has no layer '{what}'")

    def module(self, model: keras.Model, name: str) -> Any:
        stem = name.rpartition("/")[2]
        if self.scheme == "channel_pruning":
            return model.get_layer(stem)
        return model.get_layer(f"{stem}_0"), model.get_layer(f"{stem}_1")

    def inputs(self, data: Any) -> dict[str, Any]:
        return _arrays(self.network, data)

    def example(self) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        result = {}
        for name, shape, dtype in self.network.builder.inputs:
            # Open extents but the batch are as long as whatever pools or pads there can do with.
            extents = [1 if axis == 0 else n or 64 for axis, n in enumerate(shape)]
            is_float = np.issubdtype(np.dtype(dtype), np.floating)
            result[name] = (
                rng.standard_normal(extents, np.float32) if is_float else np.ones(extents, dtype)
            )
        return result

    def outputs(self, model: keras.Model, inputs: dict[str, Any]) -> list[Any]:
        values = [inputs[name] for name in self.network.inputs]
        structure = functional(model)._inputs_struct
        results = model(tree.pack_sequence_as(structure, values), training=False)
        return [np.asarray(value) for value in tree.flatten(results)]

    def swapped(self, smaller: Model, stats: EngineStats | None) -> keras.Model:
        if stats is not None and self.scheme == "channel_pruning":
            return pruned(self.model, self.network, self.layers, smaller, stats)
        layers = () if stats is None else stats.layers
        chosen = {self.layers[one.weight]: one for one in layers if one.pair is not None}
        values = smaller.initializers if chosen else {}
        names = Names()
        made: dict[int, Any] = {}

        def call(operation: Any, label: str, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(operation, keras.layers.Layer):
                return clone(operation)(*args, **kwargs)
            one = chosen.get(label)
            if one is None:
                layer = made.get(id(operation))
                if layer is not None:
                    return layer(*args, **kwargs)
                made[id(operation)] = layer = clone(operation, names.take(operation, label))
                result = layer(*args, **kwargs)
                copy_weights(operation, layer)
                return result
            assert one.pair is not None
            arrays = [values[name] for name in one.pair]
            bias = None if one.bias is None else values[one.bias]
            stem = names.take(operation, label)
            first, second = _pair(operation, stem, arrays, bias, self.scheme == "spatial_svd")
            result = second(first(*args), **kwargs)
            if type(operation).__name__ != "Dense":
                # From [outputs, inputs, kernel] to [kernel, inputs, outputs].
                arrays = [np.moveaxis(array, (0, 1), (-1, -2)) for array in arrays]
            first.set_weights([arrays[0]])
            second.set_weights([arrays[1]] if bias is None else [arrays[1], bias.reshape(-1)])
            return result

        return rebuild(self.model, call)


def _pair(
    old: Any, stem: str, arrays: list[np.ndarray], bias: Any, is_spatial: bool
) -> tuple[Any, Any]:
    """Two layers, not built yet: each axis belongs to the one that has its kernel extent."""
    plain = {
        "use_bias": False,
        "activation": "linear",
        "activity_regularizer": None,
        "bias_regularizer": None,
        "bias_constraint": None,
    }
    names = (f"{stem}_0", f"{stem}_1")
    if type(old).__name__ == "Dense":
        first = clone(old, names[0], units=arrays[0].shape[1], **plain)
        return first, clone(old, names[1], use_bias=bias is not None)
    axes = range(old.rank)

    def settings(is_first: bool) -> dict[str, Any]:
        def pick(given: Any) -> tuple[int, ...]:
            return tuple(
                value if (is_spatial and axis == 0) == is_first else 1
                for axis, value in zip(axes, given, strict=True)
            )

        return {
            "kernel_size": tuple(arrays[0 if is_first else 1].shape[2:]),
            "strides": pick(old.strides),
            "dilation_rate": pick(old.dilation_rate),
        }

    # What is in front of a causal kernel belongs to that kernel.
    padding = "valid" if old.padding == "causal" else old.padding
    first = clone(
        old, names[0], filters=arrays[0].shape[0], padding=padding, **settings(True), **plain
    )
    return first, clone(old, names[1], use_bias=bias is not None, **settings(False))
