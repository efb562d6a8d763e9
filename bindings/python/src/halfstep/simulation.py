# SPDX-License-Identifier: Apache-2.0
# The QuantizationSimModel class: a network simulated on integer hardware.
"""Simulation of integer hardware: quantizers are placed, calibrated, and take part in runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from . import _core
from ._progress import Progress, Reporter
from .errors import CancelledError, InvalidArgumentError, UnknownNameError
from .model import Model
from .quantizers import GRANULARITIES, Encoding, LoadReport, Quantizer

if TYPE_CHECKING:
    import numpy as np

#: Numbers of the range schemes; AIMET's names are understood as well.
_SCHEMES: dict[str, int] = {
    "min_max": 0,
    "tf": 0,
    "sqnr": 1,
    "tf_enhanced": 1,
    "percentile": 2,
    "mse": 3,
    "entropy": 4,
}


def block_size_of(block_size: int | None) -> int:
    """Return the library's number for a block size; 0 for none."""
    if block_size is not None and not 1 <= block_size < 2**31:
        raise InvalidArgumentError(f"block_size: expected 1 or more, got {block_size}")
    return block_size or 0


class QuantizationSimModel:
    """A network simulated on integer hardware.

    Parameters
    ----------
    model : Model
        The network; later changes of it do not reach the simulation.
    param_bits : int
        Width of constants, 2 to 16.
    activation_bits : int
        Width of computed tensors, 2 to 16.
    quant_scheme : str
        How ranges are chosen: ``"min_max"`` (``"tf"``), ``"sqnr"`` (``"tf_enhanced"``),
        ``"percentile"``, ``"mse"``, ``"entropy"``.
    config : str or path, optional
        A built-in runtime configuration by name or the path of a JSON file. By default
        ``"default_per_channel"``; ``"default"`` is per tensor.
    percentile : float
        For the scheme of that name, 50 to 100: the share of values within the range.
    excluded_layers : iterable of str
        Names of nodes that stay unquantized.
    block_size : int or None
        Input channels that share a scale, in weights of convolutions, Gemm and MatMul that the
        configuration quantizes per channel; None means all of a channel. The last block may be
        smaller.

    Raises
    ------
    UnknownNameError
        For the scheme or configuration.
    InvalidArgumentError, InvalidConfigurationError, NonFiniteValueError, UnsupportedOperatorError

    Examples
    --------
    >>> import halfstep, numpy as np
    >>> model = halfstep.Model.load("net.onnx")
    >>> _ = model.fold_batch_norms()
    >>> sim = halfstep.QuantizationSimModel(model, param_bits=8, activation_bits=8)
    >>> data = np.random.default_rng(0).standard_normal((16, 3, 8, 8), np.float32)
    >>> sim.compute_encodings([data[:8], data[8:]], progress=False)
    >>> sim.run({"x": data})["y"].shape
    (16, 4)
    >>> sim.export("out", "net")
    >>> sorted(os.listdir("out"))
    ['net.encodings', 'net.onnx']
    """

    __slots__ = ("__weakref__", "_handle", "_inputs", "_model", "_statistics_lock")

    def __init__(
        self,
        model: Model,
        param_bits: int = 8,
        activation_bits: int = 8,
        quant_scheme: str = "min_max",
        config: str | os.PathLike[str] | None = None,
        *,
        percentile: float = 100.0,
        excluded_layers: Iterable[str] = (),
        block_size: int | None = None,
    ) -> None:
        if not isinstance(model, Model):
            raise TypeError(f"model: expected a halfstep.Model, got {type(model).__name__}")
        if quant_scheme not in _SCHEMES:
            raise UnknownNameError(
                f"quant_scheme {quant_scheme!r}: expected one of {', '.join(_SCHEMES)}"
            )
        for bits, what in ((param_bits, "param_bits"), (activation_bits, "activation_bits")):
            _check_bits(bits, what)
        self._handle = _core.simulation_create(
            model._handle,
            param_bits,
            activation_bits,
            _SCHEMES[quant_scheme],
            percentile,
            config,
            tuple(excluded_layers),
            block_size_of(block_size),
        )
        self._model = model.copy()
        self._inputs = self._model.inputs
        # Calibration is several native calls; this keeps other threads' statistics out of it.
        self._statistics_lock = threading.RLock()

    @property
    def model(self) -> Model:
        """A copy of the network in float32, as it was when the simulation was made."""
        return self._model.copy()

    # ---------------------------------------------------------------------------------------------
    # Calibration

    def compute_encodings(
        self,
        data: Iterable[Any] | Mapping[str, Any] | Any,
        progress: bool | Progress = True,
        *,
        batch_size: int = 8,
    ) -> None:
        """Choose the grids of computed tensors from data.

        Forgets what was observed before. Constants are quantized while the data runs through,
        computed tensors are not. The result does not depend on how the data is cut into batches or
        on their order. If anything raises, also `progress` or the iterable, statistics and
        encodings stay as they were.

        Parameters
        ----------
        data : iterable of (dict of str to array, or array); or one dict, or one array
            Batches of the inputs. One dict of arrays or one array ``[N, ...]`` is cut into batches
            here.
        progress : bool or callable
            True shows a bar on a terminal if tqdm is installed. A callable gets the number of
            batches done and their number in all (None if the iterable has no length) after each
            batch, and cancels by returning False.
        batch_size : int
            Rows a batch, where the data is cut here.

        Raises
        ------
        EmptyStatisticsError
            Without batches.
        CancelledError
            If `progress` returned False.
        ShapeMismatchError, TypeMismatchError, UnknownNameError, NonFiniteValueError
            For the data.
        """
        from . import _arrays

        whole = isinstance(data, Mapping) or hasattr(data, "__array__")
        with self._statistics_lock, Reporter(progress, "calibrating", "batch") as report:
            if whole:
                inputs = _arrays.as_inputs(data, self._inputs)
                self._handle.calibrate(inputs, batch_size, report)
                return
            before = self._handle.statistics()
            total = len(data) if hasattr(data, "__len__") else None  # type: ignore[arg-type]
            self._handle.reset_statistics()
            try:
                for index, batch in enumerate(data):
                    self._handle.observe(_arrays.as_inputs(batch, self._inputs))
                    if report is not None and report(index + 1, total) is False:
                        raise CancelledError(f"calibration was cancelled after batch {index + 1}")
                self._handle.compute_encodings()
            except BaseException:
                self._handle.reset_statistics()
                self._handle.merge_statistics(before)
                raise

    def observe(self, inputs: Mapping[str, Any] | Any) -> None:
        """Run one batch and remember the ranges of computed tensors.

        For calibration over several processes; `finish_calibration` chooses the grids.

        Parameters
        ----------
        inputs : mapping of str to array, or array
            As for `Model.run`.
        """
        from . import _arrays

        values = _arrays.as_inputs(inputs, self._inputs)
        with self._statistics_lock:
            self._handle.observe(values)

    def finish_calibration(self) -> None:
        """Choose the grids of computed tensors from everything observed or merged so far.

        Raises
        ------
        EmptyStatisticsError
            If nothing was.
        """
        with self._statistics_lock:
            self._handle.compute_encodings()

    def reset_statistics(self) -> None:
        """Forget what was observed; encodings stay."""
        with self._statistics_lock:
            self._handle.reset_statistics()

    def statistics(self) -> bytes:
        """Return everything observed so far, to be merged in another process.

        Examples
        --------
        Two simulations share the work and come to what one would have found:

        >>> import halfstep, numpy as np
        >>> model = halfstep.Model.load("net.onnx")
        >>> data = np.random.default_rng(0).standard_normal((16, 3, 8, 8), np.float32)
        >>> one, half, other = (halfstep.QuantizationSimModel(model) for _ in range(3))
        >>> one.compute_encodings([data], progress=False)
        >>> half.observe(data[::2])
        >>> other.observe(data[1::2])
        >>> half.merge_statistics(other.statistics())
        >>> half.finish_calibration()
        >>> half.encodings() == one.encodings()
        True
        """
        with self._statistics_lock:
            return self._handle.statistics()

    def merge_statistics(self, data: bytes) -> None:
        """Add what another simulation of the same network observed; order does not matter.

        Raises
        ------
        MalformedFileError, UnknownNameError
            The statistics are then unchanged.
        """
        with self._statistics_lock:
            self._handle.merge_statistics(data)

    # ---------------------------------------------------------------------------------------------
    # Running

    def run(
        self, inputs: Mapping[str, Any] | Any, *, extra_outputs: Iterable[str] = ()
    ) -> dict[str, np.ndarray]:
        """Run the simulated network.

        Parameters
        ----------
        inputs : mapping of str to array, or array
            As for `Model.run`.
        extra_outputs : iterable of str
            Tensors wanted besides the outputs, as they are after quantization.

        Returns
        -------
        dict of str to numpy.ndarray

        Raises
        ------
        InvalidStateError
            Before there are encodings.
        UnknownNameError, ShapeMismatchError, TypeMismatchError, InvalidArgumentError
            For the inputs.
        """
        from . import _arrays

        values = _arrays.as_inputs(inputs, self._inputs)
        return _arrays.from_tensors(self._handle.run(values, tuple(extra_outputs)))

    # ---------------------------------------------------------------------------------------------
    # Quantizers

    @property
    def quantizers(self) -> tuple[Quantizer, ...]:
        """Quantizers in the order in which the graph defines the tensors."""
        return tuple(Quantizer(*item) for item in self._handle.quantizers())

    def encoding(self, tensor: str) -> Encoding:
        """Return the grid of one tensor.

        Raises
        ------
        UnknownNameError
            If the tensor has no quantizer.
        InvalidStateError
            Before there are encodings.
        """
        import numpy as np

        scales, zero_points, granularity, axis, block_axis, block_size, *rest = (
            self._handle.encoding(tensor)
        )
        return Encoding(
            np.frombuffer(scales, np.float32),
            np.frombuffer(zero_points, np.int32),
            GRANULARITIES[granularity],
            axis,
            block_axis,
            block_size,
            *rest,
        )

    def set_encoding(self, tensor: str, encoding: Encoding) -> None:
        """Give a tensor a grid; tensors that share a grid all get it.

        Parameters
        ----------
        tensor : str
            A tensor that has a quantizer.
        encoding : Encoding
            Such as `encoding` gives, perhaps with some fields replaced.

        Raises
        ------
        UnknownNameError, InvalidArgumentError
        EncodingMismatchError
            If the grid cannot belong to the tensor.
        InvalidStateError
            If the quantizer is frozen.

        Examples
        --------
        >>> import halfstep, numpy as np
        >>> sim = halfstep.QuantizationSimModel(halfstep.Model.load("net.onnx"))
        >>> grid = sim.encoding("fc.weight")
        >>> sim.set_encoding("fc.weight", grid._replace(scales=2 * grid.scales))
        >>> bool((sim.encoding("fc.weight").scales == 2 * grid.scales).all())
        True
        """
        import numpy as np

        if encoding.granularity not in GRANULARITIES:
            raise UnknownNameError(
                f"granularity {encoding.granularity!r}: expected one of {', '.join(GRANULARITIES)}"
            )
        self._handle.set_encoding(
            tensor,
            np.require(encoding.scales, np.float32, "CA"),
            np.require(encoding.zero_points, np.int32, "CA"),
            GRANULARITIES.index(encoding.granularity),
            *encoding[3:],
        )

    def set_enabled(self, tensor: str, enabled: bool) -> None:
        """Turn a quantizer on or off; one that comes on keeps its grid, if it has one.

        Raises
        ------
        UnknownNameError
        """
        self._handle.set_enabled(tensor, enabled)

    def set_frozen(self, tensor: str, frozen: bool) -> None:
        """Keep a grid as it is, or let go of it; tensors that share a grid go together.

        Raises
        ------
        UnknownNameError
        InvalidStateError
            If there is no grid to keep.
        """
        self._handle.set_frozen(tensor, frozen)

    def set_precision(
        self, tensor: str, bits: int | None = None, symmetric: bool | None = None
    ) -> None:
        """Change width and symmetry of a quantizer, and choose its grid anew.

        A computed tensor that has seen no data is left without a grid until encodings are computed.

        Parameters
        ----------
        tensor : str
            A tensor that has a quantizer.
        bits : int, optional
            2 to 16.
        symmetric : bool, optional
            Whether zero sits in the middle of the grid.

        Raises
        ------
        UnknownNameError, InvalidArgumentError
        InvalidStateError
            If the quantizer is frozen.
        """
        if bits is not None:
            _check_bits(bits, "bits")
        self._handle.set_precision(tensor, bits or 0, -1 if symmetric is None else bool(symmetric))

    def set_range(
        self, tensor: str, minimum: float | None = None, maximum: float | None = None
    ) -> None:
        """Hold a computed tensor's grid to bounds; None leaves that end to the data.

        Raises
        ------
        UnknownNameError, InvalidArgumentError
        InvalidStateError
            If the quantizer is frozen.
        """
        nan = float("nan")
        for bound in (minimum, maximum):
            if bound is not None and bound != bound:
                raise InvalidArgumentError("bounds: expected numbers, got NaN")
        self._handle.set_range(
            tensor, nan if minimum is None else minimum, nan if maximum is None else maximum
        )

    # ---------------------------------------------------------------------------------------------
    # Files

    def encodings(self, version: str = "1.0.0") -> dict[str, Any]:
        """Return the encodings as the parsed JSON of AIMET's format.

        Parameters
        ----------
        version : str
            ``"0.6.1"``, ``"1.0.0"`` or ``"2.0.0"``.

        Raises
        ------
        InvalidStateError
            Before there are encodings.
        UnsupportedVersionError
        """
        import json

        return json.loads(self.encodings_json(version))

    def encodings_json(self, version: str = "1.0.0") -> bytes:
        """Return the encodings as the bytes that `export` writes."""
        return self._handle.encodings_json(version)

    def export(
        self, directory: str | os.PathLike[str], prefix: str, version: str = "1.0.0"
    ) -> None:
        """Write ``<prefix>.onnx`` (the network in float32) and ``<prefix>.encodings``.

        Parameters
        ----------
        directory : path
            A folder; it is created if its parent exists.
        prefix : str
            A file name without folders.
        version : str
            ``"0.6.1"``, ``"1.0.0"`` or ``"2.0.0"``.

        Raises
        ------
        FileAccessError, InvalidArgumentError, InvalidStateError, UnsupportedVersionError
        """
        self._handle.export(directory, prefix, version)

    def export_qdq(
        self,
        path: str | os.PathLike[str],
        *,
        prequantize_constants: bool = False,
        int32_bias: bool = False,
    ) -> None:
        """Write an ONNX model whose QuantizeLinear and DequantizeLinear pairs carry the encodings.

        Parameters
        ----------
        path : path
            File to write or replace; it appears whole or not at all.
        prequantize_constants : bool
            Whether constants are stored as integers.
        int32_bias : bool
            Whether biases become 32-bit integers.

        Raises
        ------
        FileAccessError, InvalidStateError
        """
        self._handle.export_qdq(path, prequantize_constants, int32_bias)

    def export_dlc(self, path: str | os.PathLike[str], *, batch_size: int = 1) -> None:
        """Let Qualcomm's own converter write a DLC, the file that its runtime loads.

        Goes through a temporary QDQ model with integer constants and 32-bit biases; see
        `halfstep.qualcomm`, also for what is to be installed. The simulation should have one of the
        ``"htp_…"`` configurations.

        Parameters
        ----------
        path : path
            File to write or replace; it appears whole or not at all.
        batch_size : int
            The first extent of inputs that leave it open: a DLC fixes all extents.

        Raises
        ------
        halfstep.qualcomm.PackageMissingError
        UnsupportedOperatorError
            If the processor refuses nodes; the message names them.
        FileAccessError, InvalidArgumentError, InvalidStateError
        """
        import tempfile

        from .qualcomm import write_dlc

        with tempfile.TemporaryDirectory(prefix="halfstep-dlc-") as folder:
            qdq = os.path.join(folder, "net.onnx")
            self.export_qdq(qdq, prequantize_constants=True, int32_bias=True)
            write_dlc(qdq, path, batch_size=batch_size)

    def load_encodings(
        self, source: Mapping[str, Any] | str | os.PathLike[str] | bytes, strict: bool = True
    ) -> LoadReport:
        """Take encodings from JSON of any version.

        Parameters
        ----------
        source : dict, path or bytes
            Parsed JSON, a file, or the bytes of one.
        strict : bool
            Whether any mismatch is an error.

        Returns
        -------
        LoadReport
            What did not match; empty if strict.

        Raises
        ------
        EncodingMismatchError
            If strict; the encodings are then unchanged.
        MalformedFileError, UnsupportedVersionError, FileAccessError
        """
        if isinstance(source, Mapping):
            import json

            source = json.dumps(source).encode()
        elif not isinstance(source, (bytes, bytearray, memoryview)):
            from .errors import FileAccessError

            try:
                with open(source, "rb") as file:
                    data = file.read(_JSON_LIMIT)
            except OSError as error:
                raise FileAccessError(
                    f"cannot read '{os.fspath(source)}': {error.strerror}"
                ) from error
            if len(data) == _JSON_LIMIT:
                raise FileAccessError(f"cannot read '{os.fspath(source)}': it has 2 GiB or more")
            source = data
        return LoadReport(*self._handle.load_encodings(source, strict))

    def __repr__(self) -> str:
        return f"<halfstep.QuantizationSimModel with {len(self._handle.quantizers())} quantizers>"


#: As much as the engine reads of a JSON file.
_JSON_LIMIT = 1 << 31


def _check_bits(bits: int, what: str) -> None:
    # The C interface takes 0 for "the default"; here that would hide a mistake.
    if not 2 <= bits <= 16:
        raise InvalidArgumentError(f"{what}: expected 2 to 16, got {bits}")
