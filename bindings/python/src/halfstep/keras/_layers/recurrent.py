# SPDX-License-Identifier: Apache-2.0
# Recurrent layers.
"""Writes SimpleRNN, LSTM and GRU, and Bidirectional around one of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .. import _activations
from .._builder import Builder, Value
from ._writers import refuse_unless, writes

#: Activations as ONNX's recurrent operators call them, with their constants.
_FUNCTIONS: dict[str, tuple[str, tuple[float, ...], tuple[float, ...]]] = {
    "tanh": ("Tanh", (), ()),
    "sigmoid": ("Sigmoid", (), ()),
    "relu": ("Relu", (), ()),
    "softsign": ("Softsign", (), ()),
    "softplus": ("Softplus", (), ()),
    "hard_sigmoid": ("HardSigmoid", (1 / 6,), (0.5,)),
    "linear": ("Affine", (1.0,), (0.0,)),
    "elu": ("Elu", (1.0,), ()),
    "leaky_relu": ("LeakyRelu", (0.2,), ()),
}


class _Kind(NamedTuple):
    op: str
    #: Order in which ONNX has Keras's gates.
    gates: tuple[int, ...]
    #: Activations by attribute, in ONNX's order.
    functions: tuple[str, ...]


_KINDS = {
    "SimpleRNN": _Kind("RNN", (0,), ("activation",)),
    # Keras: input, forget, cell, output; ONNX: input, output, forget, cell.
    "LSTM": _Kind("LSTM", (0, 3, 1, 2), ("recurrent_activation", "activation", "activation")),
    "GRU": _Kind("GRU", (0, 1, 2), ("recurrent_activation", "activation")),
}


def _functions(layer: Any, kind: _Kind) -> dict[str, Any]:
    names, alphas, betas = [], [], []
    for attribute in kind.functions:
        name = _activations.name_of(getattr(layer, attribute))
        refuse_unless(name in _FUNCTIONS, f"{attribute} '{name}'")
        op, alpha, beta = _FUNCTIONS[name]
        names.append(op)
        alphas += alpha
        betas += beta
    result: dict[str, Any] = {"activations": names}
    if alphas:
        result["activation_alpha"] = alphas
    if betas:
        result["activation_beta"] = betas
    return result


def _bias(b: Builder, layer: Any, kind: _Kind, prefix: str) -> str:
    if not layer.use_bias:
        return ""
    bias, size = layer.cell.bias, 2 * len(kind.gates) * layer.units
    if len(bias.shape) == 2:  # biases of the input and of the recurrence
        return b.parameter(bias, f"{prefix}bias", (0, 1), (1, size), kind.gates)
    return b.parameter(bias, f"{prefix}bias", (0,), (1, size), kind.gates, size // 2)


def recurrent(
    b: Builder, layer: Any, x: Value, states: Any, prefix: str = "", suffix: str | None = None
) -> tuple[str, list[str]]:
    """Write one direction; return the result, a sequence in time's order, and the states."""
    name = type(layer).__name__
    refuse_unless(name in _KINDS, f"recurrence of {name}")
    kind = _KINDS[name]
    refuse_unless(
        not layer.stateful, "stateful: hand states on with initial_state and return_state"
    )
    refuse_unless(x.rank == 3, "an input that is not [N, T, C]")
    cell, gates = layer.cell, len(kind.gates)
    channels = int(cell.kernel.shape[0])
    by_time = b.node("Transpose", [b.last(x)], f"{prefix}by_time", perm=[1, 0, 2])
    rows = gates * layer.units
    inputs = [
        by_time,
        b.parameter(cell.kernel, f"{prefix}kernel", (1, 0), (1, rows, channels), kind.gates),
        b.parameter(
            cell.recurrent_kernel,
            f"{prefix}recurrent_kernel",
            (1, 0),
            (1, rows, layer.units),
            kind.gates,
        ),
        _bias(b, layer, kind, prefix),
    ]
    if states:
        inputs.append("")
        for index, state in enumerate(states):
            first = b.constant([0], f"{prefix}axis", np.int64)
            inputs.append(b.node("Unsqueeze", [b.last(state), first], f"{prefix}state{index}"))
    while not inputs[-1]:
        inputs.pop()
    attributes = _functions(layer, kind)
    if name == "GRU":
        attributes["linear_before_reset"] = int(layer.reset_after)
    # Outputs are the sequence and the last states.
    unused = [] if layer.return_sequences else [0]
    if not layer.return_state:
        unused += [1, 2] if layer.return_sequences else [2]
    every, *last = b.node(
        kind.op,
        inputs,
        f"{prefix}states",
        outputs=3 if name == "LSTM" else 2,
        named=True,
        unused=unused,
        hidden_size=layer.units,
        direction="reverse" if layer.go_backwards else "forward",
        **attributes,
    )
    axis = b.constant([0], f"{prefix}direction", np.int64)
    if not layer.return_sequences:
        result = b.node("Squeeze", [last[0], axis], suffix)
    else:
        second = b.constant([1], f"{prefix}directions", np.int64)
        squeezed = b.node("Squeeze", [every, second], f"{prefix}sequence")
        result = b.node("Transpose", [squeezed], suffix, perm=[1, 0, 2])
    final: list[str] = []
    if layer.return_state:
        final = [
            b.node("Squeeze", [one, axis], f"{prefix}final{index}")
            for index, one in enumerate(last)
        ]
    return result, final


def _flipped(b: Builder, name: str, suffix: str | None) -> str:
    """Return a sequence from its end to its beginning."""
    ends = [
        b.constant([value], what, np.int64)
        for value, what in ((-1, "starts"), (-(2**62), "ends"), (1, "axes"), (-1, "steps"))
    ]
    return b.node("Slice", [name, *ends], suffix)


def _shape(layer: Any, x: Value) -> tuple[int | None, ...]:
    if layer.return_sequences:
        return (x.shape[0], x.shape[1], layer.units)
    return (x.shape[0], layer.units)


@writes("SimpleRNN", "LSTM", "GRU")
def _recurrent(
    b: Builder, layer: Any, x: Value, initial_state: Any = None, mask: Any = None
) -> Any:
    refuse_unless(mask is None, "masks")
    states = initial_state if isinstance(initial_state, (list, tuple)) else [initial_state]
    states = [] if initial_state is None else list(states)
    backwards = layer.go_backwards and layer.return_sequences
    result, final = recurrent(b, layer, x, states, suffix="in_time" if backwards else None)
    if backwards:
        result = _flipped(b, result, None)
    value = Value(_shape(layer, x), last=result)
    if not layer.return_state:
        return value
    shape = (x.shape[0], layer.units)
    return [value, *(Value(shape, last=one) for one in final)]


@writes("Bidirectional")
def _bidirectional(
    b: Builder, layer: Any, x: Value, initial_state: Any = None, mask: Any = None
) -> Any:
    refuse_unless(mask is None and initial_state is None, "masks, initial states")
    refuse_unless(not layer.return_state, "return_state")
    there, back = layer.forward_layer, layer.backward_layer
    refuse_unless(there.go_backwards != back.go_backwards, "two layers of one direction")
    refuse_unless(there.return_sequences == back.return_sequences, "a sequence and a state")
    results = [
        recurrent(b, one, x, [], f"{prefix}/", prefix)[0]
        for one, prefix in ((there, "forward"), (back, "backward"))
    ]
    shape = _shape(there, x)
    if layer.merge_mode is None:
        return [Value(shape, last=one) for one in results]
    if layer.merge_mode == "concat":
        out = b.node("Concat", results, named=True, axis=-1)
        return Value((*shape[:-1], there.units + back.units), last=out)
    if layer.merge_mode == "ave":
        total = b.node("Add", results, "total")
        return Value(shape, last=b.node("Mul", [total, b.constant(0.5, "half")]))
    return Value(shape, last=b.node({"sum": "Add", "mul": "Mul"}[layer.merge_mode], results))
