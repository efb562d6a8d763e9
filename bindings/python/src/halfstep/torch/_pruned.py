# SPDX-License-Identifier: Apache-2.0
# Live modules with fewer channels.
"""Puts parameters that lost channels into a copy of a module, and tells its layers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .._prune import new_values
from ..compression import CompressionStats
from ..errors import UnsupportedOperatorError
from ..model import Model


def parameter(like: nn.Parameter, value: np.ndarray) -> nn.Parameter:
    """Return a value as a parameter that is where another one is, and trains if that does."""
    tensor = torch.from_numpy(np.array(value)).to(like.device, like.dtype)
    return nn.Parameter(tensor, requires_grad=like.requires_grad)


def pruned(
    model: nn.Module, layers: dict[str, str], smaller: Model, stats: CompressionStats
) -> nn.Module:
    """Return a copy of a module with the channels that the engine left.

    Parameters
    ----------
    model : torch.nn.Module
        The module.
    layers : dict of str to str
        Names of layers by weight.
    smaller : Model
        The engine's pruned model.
    stats : CompressionStats
        What pruning did.

    Raises
    ------
    UnsupportedOperatorError
        If a constant that is no parameter lost channels.
    """
    result = copy.deepcopy(model)
    changed: dict[int, nn.Module] = {}
    for name, value in new_values(smaller, stats).items():
        path, _, key = name.rpartition(".")
        try:
            owner = result.get_submodule(path)
            old = getattr(owner, key)
        except AttributeError:
            old = None
        if not isinstance(old, torch.Tensor):
            raise UnsupportedOperatorError(f"constant '{name}' is no parameter of the model")
        if isinstance(old, nn.Parameter):
            setattr(owner, key, parameter(old, value))
        else:
            setattr(owner, key, torch.from_numpy(np.array(value)).to(old.device, old.dtype))
        changed[id(owner)] = owner
    values = smaller.initializers
    for layer in stats.layers:
        if layer.bias is None or layer.weight not in layers:
            continue
        owner = result.get_submodule(layers[layer.weight])
        like: Any = owner.weight if owner.bias is None else owner.bias
        owner.bias = parameter(like, values[layer.bias].reshape(-1))
    for owner in changed.values():
        _count(owner)
    return result


def _count(layer: Any) -> None:
    """Tell a layer how many channels its parameters have."""
    if isinstance(layer, _ConvNd):
        is_transposed = isinstance(layer, _ConvTransposeNd)
        first, second = layer.weight.shape[:2]
        before = (layer.in_channels, layer.out_channels)
        in_group, out_group = (extent // layer.groups for extent in before)
        if layer.groups > 1 and (in_group == 1 or out_group == 1):
            # Such groups go as a whole.
            layer.groups = first // (in_group if is_transposed else out_group)
        counts = (first, second * layer.groups)
        layer.in_channels, layer.out_channels = counts if is_transposed else counts[::-1]
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, _NormBase):
        layer.num_features = len(layer.running_mean if layer.weight is None else layer.weight)
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(layer.weight)
