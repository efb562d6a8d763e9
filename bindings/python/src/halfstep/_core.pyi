# SPDX-License-Identifier: Apache-2.0
# What the native module offers to the Python modules; not public.
from collections.abc import Buffer, Callable  # type: ignore[attr-defined]  # Python 3.12 names it
from os import PathLike
from typing import final

Path = str | bytes | PathLike[str]

@final
class Tensor:
    """A tensor of the library as a buffer; it stays valid as long as anything refers to it."""

    @property
    def dtype(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Model:
    def save(self, path: Path, external_data: bool, /) -> None: ...
    def serialize(self) -> bytes: ...
    def clone(self) -> Model: ...
    def inputs(self) -> list[tuple[str, int, tuple[int, ...] | None]]: ...
    def outputs(self) -> list[tuple[str, int, tuple[int, ...] | None]]: ...
    def initializers(self) -> dict[str, Tensor]: ...
    def set_initializer(self, name: str, value: Buffer, /) -> None: ...
    def set_initializer_borrowed(self, name: str, value: Buffer, /) -> None: ...
    def set_initializer_lent(self, name: str, value: Buffer, /) -> None: ...
    def take_initializer(self, name: str, /) -> dict[str, Tensor]: ...
    def run(self, inputs: dict[str, Buffer], extra: tuple[str, ...], /) -> dict[str, Tensor]: ...
    def inspect(self) -> list[tuple[str, str, str, bytes, bytes, int]]: ...
    def fold_batch_norms(self) -> list[tuple[str, str, bool]]: ...
    def equalize(
        self,
        absorb_high_biases: bool,
        maximum_iterations: int,
        progress: Callable[[int, int], object] | None,
        /,
    ) -> tuple[int, list[tuple[tuple[str, ...], tuple[bytes, ...]]]]: ...
    def adaround(
        self,
        inputs: dict[str, Buffer] | None,
        method: int,
        parameter_bits: int,
        activation_bits: int,
        scheme: int,
        percentile: float,
        configuration: str | None,
        excluded_layers: tuple[str, ...],
        maximum_rows: int,
        maximum_bytes: int,
        seed: int,
        floor_or_ceil: bool,
        iterations: int,
        block_size: int,
        reg_param: float,
        beta_start: float,
        beta_end: float,
        warm_start: float,
        num_candidates: int,
        width_layers: tuple[str, ...],
        widths: bytes,
        cache: str | None,
        progress: Callable[[int, int], object] | None,
        details: Callable[[int, int, str, float, float | None], object] | None,
        /,
    ) -> list[tuple[str, str, int, float, float, str]]: ...
    def correct_biases(
        self,
        inputs: dict[str, Buffer] | None,
        method: int,
        parameter_bits: int,
        activation_bits: int,
        scheme: int,
        percentile: float,
        configuration: str | None,
        excluded_layers: tuple[str, ...],
        maximum_rows: int,
        maximum_bytes: int,
        seed: int,
        floor_or_ceil: bool,
        iterations: int,
        block_size: int,
        reg_param: float,
        beta_start: float,
        beta_end: float,
        warm_start: float,
        num_candidates: int,
        width_layers: tuple[str, ...],
        widths: bytes,
        cache: str | None,
        progress: Callable[[int, int], object] | None,
        details: Callable[[int, int, str, float, float | None], object] | None,
        /,
    ) -> list[tuple[str, str, int, float, float, str]]: ...

# Name, operator, size, largest size, costs before and after, names of weights and bias, noises.
_Compressed = tuple[
    str | None,
    str | None,
    int,
    int,
    int,
    int,
    int,
    int,
    str | None,
    str | None,
    str | None,
    str | None,
    float,
    float,
]

@final
class Compressor:
    def costs(self) -> list[tuple[str, str, str, int, int]]: ...
    def layers(self) -> list[tuple[str, str, str, int, int, int]]: ...
    def refusals(self) -> list[tuple[str, str]]: ...
    def find(self, name: str, /) -> int: ...
    def find_read(self, name: str, /) -> list[int]: ...
    def members(self, index: int, role: int, /) -> list[int]: ...
    def units(self, index: int, ratio: float, /) -> int: ...
    def ratio(self, index: int, units: int, /) -> float: ...
    def calibrate(self, inputs: dict[str, Buffer], /) -> None: ...
    def errors(
        self, index: int, progress: Callable[[int, int], object] | None, /
    ) -> list[float]: ...
    def select(
        self, target: float, progress: Callable[[int, int], object] | None, /
    ) -> list[int]: ...
    def select_greedy(
        self, target: float, ratios: Buffer, scores: Buffer, monotonic: bool, /
    ) -> list[int]: ...
    def compress(
        self, units: tuple[int, ...], progress: Callable[[int, int], object] | None, /
    ) -> tuple[
        Model,
        _Compressed,
        list[_Compressed],
        list[tuple[str, str, int, tuple[int, ...]]],
    ]: ...

@final
class Simulation:
    def observe(self, inputs: dict[str, Buffer], /) -> None: ...
    def observe_value(self, tensor: str, value: Buffer, /) -> None: ...
    def reset_statistics(self) -> None: ...
    def compute_encodings(self) -> None: ...
    def calibrate(
        self,
        inputs: dict[str, Buffer],
        batch_size: int,
        progress: Callable[[int, int], object] | None,
        /,
    ) -> None: ...
    def statistics(self) -> bytes: ...
    def merge_statistics(self, data: Buffer, /) -> None: ...
    def run(self, inputs: dict[str, Buffer], extra: tuple[str, ...], /) -> dict[str, Tensor]: ...
    def quantizers(self) -> list[tuple[str, str, bool, int, bool, bool, bool, bool]]: ...
    def encoding(
        self, tensor: str, /
    ) -> tuple[bytes, bytes, int, int, int, int, int, bool, bool, bool]: ...
    def parameter_encoding(
        self, tensor: str, value: Buffer, /
    ) -> tuple[bytes, bytes, int, int, int, int, int, bool, bool, bool]: ...
    def set_encoding(
        self,
        tensor: str,
        scales: Buffer,
        zero_points: Buffer,
        granularity: int,
        axis: int,
        block_axis: int,
        block_size: int,
        bits: int,
        signed: bool,
        symmetric: bool,
        strict: bool,
        /,
    ) -> None: ...
    def set_enabled(self, tensor: str, enabled: bool, /) -> None: ...
    def set_frozen(self, tensor: str, frozen: bool, /) -> None: ...
    def set_precision(self, tensor: str, bits: int, symmetric: int, /) -> None: ...
    def set_range(self, tensor: str, minimum: float, maximum: float, /) -> None: ...
    def encodings_json(self, version: str, /) -> bytes: ...
    def export(self, directory: Path, prefix: str, version: str, /) -> None: ...
    def export_qdq(self, path: Path, prequantize_constants: bool, int32_bias: bool, /) -> None: ...
    def load_encodings(
        self, data: Buffer, strict: bool, /
    ) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]: ...

def model_open(path: Path, /) -> Model: ...
def model_open_memory(data: Buffer, external_data_folder: Path | None, /) -> Model: ...
def simulation_create(
    model: Model,
    parameter_bits: int,
    activation_bits: int,
    scheme: int,
    percentile: float,
    configuration: Path | None,
    excluded_layers: tuple[str, ...],
    block_size: int,
    /,
) -> Simulation: ...
def fake_quantize(
    values: Buffer,
    scales: Buffer,
    zero_points: Buffer,
    out: Buffer,
    granularity: int,
    axis: int,
    block_axis: int,
    block_size: int,
    bits: int,
    signed: bool,
    strict: bool,
    /,
) -> None: ...
def fake_quantize_backward(
    values: Buffer,
    scales: Buffer,
    zero_points: Buffer,
    upstream: Buffer,
    out: Buffer,
    minimums: Buffer | None,
    out_minimums: Buffer | None,
    out_maximums: Buffer | None,
    granularity: int,
    axis: int,
    block_axis: int,
    block_size: int,
    bits: int,
    signed: bool,
    symmetric: bool,
    strict: bool,
    /,
) -> None: ...
def encoding_from_range(
    minimums: Buffer,
    maximums: Buffer,
    bits: int,
    signed: bool,
    symmetric: bool,
    strict: bool,
    out_scales: Buffer,
    out_zero_points: Buffer,
    /,
) -> None: ...
def encoding_to_range(
    scales: Buffer,
    zero_points: Buffer,
    bits: int,
    signed: bool,
    symmetric: bool,
    strict: bool,
    out_minimums: Buffer,
    out_maximums: Buffer,
    /,
) -> None: ...
def compressor_create(
    model: Model,
    scheme: int,
    metric: int,
    multiplicity: int,
    ignored_layers: tuple[str, ...],
    input_names: tuple[str, ...],
    input_shapes: tuple[tuple[int, ...], ...],
    importance: int,
    reconstructs: bool,
    input_keepers: tuple[str, ...],
    keeps_positions: bool,
    /,
) -> Compressor: ...
def set_thread_count(count: int, /) -> None: ...
def thread_count() -> int: ...
def version() -> str: ...
def status_name(status: int, /) -> str: ...
