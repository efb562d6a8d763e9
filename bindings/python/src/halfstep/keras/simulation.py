# SPDX-License-Identifier: Apache-2.0
# The QuantizationSimModel class for Keras models.
"""Quantization simulation of a live Keras model."""

from __future__ import annotations

import json
import os
import pathlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras
import numpy as np
from keras import tree

from .. import simulation as engine
from .._faces import scheme_name
from ..errors import InvalidStateError, UnknownNameError
from ..quantizers import Encoding, LoadReport
from . import _activations
from ._builder import Parameter
from ._inside import RUNNERS
from ._network import Network
from ._rebuild import Names, clone, copy_weights, rebuild
from .quantizer import QuantizedLayer, Quantizer


class QuantizationSimModel:
    """A Keras model simulated on integer hardware, to be calibrated, trained and exported.

    The engine places the quantizers. `model` is a Keras model of the same layers, with quantizers
    between them and on their variables.

    Parameters
    ----------
    model : keras.Model
        A functional or sequential model, built; it is not changed. Fold its batch norms first.
    quant_scheme : str
        How ranges are chosen: ``"min_max"``, ``"tf_enhanced"`` (``"sqnr"``), ``"percentile"``,
        ``"mse"``, ``"entropy"``; AIMET's names are understood.
    default_output_bw, default_param_bw : int
        Width of computed tensors and of variables, 2 to 16 bits.
    config_file : str or path, optional
        A runtime configuration, built in by name or a JSON file; per channel by default.
    percentile : float
        For the scheme of that name, 50 to 100.

    Attributes
    ----------
    model : keras.Model
        The model with quantizers.

    Raises
    ------
    UnsupportedOperatorError
        Naming every layer that cannot be described to the engine, or a subclassed model.
    UnknownNameError, InvalidArgumentError, InvalidConfigurationError, NonFiniteValueError

    Examples
    --------
    >>> net = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, activation="relu")])
    >>> sim = QuantizationSimModel(net)
    >>> sim.compute_encodings(np.ones((4, 8), np.float32))
    >>> sim.model(np.ones((2, 8), np.float32)).shape
    TensorShape([2, 4])
    """

    def __init__(
        self,
        model: keras.Model,
        quant_scheme: Any = "min_max",
        default_output_bw: int = 8,
        default_param_bw: int = 8,
        config_file: str | os.PathLike[str] | None = None,
        *,
        percentile: float = 100.0,
    ) -> None:
        self._network = Network(model)
        self._options = {
            "param_bits": default_param_bw,
            "activation_bits": default_output_bw,
            "quant_scheme": scheme_name(quant_scheme),
            "config": config_file,
            "percentile": percentile,
        }
        self._arguments = {
            "quant_scheme": quant_scheme,
            "default_output_bw": default_output_bw,
            "default_param_bw": default_param_bw,
            "config_file": config_file,
            "percentile": percentile,
        }
        self._original = model
        first = engine.QuantizationSimModel(self._network.bound(), **self._options)
        self._sites = {site.tensor: site for site in first.quantizers}
        self._quantizers: dict[str, Quantizer] = {}
        self._ties: dict[str, Quantizer] = {}
        self._used: set[str] = set()
        self._groups: dict[str, np.ndarray] = {}
        self._names = Names()
        self._copies: dict[int, Any] = {}
        self._wrapped: dict[int, Any] = {}
        self._first = first
        self._off = self._inside_folds()
        self.model = self._build(model)
        del self._first
        copies = {
            id(before): after
            for key, target in self._copies.items()
            for before, after in zip(self._sources[key].weights, target.weights, strict=True)
        }
        self._parameters: dict[str, Parameter] = {
            name: parameter._replace(variable=copies[id(parameter.variable)])
            for name, parameter in self._network.parameters.items()
        }
        self._missing = tuple(
            name for name, site in self._sites.items() if name not in self._used and site.is_enabled
        )
        if self._missing:
            warnings.warn(
                f"{len(self._missing)} tensors inside layers stay unquantized: "
                + ", ".join(self._missing[:5]),
                stacklevel=2,
            )
        self._pull(self._engine(keeps_ranges=False), parameters_only=True)

    # ---------------------------------------------------------------------------------------------
    # Building

    def _inside_folds(self) -> set[str]:
        """Return tensors that nothing quantizes once batch norms are folded into earlier layers.

        Between a layer and its batch norm, as the engine places quantizers in the folded graph.
        """
        model = self._network.bound()
        folds = [fold for fold in model.fold_batch_norms() if not fold.is_forward]
        if not folds:
            return set()
        # Ranges do not matter here: the quickest are good enough.
        options = self._options | {"quant_scheme": "min_max"}
        placed = {site.tensor for site in engine.QuantizationSimModel(model, **options).quantizers}
        norms = {fold.batch_norm for fold in folds}
        around = [node for node in self._network.builder.nodes if node.name in norms]
        return {name for node in around for name in (*node.inputs, *node.outputs)} - placed

    def _quantizer(self, tensor: str, groups: Any = None, shape: Any = ()) -> Quantizer | None:
        """Return the quantizer of a tensor, which tensors on one grid share."""
        site = self._sites.get(tensor)
        if site is None:
            return None
        self._used.add(tensor)
        if tensor in self._quantizers:
            return self._quantizers[tensor]
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
                self._groups[tensor] = groups
            if not is_off:
                self._ties[site.tied_to] = known
        self._quantizers[tensor] = known
        return known

    def _kind(self, tensor: str) -> tuple[bool, bool]:
        site = self._sites[tensor]
        if site.has_encoding:
            grid = self._first.encoding(tensor)
            return grid.is_signed, grid.is_strict
        # The grid of a computed tensor is known once there is data; this is corrected then.
        return site.is_symmetric, False

    def _put(self, tensor: str | None, x: Any) -> Any:
        quantizer = None if tensor is None else self._quantizer(tensor)
        return x if quantizer is None else quantizer(x)

    def _build(self, model: keras.Model) -> keras.Model:
        network = self._network
        owners: dict[str, str] = {}
        for label, value in network.values.items():
            for name in (value.first, value.last):
                if name is not None:
                    owners.setdefault(name, label)
        for node in reversed(network.builder.nodes):
            # What is only moved on may be rounded after the move.
            if node.op in ("Flatten", "Reshape", "Slice", "Squeeze", "Transpose"):
                if node.label and node.outputs[0] in owners:
                    owners.setdefault(node.inputs[0], owners[node.outputs[0]])
        self._owners = owners
        tensors: dict[str, list[str]] = {}
        for name in self._sites:
            if name in owners:
                tensors.setdefault(owners[name], []).append(name)
        self._sources: dict[int, Any] = {}
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
            split = any(name in self._sites and self._sites[name].is_enabled for name in inner)
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
        for key, target in self._copies.items():
            copy_weights(self._sources[key], target)
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
            self._copies[key], self._sources[key] = layer, operation
            quantizers, inner = self._of_variables(operation), self._inside(operation, label)
            if quantizers or inner:
                if operation.built and not layer.built:
                    layer.build_from_config(operation.get_build_config())
                self._wrapped[key] = QuantizedLayer(layer, quantizers, inner, name=name)
            else:
                self._wrapped[key] = layer
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        return self._wrapped[key](*args, **kwargs)

    def _inside(self, operation: Any, label: str) -> dict[str, Quantizer]:
        """Return the quantizers of tensors inside a layer by the suffix of their names."""
        found: dict[str, Quantizer] = {}
        if type(operation).__name__ not in RUNNERS:
            return found
        for name, site in self._sites.items():
            own = name.startswith(f"{label}/") and name not in self._owners
            if not own or name in self._network.parameters:
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
            for name, parameter in self._network.parameters.items():
                if parameter.variable is not variable or name not in self._sites:
                    continue
                grid = self._first.encoding(name) if self._sites[name].has_encoding else None
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

    # ---------------------------------------------------------------------------------------------
    # Between the engine and the model

    def _engine(self, keeps_ranges: bool) -> engine.QuantizationSimModel:
        """Return an engine simulation of the present weights, with the present ranges if asked."""
        values = {name: parameter.constant() for name, parameter in self._parameters.items()}
        sim = engine.QuantizationSimModel(self._network.bound(values), **self._options)
        for name in self._missing:
            sim.set_enabled(name, False)
        done: set[int] = set()
        for name in self._used:
            quantizer, site = self._quantizers[name], self._sites[name]
            if keeps_ranges and quantizer.has_range and id(quantizer) not in done:
                done.add(id(quantizer))
                sim.set_encoding(name, self._encoding(quantizer, name))
            if quantizer.enabled != site.is_enabled:
                sim.set_enabled(name, quantizer.enabled)
        return sim

    def _encoding(self, quantizer: Quantizer, name: str) -> Encoding:
        scales, zeros = quantizer.grid()
        groups = self._groups.get(quantizer.tensor)
        if groups is not None:
            order = np.argsort(groups.reshape(-1))
            scales, zeros = scales.reshape(-1)[order], zeros.reshape(-1)[order]
        axis = self._axes.get(name, 0) if groups is not None else 0
        return Encoding(
            np.ascontiguousarray(scales.reshape(-1)),
            np.ascontiguousarray(zeros.reshape(-1)),
            "per_tensor" if groups is None else "per_channel",
            axis,
            0,
            0,
            quantizer.bits,
            quantizer.signed,
            quantizer.symmetric,
            quantizer.strict,
        )

    @property
    def _axes(self) -> dict[str, int]:
        return self.__dict__.setdefault("_channel_axes", {})

    def _pull(self, sim: engine.QuantizationSimModel, parameters_only: bool = False) -> None:
        """Give every quantizer the engine's grid."""
        for site in sim.quantizers:
            if site.tensor not in self._used or not site.has_encoding:
                continue
            if parameters_only and not site.is_parameter:
                continue
            quantizer, grid = self._quantizers[site.tensor], sim.encoding(site.tensor)
            quantizer.bits, quantizer.signed = grid.bits, grid.is_signed
            quantizer.symmetric, quantizer.strict = grid.is_symmetric, grid.is_strict
            scales, zeros = grid.scales, grid.zero_points
            groups = self._groups.get(quantizer.tensor)
            if groups is not None:
                self._axes[site.tensor] = grid.axis
                scales, zeros = scales[groups], np.broadcast_to(zeros, scales.shape)[groups]
            quantizer.set_grid(scales, zeros)
        self._forget_functions()

    def _forget_functions(self) -> None:
        """Drop compiled functions, which hold what the quantizers were."""
        for name in ("train_function", "test_function", "predict_function"):
            setattr(self.model, name, None)

    # ---------------------------------------------------------------------------------------------
    # Calibration

    def compute_encodings(self, data: Any, batch_size: int = 8) -> None:
        """Choose the grids of all quantizers from data.

        The engine runs the float network with quantized constants, so that the grids are the ones
        that it finds for the exported model. If anything raises, ranges stay as they were.

        Parameters
        ----------
        data : callable, iterable of batches, or array
            A function that is called once with `model` to run calibration data through it, eagerly;
            or the batches, such as a `tf.data.Dataset` (of a tuple, the first item counts; a dict
            goes by input name); or one array.
        batch_size : int
            Rows a batch, where one array is cut here.

        Raises
        ------
        EmptyStatisticsError
            If no data came.
        NonFiniteValueError, ShapeMismatchError
        """
        sim = self._engine(keeps_ranges=False)
        if callable(data) and not hasattr(data, "__iter__"):
            self._watch(sim, data)
        elif hasattr(data, "__array__"):
            array = np.asarray(data)
            for start in range(0, len(array), batch_size):
                sim.observe(self._given(array[start : start + batch_size]))
        else:
            for batch in data:
                single = len(self._network.inputs) == 1
                if isinstance(batch, (tuple, list)) and (
                    single or isinstance(batch[0], (tuple, list, dict))
                ):
                    batch = batch[0]
                sim.observe(self._given(batch))
        sim.finish_calibration()
        self._pull(sim)

    def _given(self, batch: Any) -> dict[str, Any]:
        names = self._network.inputs
        if isinstance(batch, Mapping):
            values = [batch[name] for name in names]
        else:
            values = tree.flatten(batch)
        types = [dtype for _, _, dtype in self._network.builder.inputs]
        return {
            name: np.asarray(value).astype(dtype, copy=False)
            for name, value, dtype in zip(names, values, types, strict=True)
        }

    def _watch(self, sim: engine.QuantizationSimModel, run: Callable[[Any], Any]) -> None:
        """Let the engine see what goes into the model while a function runs it."""
        model, original, eagerly = self.model, self.model.call, self.model.run_eagerly
        staged: list[str] = []
        enabled = {id(q): (q, q.enabled) for q in self._quantizers.values()}

        def call(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            values = tree.flatten(inputs)
            if any(
                not hasattr(value, "numpy") and not isinstance(value, np.ndarray)
                for value in values
            ):
                staged.append(
                    "compute_encodings: the callback ran the model in tf.function: run it eagerly"
                )
                raise InvalidStateError(staged[0])
            sim.observe(self._given(inputs))
            return original(inputs, *args, **kwargs)

        try:
            model.call, model.run_eagerly = call, True
            for quantizer in self._quantizers.values():
                quantizer.enabled = False
            for name in ("train_function", "test_function", "predict_function"):
                setattr(model, name, None)
            run(model)
        except Exception:
            # TensorFlow and Keras wrap what is raised while they trace.
            if staged:
                raise InvalidStateError(staged[0]) from None
            raise
        finally:
            model.call, model.run_eagerly = original, eagerly
            for quantizer, was in enabled.values():
                quantizer.enabled = was
            for name in ("train_function", "test_function", "predict_function"):
                setattr(model, name, None)

    # ---------------------------------------------------------------------------------------------
    # Quantizers

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """Quantizers by the name that their tensor has in the exported ONNX model."""
        return {name: self._quantizers[name] for name in sorted(self._used)}

    def quantizer(self, tensor: str) -> Quantizer:
        """Return the quantizer of a tensor of the exported ONNX model.

        Raises
        ------
        UnknownNameError
        """
        if tensor not in self._used:
            raise UnknownNameError(f"tensor '{tensor}' has no quantizer")
        return self._quantizers[tensor]

    def learn_ranges(self, learn: bool = True) -> None:
        """Let the ends of all ranges train with the weights, or stop that.

        Compile the model anew afterwards, as Keras asks for whenever `trainable` changes.
        """
        for quantizer in self._quantizers.values():
            quantizer.trainable = learn

    # ---------------------------------------------------------------------------------------------
    # Files

    def engine(self) -> engine.QuantizationSimModel:
        """Return the engine's simulation with the present weights and ranges."""
        return self._engine(keeps_ranges=True)

    def float_model(self) -> keras.Model:
        """Return a Keras model of the original layers with the present weights."""
        made: dict[int, Any] = {}

        def call(operation: Any, label: str, *args: Any, **kwargs: Any) -> Any:
            if id(operation) not in made:
                made[id(operation)] = clone(operation, None)
            return made[id(operation)](*args, **kwargs)

        result = rebuild(self._original, call)
        for key, target in made.items():
            if key in self._copies:
                copy_weights(self._copies[key], target)
        return result

    def export(
        self, path: str | os.PathLike[str], prefix: str, version: str = "1.0.0", qdq: bool = False
    ) -> None:
        """Write the network and its encodings.

        Writes ``<prefix>.keras`` and ``<prefix>.onnx`` in float32, ``<prefix>.encodings`` whose
        keys are the names in the ONNX model, ``<prefix>.names.json`` with the Keras layer or
        variable of each of them, the folder ``<prefix>.saved_model``, and with `qdq`
        ``<prefix>.qdq.onnx``.

        Raises
        ------
        FileAccessError, InvalidArgumentError, InvalidStateError, UnsupportedVersionError
        """
        sim = self.engine()
        sim.export(path, prefix, version)
        folder = pathlib.Path(path)
        if qdq:
            sim.export_qdq(folder / f"{prefix}.qdq.onnx")
        names = {name: parameter.variable.path for name, parameter in self._parameters.items()}
        # Tensors inside a layer belong to it as well.
        for node in self._network.builder.nodes:
            for name in node.outputs:
                names.setdefault(name, self._owners.get(name, node.label).split("#")[0])
        for name in self._network.inputs:
            names.setdefault(name, name)
        for name in self._network.builder.constants:
            names.setdefault(name, name.rsplit("/", 1)[0])
        (folder / f"{prefix}.names.json").write_text(json.dumps(names, indent=2) + "\n")
        model = self.float_model()
        model.save(folder / f"{prefix}.keras")
        model.export(folder / f"{prefix}.saved_model", verbose=False)

    def load_encodings(
        self, source: Mapping[str, Any] | str | os.PathLike[str] | bytes, strict: bool = True
    ) -> LoadReport:
        """Take encodings from JSON of any version, as `halfstep.QuantizationSimModel` does."""
        sim = self.engine()
        report = sim.load_encodings(source, strict)
        self._pull(sim)
        return report


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


__all__: Iterable[str] = ["QuantizationSimModel"]
