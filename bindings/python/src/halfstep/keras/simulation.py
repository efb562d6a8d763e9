# SPDX-License-Identifier: Apache-2.0
# The QuantizationSimModel class for Keras models.
"""Quantization simulation of a live Keras model."""

from __future__ import annotations

import json
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import tree

from .. import simulation as engine
from .._faces import scheme_name
from ..errors import InvalidStateError, UnknownNameError
from ..quantizers import Encoding, LoadReport
from ._builder import Parameter
from ._building import Building, tensors_inside_folds
from ._data import arrays, batches_of
from ._network import Network
from ._rebuild import clone, copy_weights, rebuild
from .quantizer import Quantizer


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
        built = Building(
            model,
            self._network,
            engine.QuantizationSimModel(self._network.bound(), **self._options),
            tensors_inside_folds(self._network, self._options),
        )
        self.model = built.model
        self._sites, self._owners, self._copies = built.sites, built.owners, built.copies
        self._quantizers, self._used, self._groups = built.quantizers, built.used, built.groups
        copies = {
            id(before): after
            for key, target in built.copies.items()
            for before, after in zip(built.sources[key].weights, target.weights, strict=True)
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
            goes by input name); or all rows as one array, or as a dict of arrays.
        batch_size : int
            Rows a batch, where all rows come at once.

        Raises
        ------
        EmptyStatisticsError
            If no data came.
        UnknownNameError, InvalidArgumentError, TypeMismatchError
            For a batch without an input, with too few or many arrays, of what is no number.
        InvalidStateError
            If a function ran the model in `tf.function`.
        NonFiniteValueError, ShapeMismatchError
        """
        sim = self._engine(keeps_ranges=False)
        if callable(data) and not hasattr(data, "__iter__"):
            self._watch(sim, data)
        else:
            for batch in batches_of(self._network, data, batch_size):
                sim.observe(batch)
        sim.finish_calibration()
        self._pull(sim)

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
            sim.observe(arrays(self._network, inputs))
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
