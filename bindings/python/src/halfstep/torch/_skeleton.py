# SPDX-License-Identifier: Apache-2.0
# The layers of a module, and nothing of what lies between them.
"""A network of a module's convolutions and linear layers, each with an input of its own.

That is all the engine needs to split layers for their weights alone, and one pass without numbers
finds it, where tracing and writing the whole network as ONNX takes seconds. Layers have the names,
weights and shapes that they have in that network. Whatever this pass does not understand for sure,
it leaves to the whole network: layers whose weights are computed, products of other kinds, control
flow that depends on data, layers that nothing reads.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from . import _onnx, _trace, _wire

_CONVOLUTIONS = {torch.conv1d: "conv1d", torch.conv2d: "conv2d", torch.conv3d: "conv3d"}
#: Functions of parameters that are no products.
_OTHERS = {
    F.batch_norm,
    F.embedding,
    F.group_norm,
    F.instance_norm,
    F.layer_norm,
    F.prelu,
    F.rms_norm,
}
#: Functions that the whole network may hold as layers, if what they multiply is constant.
_PRODUCTS = {
    *(torch.addbmm, torch.addmm, torch.addmv, torch.baddbmm, torch.bmm, torch.chain_matmul),
    *(torch.dot, torch.einsum, torch.inner, torch.matmul, torch.mm, torch.mv, torch.tensordot),
    *(torch.Tensor.addbmm, torch.Tensor.addmm, torch.Tensor.addmv, torch.Tensor.baddbmm),
    *(torch.Tensor.bmm, torch.Tensor.dot, torch.Tensor.inner, torch.Tensor.matmul),
    *(torch.Tensor.mm, torch.Tensor.mv, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__),
    *(torch.linalg.matmul, torch.linalg.multi_dot, torch.linalg.vecdot),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d, torch.conv_tbc),
}
#: Bytes of all inputs and outputs of layers; beyond, the whole network takes less memory.
_LIMIT = 1 << 30


class Skeleton(NamedTuple):
    """A module's layers as a network."""

    #: ONNX; parameters are inputs, by their names in the module.
    data: bytes
    #: These parameters.
    parameters: tuple[str, ...]
    #: Parameters and buffers that the module's network reads, in order.
    state: tuple[str, ...]
    #: How often each of them is read.
    calls: Counter[str]


class _Unclear(Exception):
    """The whole network is needed."""


def skeleton(model: nn.Module, dummy_input: Any) -> Skeleton | None:
    """Return a module's layers; None if the whole network is needed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _skeleton(model, dummy_input)
    except Exception:  # tracing says what is wrong, if anything is
        return None


def _skeleton(model: nn.Module, dummy_input: Any) -> Skeleton:
    names: dict[int, str] = {}
    # The module's parts, on parameters that have a shape and no numbers.
    memo: dict[int, Any] = {}
    tensors = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    kept = []
    for name, tensor in tensors:
        if id(tensor) in memo or type(tensor) not in (torch.Tensor, nn.Parameter):
            raise _Unclear
        shape = _shape(tensor, tensor.shape)
        memo[id(tensor)] = nn.Parameter(shape) if isinstance(tensor, nn.Parameter) else shape
        names[id(memo[id(tensor)])] = name
        kept.append(tensor)
    shadow = copy.deepcopy(model, memo).eval()
    args, kwargs = _shapes(dummy_input, any(t.dtype != torch.float32 for t in kept if _real(t)))
    recorder = _Recorder(names)
    with torch.enable_grad(), torch.device("meta"), recorder:
        results = shadow(*args, **kwargs)
    for part in shadow.modules():
        if any(isinstance(value, torch.Tensor) for value in vars(part).values()):
            raise _Unclear  # what a call leaves behind has no place in a network
    recorder.check(results)
    return recorder.result()


def _real(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point()


def _shape(tensor: torch.Tensor, shape: Any) -> torch.Tensor:
    """A tensor without numbers; whatever a module computes in, its network is of float32."""
    dtype = torch.float32 if _real(tensor) else tensor.dtype
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=False)


def _shapes(dummy_input: Any, is_other: bool) -> Any:
    """Arguments without numbers: one sample, if the batch is what they have in common."""
    arguments = _trace.as_arguments(dummy_input)
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    batches = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors}
    single = len(batches) == 1 and min(batches) > 0

    def shape(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.is_complex() or (_real(value) and value.dtype != torch.float32 and not is_other):
            raise _Unclear
        return _shape(value, (1, *value.shape[1:]) if single else value.shape)

    return tree_map(shape, arguments)


class _Recorder(TorchFunctionMode):
    """Notes what is computed from parameters."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.calls: Counter[str] = Counter()
        self.nodes: list[bytes] = []
        self.inputs: dict[str, tuple[int, ...]] = {}
        self.parameters: dict[str, tuple[int, ...]] = {}
        self.outputs: dict[str, tuple[int, ...]] = {}
        self.elements = 0
        self._numbers: Counter[str] = Counter()
        #: What computes gradients of each recorded result: it shows what the results depend on.
        self._functions: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        read = [self.names[id(x)] for x in leaves if id(x) in self.names]
        if func in _PRODUCTS:
            raise _Unclear
        result = func(*args, **kwargs)
        is_layer = func in _CONVOLUTIONS or func is F.linear
        if not is_layer and not (read and _tensors(result)):
            return result
        if is_layer:
            self._layer(func, args, kwargs, result)
        elif func not in _OTHERS:
            raise _Unclear
        self.calls.update(read)
        self._functions.append(result.grad_fn)
        return result

    def _layer(self, func: Any, args: Any, kwargs: Any, result: torch.Tensor) -> None:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        x, weight, bias = given["input"], given["weight"], given.get("bias")
        if any(tensor is not None and id(tensor) not in self.names for tensor in (weight, bias)):
            raise _Unclear
        attributes: dict[str, Any]
        if func is F.linear:
            if weight.dim() != 2:
                raise _Unclear
            kind, op_type, attributes = "linear", "Gemm", {"transB": 1}
            # Rows are samples, whatever the axes before them.
            shape, result = (1, weight.shape[1]), weight.new_empty((1, weight.shape[0]))
        else:
            if x.dim() != weight.dim():
                raise _Unclear
            kind, shape, attributes = _convolution(func, args, kwargs, x, weight)
            op_type = "Conv"
        self.elements += math.prod(shape) + result.numel()
        number = self._numbers[kind]
        self._numbers[kind] += 1
        # As torch's exporter names operators.
        output = f"{kind}_{number}" if number else kind
        inputs = [f"{output}.input"]
        self.inputs[inputs[0]] = shape
        for tensor in (weight, bias):
            if tensor is not None:
                inputs.append(self.names[id(tensor)])
                self.parameters[inputs[-1]] = tuple(tensor.shape)
        self.nodes.append(_wire.node(f"node_{output}", op_type, inputs, output, attributes))
        self.outputs[output] = tuple(result.shape)

    def check(self, results: Any) -> None:
        """Refuse layers that the results do not depend on, and parameters that nobody noted."""
        waiting = [tensor.grad_fn for tensor in _tensors(results)]
        seen: set[Any] = set()
        while waiting:
            function = waiting.pop()
            if function is None or function in seen:
                continue
            seen.add(function)
            waiting += [following for following, _ in function.next_functions]
            variable = getattr(function, "variable", None)
            if variable is not None and self.names.get(id(variable)) not in self.calls:
                raise _Unclear
        if any(function not in seen for function in self._functions):
            raise _Unclear
        if (
            not self.nodes
            or self.elements * 4 > _LIMIT
            or self.parameters.keys() & self.outputs.keys()
        ):
            raise _Unclear

    def result(self) -> Skeleton:
        inputs = self.inputs | self.parameters
        data = _wire.model(self.nodes, inputs, self.outputs, _onnx.OPSET)
        return Skeleton(data, tuple(self.parameters), tuple(sorted(self.calls)), self.calls)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _convolution(
    func: Any, args: Any, kwargs: Any, x: torch.Tensor, weight: torch.Tensor
) -> tuple[str, tuple[int, ...], dict[str, Any]]:
    """Name, shape of the input and attributes of a convolution."""
    keys = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    given |= dict(zip(keys, args, strict=False)) | kwargs
    kernel = tuple(weight.shape[2:])
    axes = len(kernel)

    def each(value: Any) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * axes if len(values) == 1 else values

    strides, dilations, padding = each(given["stride"]), each(given["dilation"]), given["padding"]
    shape, kind = list(x.shape), _CONVOLUTIONS[func]
    if isinstance(padding, str):
        kind = "convolution"
        spans = zip(dilations, kernel, strict=True)
        total = [d * (k - 1) if padding == "same" else 0 for d, k in spans]
        before, after = [t // 2 for t in total], [t - t // 2 for t in total]
        if before != after:
            # Padded by an operator of its own.
            shape[2:] = [extent + t for extent, t in zip(shape[2:], total, strict=True)]
            before = after = [0] * axes
    else:
        before = after = each(padding)
    if shape[1] != weight.shape[1] * given["groups"]:
        raise _Unclear
    attributes = {
        "group": given["groups"],
        "pads": [*before, *after],
        "strides": strides,
        "dilations": dilations,
        "kernel_shape": kernel,
    }
    return kind, tuple(shape), attributes
