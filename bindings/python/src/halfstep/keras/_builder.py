# SPDX-License-Identifier: Apache-2.0
# The ONNX graph of a Keras model while it is being written.
"""Values, parameters and nodes of an ONNX graph that is made layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from ..errors import UnsupportedOperatorError

OPSET = 20


def memory_of(variable: Any) -> np.ndarray:
    """Return a variable's present value, read-only, without copying it where it is on the CPU.

    TensorFlow counts who refers to a variable's memory: what is assigned later goes elsewhere while
    somebody does, so the array does not change.
    """
    return np.asarray(memoryview(tf.convert_to_tensor(variable)))


def _regrouped(value: np.ndarray, blocks: tuple[int, ...]) -> np.ndarray:
    """Return the blocks of the last axis in another order."""
    if blocks in ((), tuple(range(len(blocks)))):
        return value
    parts = value.reshape(*value.shape[:-1], len(blocks), -1)
    return parts[..., list(blocks), :].reshape(value.shape)


class Parameter(NamedTuple):
    """How a variable of a layer becomes a constant of the graph, and back."""

    #: The variable.
    variable: Any
    #: Order in which the constant takes the variable's axes.
    order: tuple[int, ...]
    #: Shape of the constant.
    shape: tuple[int, ...]
    #: Order in which the constant takes the blocks that the variable's last axis consists of.
    blocks: tuple[int, ...] = ()
    #: Zeros that the constant has behind the variable's elements.
    zeros: int = 0

    def constant(self) -> np.ndarray:
        """Return the constant's present value, a view of the variable's where that is possible."""
        value = _regrouped(memory_of(self.variable), self.blocks).transpose(self.order)
        if self.zeros:
            value = np.concatenate([value.reshape(-1), np.zeros(self.zeros, value.dtype)])
        return value.reshape(self.shape)

    def value(self, constant: Any) -> np.ndarray:
        """Return what the variable has to be for the constant to have this value."""
        full = tuple(self.variable.shape[axis] for axis in self.order)
        constant = np.asarray(constant)
        if self.zeros:
            constant = constant.reshape(-1)[: -self.zeros]
        value = constant.reshape(full).transpose(np.argsort(self.order))
        return _regrouped(value, tuple(int(one) for one in np.argsort(self.blocks)))


class Node(NamedTuple):
    """An operator, as ONNX and as the simulation run it."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    name: str
    #: Label of the layer call that it belongs to.
    label: str


class Value:
    """A tensor of the Keras graph, and its names in the ONNX graph by layout.

    Attributes
    ----------
    shape : tuple
        As Keras has it: None where an extent is not fixed.
    last : str or None
        Name of the tensor in Keras's order of axes.
    first : str or None
        Name of the tensor with the last axis moved behind the batch.
    """

    def __init__(
        self, shape: Sequence[int | None], last: str | None = None, first: str | None = None
    ) -> None:
        self.shape = tuple(shape)
        self.last = last
        self.first = first

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)


class Builder:
    """Collects what a graph consists of."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        #: Constants that are variables of the model, by name.
        self.parameters: dict[str, Parameter] = {}
        #: Other constants, by name.
        self.constants: dict[str, np.ndarray] = {}
        self.inputs: list[tuple[str, tuple[int | None, ...], str]] = []
        self.outputs: list[tuple[str, tuple[int | None, ...]]] = []
        self.label = ""
        self._names: set[str] = set()
        self._titles: set[str] = set()

    # ---------------------------------------------------------------------------------------------
    # Names and constants

    def fresh(self, name: str) -> str:
        """Return the name, or one like it that is not taken."""
        result, count = name, 0
        while result in self._names:
            count += 1
            result = f"{name}_{count}"
        self._names.add(result)
        return result

    def constant(self, value: Any, suffix: str, dtype: Any = np.float32) -> str:
        """Add a constant to the present layer and return its name."""
        name = self.fresh(f"{self.label}/{suffix}")
        self.constants[name] = np.asarray(value, dtype)
        return name

    def parameter(
        self,
        variable: Any,
        suffix: str,
        order: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
        blocks: tuple[int, ...] = (),
        zeros: int = 0,
    ) -> str:
        """Bind a variable of the present layer and return the name of the constant."""
        order = tuple(range(len(variable.shape))) if order is None else tuple(order)
        full = tuple(int(variable.shape[axis]) for axis in order)
        shape = full if shape is None else tuple(int(n) for n in shape)
        for name, known in self.parameters.items():
            if known.variable is variable and known[1:] == (order, shape, blocks, zeros):
                return name
        if keras.backend.standardize_dtype(variable.dtype) != "float32":
            raise UnsupportedOperatorError(f"weight '{variable.path}' is {variable.dtype}")
        name = self.fresh(f"{self.label}/{suffix}")
        self.parameters[name] = Parameter(variable, order, shape, blocks, zeros)
        return name

    # ---------------------------------------------------------------------------------------------
    # Nodes

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        suffix: str | None = None,
        outputs: int = 1,
        named: bool = False,
        unused: Sequence[int] = (),
        **attributes: Any,
    ) -> Any:
        """Add an operator and return the name of its output, or the names of several.

        Parameters
        ----------
        op : str
            ONNX operator.
        inputs : sequence of str
            Tensors, "" for none.
        suffix : str, optional
            What follows the layer's label in the output's name; without it, the output bears the
            label alone.
        named : bool
            Whether the node bears the label alone whatever its output is called.
        unused : sequence of int
            Outputs of several that nobody reads: they have no name.
        """
        name = self.label if suffix is None else f"{self.label}/{suffix}"
        if outputs == 1:
            made: tuple[str, ...] = (self.fresh(name),)
        else:
            made = tuple(
                "" if index in unused else self.fresh(f"{name}:{index}") for index in range(outputs)
            )
        title = self.label if named else made[0]
        if title in self._titles:
            title = f"{title}/{op}"
        while title in self._titles:
            title += "_"
        self._titles.add(title)
        self.nodes.append(Node(op, tuple(inputs), made, attributes, title, self.label))
        return made[0] if outputs == 1 else made

    def last(self, value: Value) -> str:
        """Return the tensor in Keras's order of axes."""
        if value.last is None:
            order = (0, *range(2, value.rank), 1)
            value.last = self._transposed(value.first, order, "last")
        return value.last

    def first(self, value: Value) -> str:
        """Return the tensor with channels behind the batch."""
        if value.rank < 3:
            return self.last(value)
        if value.first is None:
            order = (0, value.rank - 1, *range(1, value.rank - 1))
            value.first = self._transposed(value.last, order, "first")
        return value.first

    def _transposed(self, name: str | None, order: tuple[int, ...], what: str) -> str:
        assert name is not None
        made = self.fresh(f"{name}/{what}")
        self.nodes.append(Node("Transpose", (name,), (made,), {"perm": list(order)}, made, ""))
        return made

    # ---------------------------------------------------------------------------------------------
    # Files

    def to_bytes(self) -> bytes:
        """Return the ONNX model, with parameters as inputs that are still to be bound."""
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        types = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
        types |= {"int64": TensorProto.INT64, "bool": TensorProto.BOOL}
        for name, _, dtype in self.inputs:
            if dtype not in types:
                raise UnsupportedOperatorError(f"input '{name}' is {dtype}: expected float32")

        def extents(shape: Sequence[int | None], name: str) -> list[Any]:
            return [
                ("N" if axis == 0 else f"{name}_{axis}") if n is None else n
                for axis, n in enumerate(shape)
            ]

        inputs = [
            helper.make_tensor_value_info(name, types[dtype], extents(shape, name))
            for name, shape, dtype in self.inputs
        ]
        inputs += [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, parameter.shape)
            for name, parameter in self.parameters.items()
        ]
        graph = helper.make_graph(
            [
                helper.make_node(n.op, n.inputs, n.outputs, name=n.name, **n.attributes)
                for n in self.nodes
            ],
            "keras",
            inputs,
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, extents(shape, name))
                for name, shape in self.outputs
            ],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        model = helper.make_model(
            graph, producer_name="halfstep.keras", opset_imports=[helper.make_opsetid("", OPSET)]
        )
        model.ir_version = min(model.ir_version, 10)
        del onnx
        return model.SerializeToString()
