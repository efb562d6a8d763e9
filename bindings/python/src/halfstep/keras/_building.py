# SPDX-License-Identifier: Apache-2.0
# Makes the Keras model of a simulation: copied layers, quantizers between them.
"""Puts quantizers between a Keras model's layers, on their variables and inside of them."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import tree

from .. import simulation as engine
from . import _activations
from ._builder import Parameter
from ._inside import RUNNERS
from ._network import Network
from ._rebuild import Names, clone, copy_weights, rebuild
from .quantizer import QuantizedLayer, Quantizer, inside_name


def tensors_inside_folds(network: Network, options: dict[str, Any]) -> set[str]:
    """Return tensors that nothing quantizes once batch norms are folded into earlier layers.

    Between a layer and its batch norm, as the engine places quantizers in the folded graph.
    """
    model = network.bound()
    folds = [fold for fold in model.fold_batch_norms() if not fold.is_forward]
    if not folds:
        return set()
    # Ranges do not matter here: the quickest are good enough.
    options = options | {"quant_scheme": "min_max"}
    placed = {site.tensor for site in engine.QuantizationSimModel(model, **options).quantizers}
    norms = {fold.batch_norm for fold in folds}
    around = [node for node in network.builder.nodes if node.name in norms]
    return {name for node in around for name in (*node.inputs, *node.outputs)} - placed


class Building:
    """Copies a model's layers and puts the engine's quantizers where it has them.

    Parameters
    ----------
    model : keras.Model
        The model.
    network : Network
        Its graph.
    first : halfstep.QuantizationSimModel
        The engine's simulation of it.
    off : set of str
        Tensors whose quantizers are off from the start.

    Attributes
    ----------
    model : keras.Model
        The model with quantizers.
    sites : dict
        The engine's quantizers by tensor.
    quantizers : dict of str to Quantizer
        Quantizers by tensor; tensors on one grid have the same.
    used : set of str
        Tensors that are quantized somewhere in the model.
    groups : dict of str to array
        The channel that a scale of a variable belongs to, in the variable's layout.
    copies, sources : dict
        The copy of each layer, and the layer itself, by the layer's identity.
    owners : dict of str to str
        The label of the call that gives a tensor.
    """

    def __init__(
        self,
        model: keras.Model,
        network: Network,
        first: engine.QuantizationSimModel,
        off: set[str],
    ) -> None:
        self.network, self._first, self._off = network, first, off
        self.sites = {site.tensor: site for site in first.quantizers}
        self.quantizers: dict[str, Quantizer] = {}
        self.used: set[str] = set()
        self.groups: dict[str, np.ndarray] = {}
        self.copies: dict[int, Any] = {}
        self.sources: dict[int, Any] = {}
        self.owners: dict[str, str] = {}
        self._ties: dict[str, Quantizer] = {}
        self._names = Names()
        self._wrapped: dict[int, Any] = {}
        #: Labels of the calls of each layer.
        self._calls: dict[int, list[str]] = {}
        for label, operation in network.layers.items():
            self._calls.setdefault(id(operation), []).append(label)
        self.model = self._build(model)

    def _quantizer(self, tensor: str, groups: Any = None, shape: Any = ()) -> Quantizer | None:
        """Return the quantizer of a tensor, which tensors on one grid share."""
        site = self.sites.get(tensor)
        if site is None:
            return None
        self.used.add(tensor)
        if tensor in self.quantizers:
            return self.quantizers[tensor]
        is_off = tensor in self._off
        known = None if is_off else self._ties.get(site.tied_to)
        if known is None:
            signed, strict = self._kind(tensor)
            known = Quantizer(
                tensor,
                site.bits,
                signed,
                site.is_symmetric,
                strict,
                shape,
                site.is_enabled and not is_off,
                name=tensor.replace("/", "_").replace(":", "_") + "_quantizer",
            )
            if groups is not None:
                self.groups[tensor] = groups
            if not is_off:
                self._ties[site.tied_to] = known
        self.quantizers[tensor] = known
        return known

    def _kind(self, tensor: str) -> tuple[bool, bool]:
        site = self.sites[tensor]
        if site.has_encoding:
            grid = self._first.encoding(tensor)
            return grid.is_signed, grid.is_strict
        # The grid of a computed tensor is known once there is data; this is corrected then.
        return site.is_symmetric, False

    def _put(self, tensor: str | None, x: Any) -> Any:
        quantizer = None if tensor is None else self._quantizer(tensor)
        return x if quantizer is None else quantizer(x)

    def _build(self, model: keras.Model) -> keras.Model:
        network = self.network
        owners = self.owners
        for label, value in network.values.items():
            for name in (value.first, value.last):
                if name is not None:
                    owners.setdefault(name, label)
        for node in reversed(network.builder.nodes):
            # What is only moved on may be rounded after the move.
            if node.op in ("Flatten", "Reshape", "Slice", "Squeeze", "Transpose"):
                if node.label and node.outputs[0] in owners:
                    owners.setdefault(node.inputs[0], owners[node.outputs[0]])
        tensors: dict[str, list[str]] = {}
        for name in self.sites:
            if name in owners:
                tensors.setdefault(owners[name], []).append(name)
        pending = set(network.inputs)

        def put(label: str, x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return [put(f"{label}#{i}" if i else label, one) for i, one in enumerate(x)]
            for name in tensors.get(label, ()):
                x = self._put(name, x)
            return x

        def entered(x: Any) -> Any:
            source = getattr(x, "_keras_history", None)
            name = source.operation.name if source is not None else None
            if name not in pending or not isinstance(source.operation, keras.layers.InputLayer):
                return x
            if name not in inputs:
                inputs[name] = put(name, x)
            return inputs[name]

        inputs: dict[str, Any] = {}

        def call(operation: Any, label: str, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = tree.map_structure(
                lambda x: entered(x) if isinstance(x, keras.KerasTensor) else x, (args, kwargs)
            )
            if not isinstance(operation, keras.layers.Layer):
                return put(label, clone(operation)(*args, **kwargs))
            kind = _activations.name_of(getattr(operation, "activation", None))
            inner = [f"{label}/{part}" for part in ("linear", "sigmoid")]
            # A shared layer ends with its activation in all of its calls, or in none.
            split = any(
                name in self.sites and self.sites[name].is_enabled
                for one in self._calls[id(operation)]
                for name in (f"{one}/linear", f"{one}/sigmoid")
            )
            result = self._layer(operation, label, args, kwargs, split)
            if not split:
                return put(label, result)
            if kind not in ("linear", "silu", "swish"):
                result = self._put(inner[0], result)
                name = self._free(f"{operation.name}_{kind}")
                layer = keras.layers.Activation(kind, name=name)
                inside = self._inside(layer, label)
                layer = QuantizedLayer(layer, {}, inside, name=name) if inside else layer
                return put(label, layer(result))
            if kind != "linear":
                result = self._put(inner[0], result)
                gate = keras.layers.Activation("sigmoid", name=self._free(f"{operation.name}_gate"))
                product = keras.layers.Multiply(name=self._free(f"{operation.name}_product"))
                result = product([result, self._put(inner[1], gate(result))])
            return put(label, result)

        result = rebuild(model, call)
        for key, target in self.copies.items():
            copy_weights(self.sources[key], target)
        return result

    def _free(self, name: str) -> str:
        class _Named:
            pass

        named = _Named()
        named.name = name  # type: ignore[attr-defined]
        return self._names.take(named, name)

    def _layer(self, operation: Any, label: str, args: Any, kwargs: Any, split: bool) -> Any:
        key = id(operation)
        if key not in self._wrapped:
            name = self._names.take(operation, operation.name)
            if split and isinstance(operation, keras.layers.Activation):
                layer = clone(operation, name, activation="linear")
            else:
                layer = clone(operation, name, **({"activation": "linear"} if split else {}))
            self.copies[key], self.sources[key] = layer, operation
            quantizers = self._of_variables(operation)
            inner = {
                inside_name(suffix, at): quantizer
                for at, one in enumerate(self._calls[key])
                for suffix, quantizer in self._inside(operation, one).items()
            }
            if quantizers or inner:
                if operation.built and not layer.built:
                    layer.build_from_config(operation.get_build_config())
                self._wrapped[key] = QuantizedLayer(layer, quantizers, inner, name=name)
            else:
                self._wrapped[key] = layer
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        wrapped, at = self._wrapped[key], self._calls[key].index(label)
        # Tensors inside have quantizers of their own for each call.
        if at and isinstance(wrapped, QuantizedLayer) and wrapped.inner_quantizers:
            kwargs["at"] = at
        return wrapped(*args, **kwargs)

    def _inside(self, operation: Any, label: str) -> dict[str, Quantizer]:
        """Return the quantizers of tensors inside a layer by the suffix of their names."""
        found: dict[str, Quantizer] = {}
        if type(operation).__name__ not in RUNNERS:
            return found
        for name, site in self.sites.items():
            own = name.startswith(f"{label}/") and name not in self.owners
            if not own or name in self.network.parameters:
                continue
            suffix = name[len(label) + 1 :]
            if suffix in ("linear", "sigmoid") and hasattr(operation, "activation"):
                continue  # these lie in front of the activation, which becomes a layer of its own
            if site.has_encoding and self._first.encoding(name).granularity != "per_tensor":
                continue
            quantizer = self._quantizer(name)
            if quantizer is not None:
                found[suffix] = quantizer
        return found

    def _of_variables(self, operation: Any) -> dict[str, Quantizer]:
        found: dict[str, Quantizer] = {}
        for position, variable in enumerate(operation.weights):
            for name, parameter in self.network.parameters.items():
                if parameter.variable is not variable or name not in self.sites:
                    continue
                grid = self._first.encoding(name) if self.sites[name].has_encoding else None
                if grid is None or grid.granularity == "per_tensor":
                    quantizer = self._quantizer(name)
                elif grid.granularity == "per_channel":
                    groups, shape = _groups(parameter, grid.axis)
                    quantizer = self._quantizer(name, groups, shape)
                else:
                    continue
                if quantizer is not None:
                    found[str(position)] = quantizer
        return found


def _groups(parameter: Parameter, axis: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return, in the variable's layout, the channel that shares a scale, and the ranges' shape."""
    shape = [1] * len(parameter.shape)
    shape[axis] = parameter.shape[axis]
    index = np.broadcast_to(np.arange(parameter.shape[axis]).reshape(shape), parameter.shape)
    index = parameter.value(index)
    for one in range(index.ndim):
        start = np.take(index, [0], one)
        if (index == start).all():
            index = start
    return index, index.shape
