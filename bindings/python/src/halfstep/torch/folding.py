# SPDX-License-Identifier: Apache-2.0
# Batch-norm folding and cross-layer equalization of live modules.
"""What the engine does to a network's parameters, done to a live `torch.nn.Module`."""

from __future__ import annotations

from collections.abc import Set
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import InvalidArgumentError, InvalidStateError, UnsupportedOperatorError
from ..model import Model
from ..records import EqualizationReport, EqualizedSet
from ._network import Network, as_array, nodes
from .quantizer import Quantizer


class FoldedPair(NamedTuple):
    """A layer and the batch norm that it took in."""

    #: The layer, as it is in the model.
    layer: nn.Module
    #: The batch norm, which is no longer in the model.
    batch_norm: nn.Module


class BoundedReLU(nn.Module):
    """A ReLU6 whose channels were scaled: each has a bound of its own.

    Parameters
    ----------
    bound : torch.Tensor
        Largest output of each channel, ``[1, C, 1, 1]`` or of another shape that broadcasts.
    """

    bound: torch.Tensor

    def __init__(self, bound: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("bound", bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return values between 0 and the bound."""
        return torch.minimum(torch.relu(x), self.bound)

    def extra_repr(self) -> str:
        """Return the spread of the bounds."""
        return f"{self.bound.numel()} bounds"


def fold_all_batch_norms(
    model: nn.Module, input_shapes: Any = None, dummy_input: Any = None
) -> list[FoldedPair]:
    """Fold batch norms into the layers beside them, in place; the function stays the same.

    The engine decides which fold. A folded batch norm becomes `torch.nn.Identity`, a convolution
    without bias gets one. Other parameters keep their names and their identity.

    Parameters
    ----------
    model : torch.nn.Module
        The network, on the CPU or another device.
    input_shapes : tuple, or torch.Tensor
        Shape of the input, or a list of shapes; or a dummy input.
    dummy_input : torch.Tensor, or tuple or dict of them, optional
        Inputs that the module accepts, in place of shapes.

    Returns
    -------
    list of FoldedPair
        Layers with the batch norms that they took in.

    Raises
    ------
    UntraceableModelError
        If the module cannot be made a graph; the message names the line.
    UnsupportedOperatorError
        If a layer that is called several times would have to be two, or a batch norm that would
        fold is no module; the model is unchanged.
    NonFiniteValueError

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4))
    >>> [(type(layer).__name__, type(norm).__name__)
    ...  for layer, norm in fold_all_batch_norms(net, torch.randn(1, 3, 8, 8))]
    [('Conv2d', 'BatchNorm2d')]
    >>> net
    Sequential(
      (0): Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
      (1): Identity()
    )
    """
    live = _LiveModel(model, input_shapes, dummy_input)
    return live.fold()


def equalize_model(
    model: nn.Module,
    input_shapes: Any = None,
    dummy_input: Any = None,
    *,
    absorb_high_biases: bool = False,
    max_iterations: int = 50,
) -> EqualizationReport:
    """Fold batch norms and balance the weight ranges of consecutive layers, in place.

    The function stays the same. A ReLU6 between layers that are scaled becomes a `BoundedReLU`.

    Parameters
    ----------
    model : torch.nn.Module
        The network, on the CPU or another device.
    input_shapes, dummy_input
        As for `fold_all_batch_norms`.
    absorb_high_biases : bool
        Whether the next layer absorbs high biases, which changes the function where padding is.
    max_iterations : int
        Passes over the model at most, 1 or more.

    Returns
    -------
    EqualizationReport
        Sets of layers by their names in the model, with the factors of the tensors between them.

    Raises
    ------
    UntraceableModelError, UnsupportedOperatorError
        As for `fold_all_batch_norms`; also if a functional ReLU6 would have to become a module.
    InvalidArgumentError, NonFiniteValueError

    References
    ----------
    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019.
    arXiv:1906.04721
    """
    live = _LiveModel(model, input_shapes, dummy_input)
    return live.equalize(absorb_high_biases, max_iterations)


def _dummy(model: nn.Module, input_shapes: Any, dummy_input: Any) -> Any:
    """Return inputs to trace with, from what AIMET's callers give."""
    if dummy_input is not None:
        return dummy_input
    if input_shapes is None:
        raise InvalidArgumentError("expected a dummy input or the shape of one")
    first = input_shapes[0] if isinstance(input_shapes, (tuple, list)) else input_shapes
    if isinstance(input_shapes, (torch.Tensor, dict)) or isinstance(first, torch.Tensor):
        return input_shapes
    like = next(model.parameters(), torch.zeros(()))
    shapes = [input_shapes] if isinstance(first, int) else input_shapes
    return tuple(torch.zeros(tuple(s), device=like.device, dtype=like.dtype) for s in shapes)


class _LiveModel:
    """A live module, and the engine's model of it before and after a change."""

    def __init__(self, model: nn.Module, input_shapes: Any, dummy_input: Any) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if any(isinstance(part, Quantizer) for part in model.modules()):
            raise InvalidStateError("the model has quantizers: fold and equalize the original")
        self.model = model
        self.network = Network(model, _dummy(model, input_shapes, dummy_input))
        self.changed: Model = self.network.bound(model)
        self.before = nodes(self.network.exported.data)

    def fold(self) -> list[FoldedPair]:
        folds = self.changed.fold_batch_norms()
        pairs = self._pairs(folds)
        self._write_back({fold.batch_norm for fold in folds})
        return [FoldedPair(layer, norm) for layer, norm in pairs]

    def equalize(self, absorb_high_biases: bool, max_iterations: int) -> EqualizationReport:
        folds = self.changed.fold_batch_norms()
        report = self.changed.equalize(
            absorb_high_biases=absorb_high_biases, max_iterations=max_iterations
        )
        self._pairs(folds)
        names = {node: self._layer_name(node) for one in report.sets for node in one.layers}
        self._write_back({fold.batch_norm for fold in folds})
        return EqualizationReport(
            report.iterations,
            tuple(
                EqualizedSet(tuple(names[node] for node in one.layers), one.factors)
                for one in report.sets
            ),
        )

    # ---------------------------------------------------------------------------------------------

    def _pairs(self, folds: Any) -> list[tuple[nn.Module, nn.Module]]:
        pairs = []
        for fold in folds:
            norm = self.model.get_submodule(self._norm_name(fold.batch_norm))
            pairs.append((self.model.get_submodule(self._layer_name(fold.layer)), norm))
        return pairs

    def _layer_name(self, node: str) -> str:
        """Name of the module whose weight a layer of the graph reads."""
        weight = self.before[node].inputs[1]
        owner = weight.rpartition(".")[0]
        if weight not in self.network.exported.state:
            raise UnsupportedOperatorError(f"the weight of '{node}' is no parameter of the model")
        readers = [n for n, one in self.before.items() if weight in one.inputs]
        if len(readers) > 1:
            raise UnsupportedOperatorError(
                f"layer '{owner}' is called {len(readers)} times with one weight: it cannot change"
                " for one call only"
            )
        return owner

    def _norm_name(self, node: str) -> str:
        """Name of the module that is a batch norm of the graph."""
        name = self.before[node].inputs[3].rpartition(".")[0]
        try:
            module = self.model.get_submodule(name)
        except AttributeError:
            module = None
        if not name or not isinstance(module, _BatchNorm):
            raise UnsupportedOperatorError(
                f"batch norm '{node}' is a function call, which cannot be taken out of the model:"
                " make it a torch.nn.BatchNorm module"
            )
        calls = sum(self.before[node].inputs[3] in one.inputs for one in self.before.values())
        if calls > 1:
            raise UnsupportedOperatorError(
                f"batch norm '{name}' is called {calls} times: it cannot fold into one layer"
            )
        return name

    def _write_back(self, folded: Set[str]) -> None:
        """Give the module what the engine's model holds now; all of it, or nothing on an error."""
        values = self.changed.initializers
        # Without weights, what is written is the structure alone.
        structure = self.changed.copy()
        for name in values:
            structure.take_initializer(name)
        after = nodes(structure.to_bytes())
        state = set(self.network.exported.state)
        parameters: dict[str, np.ndarray] = {}
        bounds: dict[str, np.ndarray] = {}
        for name, node in after.items():
            old = self.before.get(name)
            if old is None:
                continue
            if old.op_type == "Clip" and node.op_type == "Relu":
                bounds[self._activation_name(name)] = values[after[f"{name}.bound"].inputs[1]]
                continue
            for position, tensor in enumerate(node.inputs):
                if tensor not in values:
                    continue
                source = old.inputs[position] if position < len(old.inputs) else ""
                if source in state:
                    target = source
                elif position == 2 and not source and len(old.inputs) > 1:
                    target = f"{self._layer_name(name)}.bias"
                else:
                    continue
                parameters[target] = values[tensor]
        norms = [self._norm_name(node) for node in folded]

        with torch.no_grad():
            for target, value in parameters.items():
                owner, _, key = target.rpartition(".")
                _store(self.model.get_submodule(owner), key, torch.from_numpy(value.copy()))
            for target in norms:
                _replace(self.model, target, nn.Identity())
            for target, value in bounds.items():
                like = next(self.model.parameters())
                bound = torch.from_numpy(value.copy()).to(like.device, like.dtype)
                _replace(self.model, target, BoundedReLU(bound))

    def _activation_name(self, node: str) -> str:
        """Name of the module that is a Clip of the graph."""
        scopes = self.network.exported.scopes.get(node, ())
        name = scopes[-1] if scopes else ""
        module = self.model.get_submodule(name)
        if not isinstance(module, nn.Hardtanh):
            raise UnsupportedOperatorError(
                f"'{node}' in '{name}' is a function call, which cannot get a bound for each"
                " channel: make it a torch.nn.ReLU6 module"
            )
        calls = sum(one[-1:] == (name,) for one in self.network.exported.scopes.values())
        if calls > 1:
            raise UnsupportedOperatorError(
                f"activation '{name}' is called {calls} times: it cannot get bounds by channel"
            )
        return name


def _store(module: nn.Module, key: str, value: torch.Tensor) -> None:
    """Write a parameter or buffer of a module, creating a bias if there is none."""
    old = getattr(module, key, None)
    if isinstance(old, torch.Tensor):
        if not np.array_equal(as_array(old), value.numpy().reshape(tuple(old.shape))):
            old.copy_(value.reshape(old.shape))
        return
    like = next(module.parameters())
    parameter = nn.Parameter(value.to(like.device, like.dtype), requires_grad=like.requires_grad)
    module.register_parameter(key, parameter)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, key = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), key, module)
