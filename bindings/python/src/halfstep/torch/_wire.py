# SPDX-License-Identifier: Apache-2.0
# Writes the few parts of an ONNX file that layers without a network need.
"""ONNX without the package `onnx`, whose import takes as long as compressing a small network.

Numbers are those of the fields in ONNX's published schema.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

_FLOAT, _INT, _INTS = 1, 2, 7


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _field(number: int, value: int | str | bytes) -> bytes:
    """A number of 0 or more, a text, or a message that is encoded already."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _attribute(name: str, value: int | Sequence[int]) -> bytes:
    if isinstance(value, int):
        return _field(1, name) + _field(3, value) + _field(20, _INT)
    return _field(1, name) + b"".join(_field(8, x) for x in value) + _field(20, _INTS)


def node(
    name: str,
    op_type: str,
    inputs: Iterable[str],
    output: str,
    attributes: Mapping[str, int | Sequence[int]],
) -> bytes:
    """Return an operator with one output."""
    parts = [_field(1, value) for value in inputs]
    parts += [_field(2, output), _field(3, name), _field(4, op_type)]
    parts += [_field(5, _attribute(key, value)) for key, value in attributes.items()]
    return b"".join(parts)


def _values(number: int, shapes: Mapping[str, Sequence[int]]) -> bytes:
    """Inputs or outputs of a graph: tensors of floats."""
    parts = []
    for name, shape in shapes.items():
        extents = b"".join(_field(1, _field(1, extent)) for extent in shape)
        tensor = _field(1, _FLOAT) + _field(2, extents)
        parts.append(_field(number, _field(1, name) + _field(2, _field(1, tensor))))
    return b"".join(parts)


def model(
    nodes: Iterable[bytes],
    inputs: Mapping[str, Sequence[int]],
    outputs: Mapping[str, Sequence[int]],
    opset: int,
) -> bytes:
    """Return a model of float tensors: operators, and shapes of inputs and outputs."""
    graph = b"".join(_field(1, one) for one in nodes) + _field(2, "main")
    graph += _values(11, inputs) + _values(12, outputs)
    return _field(1, 10) + _field(8, _field(2, opset)) + _field(7, graph)
