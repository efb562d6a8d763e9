# SPDX-License-Identifier: Apache-2.0
# The Model class: a trained network.
"""Trained networks: read from ONNX, changed by algorithms, run, written back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from . import _core
from ._progress import Progress, Reporter
from ._rounding_methods import RoundingMethods
from .records import EqualizationReport, EqualizedSet, Fold, Layer, TensorInfo, tensor_infos

if TYPE_CHECKING:
    import numpy as np


class Model(RoundingMethods):
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
            If `progress` or `details` returned False.

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
