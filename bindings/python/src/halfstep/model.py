# SPDX-License-Identifier: Apache-2.0
# The Model class: a trained network.
"""Trained networks: read from ONNX, changed by algorithms, run, written back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from . import _core
from ._progress import Progress, Reporter
from .records import EqualizationReport, EqualizedSet, Fold, Layer, TensorInfo, tensor_infos

if TYPE_CHECKING:
    import numpy as np

    from .rounding import RoundedLayer


class Model:
    """A trained network.

    Made by `load`. Copies share weights until one of them changes them. An algorithm that fails
    leaves the model as it was. Several threads may use one model; they take turns.

    Examples
    --------
    >>> import halfstep, numpy as np
    >>> model = halfstep.Model.load("net.onnx")
    >>> model.inputs
    (TensorInfo(name='x', dtype='float32', shape=(None, 3, 8, 8)),)
    >>> len(model.fold_batch_norms())
    2
    >>> outputs = model.run({"x": np.zeros((1, 3, 8, 8), np.float32)})
    >>> outputs["y"].shape
    (1, 4)
    """

    __slots__ = ("__weakref__", "_handle")

    _handle: _core.Model

    def __init__(self) -> None:
        raise TypeError("use Model.load(path_or_bytes)")

    @classmethod
    def _wrap(cls, handle: _core.Model) -> Model:
        self = object.__new__(cls)
        self._handle = handle
        return self

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] | bytes | bytearray | memoryview,
        *,
        external_data_folder: str | os.PathLike[str] | None = None,
    ) -> Model:
        """Read an ONNX model.

        Parameters
        ----------
        source : path or bytes
            A file, or the bytes of one. External data of a file lies in the file's own folder.
        external_data_folder : path, optional
            Where external data of ``bytes`` may lie; by default it is refused.

        Returns
        -------
        Model

        Raises
        ------
        FileAccessError, MalformedFileError, UnsupportedVersionError, UnsafePathError,
        InvalidGraphError

        Examples
        --------
        >>> model = Model.load("net.onnx")
        >>> [info.name for info in Model.load(model.to_bytes()).outputs]
        ['y']
        """
        if isinstance(source, (bytes, bytearray, memoryview)):
            return cls._wrap(_core.model_open_memory(source, external_data_folder))
        if external_data_folder is not None:
            raise TypeError("external_data_folder: a file's external data lies in its own folder")
        return cls._wrap(_core.model_open(source))

    def save(self, path: str | os.PathLike[str], *, external_data: bool = False) -> None:
        """Write the model as ONNX; the file appears whole or not at all.

        Parameters
        ----------
        path : path
            File to write or replace.
        external_data : bool
            Whether weights go to ``<path>.data``, as they must above 2 GB.

        Raises
        ------
        FileAccessError
        """
        self._handle.save(path, external_data)

    def to_bytes(self) -> bytes:
        """Return the bytes of an ONNX file, weights inline.

        Raises
        ------
        InvalidArgumentError
            Above 2 GB, the format's limit.
        """
        return self._handle.serialize()

    def copy(self) -> Model:
        """Return a copy; weights are shared until one of the two changes them."""
        return Model._wrap(self._handle.clone())

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> Model:
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        return Model.load, (self.to_bytes(),)

    def __repr__(self) -> str:
        inputs = ", ".join(item[0] for item in self._handle.inputs())
        outputs = ", ".join(item[0] for item in self._handle.outputs())
        return f"<halfstep.Model ({inputs}) -> ({outputs})>"

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Tensors that a run needs."""
        return tensor_infos(self._handle.inputs())

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """Tensors that a run gives back."""
        return tensor_infos(self._handle.outputs())

    @property
    def initializers(self) -> dict[str, np.ndarray]:
        """Constants by name as they are now, in file order.

        The arrays are read-only views of the model's memory and do not change with the model.
        Types that NumPy lacks appear as their bits, strings not at all.

        Examples
        --------
        >>> weight = Model.load("net.onnx").initializers["conv1.weight"]
        >>> weight.shape, weight.flags.writeable
        ((8, 3, 3, 3), False)
        """
        from . import _arrays

        return _arrays.from_tensors(self._handle.initializers())

    def set_initializer(self, name: str, value: Any) -> None:
        """Replace a constant, or turn an input into a constant.

        Parameters
        ----------
        name : str
            A constant, or an input.
        value : array_like
            Of the same type and shape; copied.

        Raises
        ------
        UnknownNameError, ShapeMismatchError, TypeMismatchError
        """
        from . import _arrays

        self._handle.set_initializer(name, _arrays.as_array(value, name))

    def take_initializer(self, name: str) -> np.ndarray:
        """Take a constant out of the model, which then asks for it as an input.

        The opposite of `set_initializer`. Once every weight is out, `to_bytes` gives the structure
        alone, and a weight's memory is free as soon as its array is gone.

        Parameters
        ----------
        name : str
            A constant.

        Returns
        -------
        numpy.ndarray
            Its value, read-only.

        Raises
        ------
        UnknownNameError

        Examples
        --------
        >>> model = Model.load("net.onnx")
        >>> model.take_initializer("conv1.weight").shape
        (8, 3, 3, 3)
        >>> [info.name for info in model.inputs]
        ['x', 'conv1.weight']
        """
        from . import _arrays

        return _arrays.from_tensors(self._handle.take_initializer(name))[name]

    def run(
        self, inputs: Mapping[str, Any] | Any, *, extra_outputs: Iterable[str] = ()
    ) -> dict[str, np.ndarray]:
        """Run the network in float arithmetic.

        Dense arrays are read where they are. What was compiled is kept for the next run.

        Parameters
        ----------
        inputs : mapping of str to array, or array
            Values of the inputs; a lone array if there is one input. Anything with the buffer
            protocol or DLPack on the CPU, such as a torch tensor.
        extra_outputs : iterable of str
            Tensors wanted besides the outputs.

        Returns
        -------
        dict of str to numpy.ndarray
            The outputs, then the extra outputs.

        Raises
        ------
        UnsupportedOperatorError
            Naming every operator that cannot run.
        UnknownNameError, ShapeMismatchError, TypeMismatchError, InvalidArgumentError
            For the inputs.
        """
        from . import _arrays

        infos = () if isinstance(inputs, Mapping) else self.inputs
        values = _arrays.as_inputs(inputs, infos)
        return _arrays.from_tensors(self._handle.run(values, tuple(extra_outputs)))

    def inspect(self) -> tuple[Layer, ...]:
        """Measure the weights of every convolution and matrix product, in running order.

        Examples
        --------
        >>> [(layer.name, layer.op_type) for layer in Model.load("net.onnx").inspect()]
        [('conv1', 'Conv'), ('conv2', 'Conv'), ('fc', 'Gemm')]
        """
        from ._arrays import floats

        return tuple(
            Layer(name, op_type, weight, floats(low), floats(high), count)
            for name, op_type, weight, low, high, count in self._handle.inspect()
        )

    def fold_batch_norms(self) -> tuple[Fold, ...]:
        """Fold batch norms into the layers beside them; rewrite the rest as scale and shift.

        The network's function stays the same up to float rounding.

        Returns
        -------
        tuple of Fold
            The folds that were made.

        Raises
        ------
        NonFiniteValueError, InvalidGraphError
        """
        return tuple(Fold(*fold) for fold in self._handle.fold_batch_norms())

    def equalize(
        self,
        *,
        absorb_high_biases: bool = False,
        max_iterations: int = 50,
        progress: bool | Progress = False,
    ) -> EqualizationReport:
        """Balance the weight ranges of consecutive layers, keeping the network's function.

        Fold batch norms first: a batch norm between two layers keeps them apart.

        Parameters
        ----------
        absorb_high_biases : bool
            Whether the next layer absorbs high biases, which may change the network's function.
        max_iterations : int
            Passes over the model at most, 1 or more.
        progress : bool or callable
            True shows a bar on a terminal if tqdm is installed. A callable gets the number of
            passes made and `max_iterations` after each pass, and cancels by returning False or
            raising; the model is then unchanged.

        Returns
        -------
        EqualizationReport

        Raises
        ------
        InvalidArgumentError, NonFiniteValueError
        CancelledError
            If `progress` returned False.

        References
        ----------
        Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
        2019. arXiv:1906.04721

        Examples
        --------
        >>> model = Model.load("net.onnx")
        >>> _ = model.fold_batch_norms()
        >>> [one.layers for one in model.equalize().sets]
        [('conv1', 'conv2'), ('conv2', 'fc')]
        """
        from ._arrays import floats
        from .errors import InvalidArgumentError

        if max_iterations < 1:
            raise InvalidArgumentError(f"max_iterations: expected 1 or more, got {max_iterations}")
        with Reporter(progress, "equalizing", "pass") as report:
            iterations, sets = self._handle.equalize(absorb_high_biases, max_iterations, report)
        return EqualizationReport(
            iterations,
            tuple(
                EqualizedSet(layers, tuple(floats(factor) for factor in factors))
                for layers, factors in sets
            ),
        )

    def adaround(
        self,
        data: Mapping[str, Any] | Any | None,
        param_bits: int = 4,
        method: str = "auto",
        config: str | os.PathLike[str] | None = None,
        *,
        activation_bits: int | None = 8,
        quant_scheme: str = "min_max",
        percentile: float = 100.0,
        excluded_layers: Iterable[str] = (),
        max_rows: int = 1 << 15,
        max_bytes: int = 1 << 26,
        seed: int = 0,
        floor_or_ceil: bool = False,
        iterations: int | None = None,
        block_size: int | None = None,
        reg_param: float = 0.01,
        beta_range: tuple[float, float] = (20, 2),
        warm_start: float = 0.2,
        num_candidates: int = 20,
        layer_bits: Mapping[str, int] | None = None,
        cache: str | os.PathLike[str] | None = None,
        progress: bool | Progress = False,
    ) -> tuple[RoundedLayer, ...]:
        """Round weights so that the network's outputs change least, with unlabeled data.

        Fold batch norms first, and equalize if scales are per tensor. Each layer aims at what the
        float network computes, given what the layers rounded before it make of the data; what does
        not do better than rounding to nearest on held-out rows is not kept. Weights and biases
        change in place; the model remembers the grids, and a `QuantizationSimModel` made from it
        uses them.

        Parameters
        ----------
        data : array, dict of str to array, iterable of these, or None
            Inputs, ``[N, ...]`` each; how they are batched does not matter. None rounds by what
            folded batch norms let expect of layers' inputs, so that errors within kernels and rows
            cancel: better than to nearest, far from what a few dozen samples give.
        param_bits : int
            Width of weights, 2 to 16.
        method : str
            ``"gram"`` (linear algebra on Gram matrices of the layers' inputs), ``"gradient"``
            (AdaRound by gradient descent, with AIMET's defaults), ``"sequential_mse"`` (rounding
            to nearest on scales searched for the least error of each layer's output) or
            ``"auto"``: what does best on held-out rows for the effort.
        config : str, path or None
            Built-in runtime configuration or a JSON file; None means ``"default_per_channel"``.
        activation_bits : int or None
            Width of activations while rounding, 2 to 16; None keeps them in float.
        quant_scheme : str
            How ranges of activations, and of weights rounded to nearest, are chosen; give
            `QuantizationSimModel` the same.
        percentile : float
            For the scheme of that name, 50 to 100.
        excluded_layers : iterable of str
            Names of nodes that stay in float.
        max_rows : int
            Rows of its input that a layer learns from at most.
        max_bytes : int
            Bytes of activations held in memory; more goes to a temporary file.
        seed : int
            Decides which rows are drawn.
        floor_or_ceil : bool
            Whether a weight may only go to one of its two neighbors on the grid, as in AdaRound.
        iterations : int or None
            Steps of ``"gradient"`` for each layer; None means AIMET's 10,000 for 8 bits and more,
            15,000 below.
        block_size : int or None
            Input channels that share a scale, in weights of convolutions, Gemm and MatMul that the
            configuration quantizes per channel; None means all of a channel. The last block may be
            smaller. Give `QuantizationSimModel` the same.
        reg_param : float
            Weight of the regularizer with which ``"gradient"`` pushes weights to the grid.
        beta_range : pair of float
            Exponent of the regularizer when it sets in and at the end, 1 to 1,000.
        warm_start : float
            Share of the steps without the regularizer, less than 1.
        num_candidates : int
            Fractions of the range that ``"sequential_mse"`` tries.
        layer_bits : dict of str to int, optional
            Widths of single layers' weights by node name; `param_bits` for all others.
        cache : str, path or None
            Folder, made if it is not there, in which the result of each layer is kept under a hash
            of all that it depends on: a cancelled run goes on where it ended, and one with another
            option redoes only the layers that it changes. Nothing is ever removed.
        progress : bool or callable
            True shows a bar on a terminal if tqdm is installed. A callable gets the number of
            layers done and in all, and cancels by returning False or raising; the model is then
            unchanged.

        Returns
        -------
        tuple of RoundedLayer
            In the order in which the layers run.

        Raises
        ------
        InvalidArgumentError, UnknownNameError, InvalidConfigurationError
            For the arguments.
        EmptyStatisticsError, NonFiniteValueError, ShapeMismatchError
            For the data: no rows, a NaN or infinity, a wrong shape.
        UnsupportedOperatorError
            Naming every operator that cannot run.
        CancelledError
            If `progress` returned False.

        References
        ----------
        Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020,
        arXiv:2004.10568. Frantar et al., "GPTQ", 2022, arXiv:2210.17323.

        Examples
        --------
        >>> import numpy as np
        >>> model = Model.load("net.onnx")
        >>> _ = model.fold_batch_norms()
        >>> data = np.random.default_rng(0).standard_normal((16, 3, 8, 8), np.float32)
        >>> layers = model.adaround(data, param_bits=4)
        >>> all(layer.noise_after <= layer.noise_before for layer in layers)
        True
        """
        from .errors import InvalidArgumentError
        from .rounding import Settings, round_model

        settings = Settings(
            param_bits,
            method,
            config,
            activation_bits,
            quant_scheme,
            percentile,
            excluded_layers,
            max_rows,
            max_bytes,
            seed,
            floor_or_ceil,
            0 if iterations is None else iterations,
            block_size,
            cache,
            reg_param,
            beta_range,
            warm_start,
            num_candidates,
            layer_bits,
        )
        if iterations is not None and not 1 <= iterations < 2**31:
            raise InvalidArgumentError(f"iterations: expected 1 or more, got {iterations}")
        return round_model(self._handle.adaround, "rounding", self.inputs, data, settings, progress)

    def correct_biases(
        self,
        data: Mapping[str, Any] | Any | None,
        param_bits: int = 8,
        config: str | os.PathLike[str] | None = None,
        *,
        activation_bits: int | None = 8,
        quant_scheme: str = "min_max",
        percentile: float = 100.0,
        excluded_layers: Iterable[str] = (),
        max_rows: int = 1 << 15,
        max_bytes: int = 1 << 26,
        seed: int = 0,
        block_size: int | None = None,
        cache: str | os.PathLike[str] | None = None,
        progress: bool | Progress = False,
    ) -> tuple[RoundedLayer, ...]:
        """Correct biases for what rounding weights to nearest does to the means of outputs.

        Weights stay as they are; make the `QuantizationSimModel` with the same arguments. A
        layer's bias changes only if that brings the outputs of the quantized network nearer to
        those of the float network, on up to 32 samples from all over the data.

        Parameters
        ----------
        data : array, dict of str to array, iterable of these, or None
            Inputs, ``[N, ...]`` each; how they are batched does not matter. None corrects
            analytically: the means of layers' inputs are those that folded batch norms let expect.
        param_bits : int
            Width that weights will have, 2 to 16.
        config : str, path or None
            Built-in runtime configuration or a JSON file; None means ``"default_per_channel"``.
        activation_bits : int or None
            Width of activations while rounding, 2 to 16; None keeps them in float.
        quant_scheme : str
            How ranges of activations, and of weights rounded to nearest, are chosen; as for
            `QuantizationSimModel`.
        percentile : float
            For the scheme of that name, 50 to 100.
        excluded_layers : iterable of str
            Names of nodes that stay in float.
        max_rows : int
            Rows of its input that a layer learns from at most.
        max_bytes : int
            Bytes of activations held in memory; more goes to a temporary file.
        seed : int
            Decides which rows are drawn.
        block_size : int or None
            As in `adaround`.
        cache : str, path or None
            Folder, made if it is not there, in which the result of each layer is kept under a hash
            of all that it depends on: a cancelled run goes on where it ended, and one with another
            option redoes only the layers that it changes. Nothing is ever removed.
        progress : bool or callable
            True shows a bar on a terminal if tqdm is installed. A callable gets the number of
            layers done and in all, and cancels by returning False or raising; the model is then
            unchanged.

        Returns
        -------
        tuple of RoundedLayer
            In the order in which the layers run.

        Raises
        ------
        InvalidArgumentError, UnknownNameError, InvalidConfigurationError
            For the arguments.
        EmptyStatisticsError, NonFiniteValueError, ShapeMismatchError
            For the data: no rows, a NaN or infinity, a wrong shape.
        UnsupportedOperatorError
            Naming every operator that cannot run.
        CancelledError
            If `progress` returned False.

        References
        ----------
        Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
        2019. arXiv:1906.04721

        Examples
        --------
        >>> import numpy as np
        >>> model = Model.load("net.onnx")
        >>> _ = model.fold_batch_norms()
        >>> data = np.random.default_rng(0).standard_normal((16, 3, 8, 8), np.float32)
        >>> [layer.kept for layer in model.correct_biases(data)][0]
        'nearest, bias corrected'
        """
        from .rounding import Settings, round_model

        settings = Settings(
            param_bits,
            "auto",
            config,
            activation_bits,
            quant_scheme,
            percentile,
            excluded_layers,
            max_rows,
            max_bytes,
            seed,
            False,
            0,
            block_size,
            cache,
        )
        return round_model(
            self._handle.correct_biases, "correcting biases", self.inputs, data, settings, progress
        )
