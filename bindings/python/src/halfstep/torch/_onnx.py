# SPDX-License-Identifier: Apache-2.0
# Writes a traced module as ONNX without weights, tensors named like the nodes of its graph.
"""From an exported program to the bytes of an ONNX model for the engine.

Parameters and buffers are inputs of that model, by the names they have in the module: the engine
gets their values bound by name, in the module's own memory.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from typing import Any, NamedTuple

import torch

from . import _trace
from .errors import UntraceableModelError

#: Version of ONNX's operators: the first with Gelu.
OPSET = 20


class Exported(NamedTuple):
    """A module as ONNX, and the graph that its tensors are named after."""

    #: Bytes of the model; parameters and buffers are inputs.
    data: bytes
    #: The graph: node names are tensor names. None once a simulation is built.
    program: torch.export.ExportedProgram | None
    #: Inputs that are not parameters or buffers, in the order of the call.
    inputs: tuple[str, ...]
    #: Outputs in the order of the call.
    outputs: tuple[str, ...]
    #: Parameters and buffers that the model reads, by their name in the module.
    state: tuple[str, ...]
    #: Names of the modules that each operator of the model belongs to, by operator.
    scopes: dict[str, tuple[str, ...]]


def export(program: torch.export.ExportedProgram) -> Exported:
    """Write a program as ONNX.

    Raises
    ------
    UntraceableModelError
        Naming an operator that has no counterpart.
    """
    try:
        import onnx_ir as ir
        import onnxscript
        from onnxscript.optimizer import fold_constants
    except ImportError as error:
        raise ImportError("halfstep.torch needs the package onnxscript") from error

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            made = torch.onnx.export(
                program,
                (),
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                external_data=False,
                custom_translation_table=_translations(onnxscript),
            )
        except Exception as error:
            raise UntraceableModelError(f"the model cannot be written as ONNX: {error}") from error
    assert made is not None
    model, traced = made.model, made.exported_program
    graph = model.graph
    inputs = tuple(value.name for value in graph.inputs)
    outputs = tuple(value.name for value in graph.outputs)

    # Parameters are no constants yet: nothing that depends on them may be computed here.
    state = {name for name in graph.initializers if name in traced.state_dict}
    for name in sorted(state):
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    fold_constants(model, input_size_limit=1 << 28, output_size_limit=1 << 28)
    _drop_identities(graph)
    _drop_zero_biases(graph)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    ir.passes.common.RemoveUnusedFunctionsPass()(model)
    used = {v.name for node in graph.all_nodes() for v in node.inputs if v is not None}
    for value in [v for v in graph.inputs if v.name in state and v.name not in used]:
        graph.inputs.remove(value)
    scopes = {}
    for node in graph.all_nodes():
        scopes[node.name] = _scopes(node.metadata_props.get("pkg.torch.onnx.name_scopes"))
        # Stack traces are long, and name files of this machine.
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    graph.name = "main"
    data = ir.serde.serialize_model(model).SerializeToString()
    return Exported(data, traced, inputs, outputs, tuple(sorted(state & used)), scopes)


def _scopes(text: str | None) -> tuple[str, ...]:
    """Names of modules from the exporter's list; its last item is the operator."""
    if not text:
        return ()
    return tuple(str(name).split("@")[0] for name in ast.literal_eval(text)[:-1] if name)


def _translations(onnxscript: Any) -> dict[Any, Any]:
    op = onnxscript.opset20

    def batch_norm(x, weight, bias, mean, variance, momentum: float, epsilon: float):
        if weight is None or bias is None:
            one = op.ConstantOfShape(op.Shape(mean))
            weight = op.Exp(one) if weight is None else weight
            bias = one if bias is None else bias
        return op.BatchNormalization(x, weight, bias, mean, variance, epsilon=epsilon)

    def dropout(x, p: float, kind: str):
        return op.Identity(x)

    return {_trace.BATCH_NORM: batch_norm, _trace.DROPOUT: dropout}


def _drop_identities(graph: Any) -> None:
    """Let readers of a copy read the original."""
    for node in list(graph):
        if node.op_type not in ("Identity", "Dropout") or node.domain not in ("", "ai.onnx"):
            continue
        source, copy = node.inputs[0], node.outputs[0]
        if source is None or copy.is_graph_output():
            continue
        for reader, index in list(copy.uses()):
            reader.replace_input_with(index, source)
        graph.remove(node)


def _drop_zero_biases(graph: Any) -> None:
    """Take away the zeros that the exporter gives to convolutions without bias."""
    for node in list(graph):
        if node.op_type not in ("Conv", "ConvTranspose") or len(node.inputs) < 3:
            continue
        bias = node.inputs[2]
        value = None if bias is None else bias.const_value
        if value is not None and not value.numpy().any():
            node.resize_inputs(2)
