# SPDX-License-Identifier: Apache-2.0
# Traces a module to a graph of functional operators, every one of which has a name in ONNX.
"""From a live module to an exported program that ONNX can follow node by node.

The program computes what the module computes in evaluation mode. Batch norms and dropouts are
operators of their own (`halfstep_trace`), so that they can become the module's own batch norms and
dropouts again; operators that ONNX writes as several nodes are written as several here too, so that
every tensor which the engine may quantize is the result of one node.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import math
import os
import traceback
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .errors import UntraceableModelError

aten = torch.ops.aten

_LIBRARY = torch.library.Library("halfstep_trace", "DEF")
_LIBRARY.define(
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor variance,"
    " float momentum, float epsilon) -> Tensor"
)
_LIBRARY.define("dropout(Tensor x, float p, str kind) -> Tensor")
# Neither is ever computed: tracing asks for shapes only.
for _name in ("batch_norm", "dropout"):
    _LIBRARY.impl(_name, lambda x, *_: torch.empty_like(x), "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, lambda x, *_: torch.empty_like(x), "Meta")

BATCH_NORM = torch.ops.halfstep_trace.batch_norm.default
DROPOUT = torch.ops.halfstep_trace.dropout.default

#: Dropouts by what they drop.
DROPOUTS = {
    aten.dropout.default: "dropout",
    aten.dropout_.default: "dropout",
    aten.feature_dropout.default: "feature_dropout",
    aten.feature_dropout_.default: "feature_dropout",
    aten.alpha_dropout.default: "alpha_dropout",
    aten.alpha_dropout_.default: "alpha_dropout",
}


#: Modules that drop whole rows while training and hand their input on otherwise.
_ROW_DROPOUTS = ("StochasticDepth", "DropPath")


@contextlib.contextmanager
def _marking_row_dropouts(model: torch.nn.Module) -> Iterator[None]:
    """Let stochastic depth leave a mark in the graph, where evaluation would leave nothing."""
    marked = []
    for name, module in model.named_modules():
        if type(module).__name__ in _ROW_DROPOUTS and "forward" not in module.__dict__:
            kind = f"module:{name}"
            module.__dict__["forward"] = lambda x, kind=kind: DROPOUT(x, 0.0, kind)
            marked.append(module)
    try:
        yield
    finally:
        for module in marked:
            del module.__dict__["forward"]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep torch from printing graphs when tracing fails: the exception says what matters."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and back into its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Call(NamedTuple):
    """Arguments of a call."""

    args: tuple[Any, ...]
    keywords: dict[str, Any]
    #: The same of other calls, whose shapes are different: the graph has to serve them as well.
    others: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...] = ()


def as_arguments(dummy_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments of an AIMET-style dummy input."""
    if isinstance(dummy_input, Call):
        return dummy_input.args, dummy_input.keywords
    if isinstance(dummy_input, dict):
        return (), dict(dummy_input)
    if isinstance(dummy_input, (tuple, list)):
        return tuple(dummy_input), {}
    return (dummy_input,), {}


def trace(model: torch.nn.Module, dummy_input: Any) -> torch.export.ExportedProgram:
    """Trace a module in evaluation mode.

    Raises
    ------
    UntraceableModelError
        Naming the line of the user's code at which tracing ended.
    """
    args, kwargs = as_arguments(dummy_input)
    others = dummy_input.others if isinstance(dummy_input, Call) else ()
    with evaluating(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _marking_row_dropouts(model), _quietly():
            program = _export(model, args, kwargs, others)
        _mark_layers(program)
        try:
            program = program.run_decompositions(dict(_DECOMPOSITIONS))
        except Exception as error:
            raise UntraceableModelError(
                f"{type(model).__name__} cannot be written as functional operators: {_brief(error)}"
            ) from error
    return program


def _export(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    others: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...],
) -> torch.export.ExportedProgram:
    many, named = _doubled(args, kwargs)
    dynamic = _batch_dimensions(model, many, named)
    if others:
        # Whatever extent differs between calls is variable, and so is the batch.
        dynamic = torch.export.AdditionalInputs()
        for call in ((many, named), *others, _doubled(many, named, always=True)):
            dynamic.add(*call)
    if dynamic is not None:
        try:
            return torch.export.export(model, many, named, dynamic_shapes=dynamic, strict=False)
        except Exception:  # the batch size is part of the computation, or nothing can be traced
            pass
    try:
        return torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:
        raise UntraceableModelError(
            f"{type(model).__name__} cannot be traced: {_brief(error)}{_place(error)}"
        ) from error


def _doubled(
    args: tuple[Any, ...], kwargs: dict[str, Any], always: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Two rows instead of one, since an extent of 1 would be taken for fixed."""

    def doubled(value: Any) -> Any:
        rows = value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else 0
        one = rows == 1 or always and rows > 1
        return torch.cat([value, value]) if one else value

    return torch.utils._pytree.tree_map(doubled, (args, kwargs))


def _batch_dimensions(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A variable first extent for all tensors, if they share one that is more than 1."""
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    extents = {t.shape[0] if t.dim() else 0 for t in tensors}
    # An extent of 1 would be taken for fixed: the caller doubles it.
    if len(extents) != 1 or min(extents) < 2:
        return None
    batch = {0: torch.export.Dim("N")}
    args, kwargs = torch.utils._pytree.tree_map(
        lambda leaf: batch if isinstance(leaf, torch.Tensor) else None, (args, kwargs)
    )
    if not kwargs:
        return args
    if not args:
        return kwargs
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def _brief(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def _place(error: BaseException) -> str:
    """The innermost line outside of torch, if an exception passed one."""
    here = os.path.dirname(os.path.abspath(__file__))
    package = os.path.dirname(os.path.abspath(torch.__file__))
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        for frame in reversed(traceback.extract_tb(link.__traceback__)):
            inside = frame.filename.startswith((here, package, "<"))
            if not inside and f"{os.sep}site-packages{os.sep}torch" not in frame.filename:
                return f" (at {frame.filename}:{frame.lineno}, in {frame.name}: {frame.line})"
        link = link.__cause__ or link.__context__
    return ""


# -------------------------------------------------------------------------------------------------
# Layers that behave differently while training


def _mark_layers(program: torch.export.ExportedProgram) -> None:
    """Turn batch norms and dropouts into operators of their own."""
    graph = program.graph_module.graph
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in DROPOUTS:
            x, p, _ = node.args
            node.args, node.kwargs = (x, float(p), DROPOUTS[node.target]), {}
            node.target = DROPOUT
        elif node.target is aten.batch_norm.default:
            x, weight, bias, mean, variance, training, momentum, epsilon, _ = node.args
            if mean is None or variance is None or training:
                continue  # normalizes by its own batch also in evaluation mode
            node.args = (x, weight, bias, mean, variance, float(momentum), float(epsilon))
            node.kwargs = {}
            node.target = BATCH_NORM
    program.graph_module.recompile()


# -------------------------------------------------------------------------------------------------
# Operators that are several nodes in ONNX


def _with_tensor(x: Any, other: Any, alpha: Any, function: Any) -> Any:
    """Make a number beside a tensor a tensor: the engine sees it as one, and may quantize it."""
    if isinstance(other, torch.Tensor) or isinstance(other, (bool, complex)) or alpha != 1:
        return NotImplemented
    if not isinstance(other, (int, float)) or not x.dtype.is_floating_point:
        return NotImplemented
    return function(x, aten.full.default([], other, dtype=x.dtype, device=x.device))


def _add(x: Any, other: Any, *, alpha: Any = 1) -> Any:
    return _with_tensor(x, other, alpha, aten.add.Tensor)


def _sub(x: Any, other: Any, *, alpha: Any = 1) -> Any:
    return _with_tensor(x, other, alpha, aten.sub.Tensor)


def _mul(x: Any, other: Any) -> Any:
    return _with_tensor(x, other, 1, aten.mul.Tensor)


def _div(x: Any, other: Any) -> Any:
    return _with_tensor(x, other, 1, aten.div.Tensor)


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    if x.dim() == 2:
        return NotImplemented
    rows = aten.linear.default(aten.reshape.default(x, [-1, x.shape[-1]]), weight, bias)
    return aten.reshape.default(rows, [*x.shape[:-1], weight.shape[0]])


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = aten.matmul.default(query, key.transpose(-2, -1)) * factor
    if is_causal:
        attn_mask = torch.ones(
            query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device
        ).tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(attn_mask.logical_not(), -1e4)
        else:
            scores = scores + attn_mask
    weights = aten.softmax.int(scores, -1)
    if dropout_p > 0:
        weights = DROPOUT(weights, dropout_p, "dropout")
    return aten.matmul.default(weights, value)


def _roll(x: torch.Tensor, shifts: Any, dims: Any = ()) -> Any:
    if not dims:
        return NotImplemented
    for shift, dim in zip(shifts, dims, strict=True):
        extent = x.shape[dim]
        if not isinstance(extent, int) or not isinstance(shift, int):
            return NotImplemented
        cut = -shift % extent if extent else 0
        if cut:
            end, begin = aten.slice.Tensor(x, dim, cut), aten.slice.Tensor(x, dim, 0, cut)
            x = aten.cat.default([end, begin], dim)
    return x


def _index(x: torch.Tensor, indices: Any) -> Any:
    """Make picking rows by one tensor of numbers what ONNX calls Gather."""
    chosen = [axis for axis, index in enumerate(indices) if index is not None]
    if len(chosen) != 1:
        return NotImplemented
    (axis,), index = chosen, indices[chosen[0]]
    if index.dtype not in (torch.int64, torch.int32):
        return NotImplemented
    rows = aten.index_select.default(x, axis, aten.reshape.default(index, [-1]))
    if index.dim() == 1:
        return rows
    return aten.reshape.default(rows, [*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


def _filled(x: torch.Tensor, size: Any, value: Any, options: dict[str, Any]) -> Any:
    """Make a constant of what has a fixed shape."""
    if not all(isinstance(extent, int) for extent in size):
        return NotImplemented
    dtype = options.get("dtype") or x.dtype
    return aten.full.default(size, value, dtype=dtype, device=options.get("device") or x.device)


def _new_zeros(x: torch.Tensor, size: Any, **options: Any) -> Any:
    return _filled(x, size, 0, options)


def _new_ones(x: torch.Tensor, size: Any, **options: Any) -> Any:
    return _filled(x, size, 1, options)


def _new_full(x: torch.Tensor, size: Any, value: Any, **options: Any) -> Any:
    return _filled(x, size, value, options)


def _addmm(bias: torch.Tensor, x: torch.Tensor, y: torch.Tensor, beta: Any = 1, alpha: Any = 1):
    if beta != 1 or alpha != 1:
        return NotImplemented
    return aten.mm.default(x, y) + bias


_DECOMPOSITIONS = {
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
    aten.mul.Tensor: _mul,
    aten.div.Tensor: _div,
    aten.silu.default: _silu,
    aten.linear.default: _linear,
    aten.scaled_dot_product_attention.default: _attention,
    aten.addmm.default: _addmm,
    aten.roll.default: _roll,
    aten.index.Tensor: _index,
    aten.new_zeros.default: _new_zeros,
    aten.new_ones.default: _new_ones,
    aten.new_full.default: _new_full,
}
