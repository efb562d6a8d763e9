# SPDX-License-Identifier: Apache-2.0
# Channel pruning of live models, whatever the framework.
"""What pruned constants are, and which channels a live model's program cannot do without.

The engine follows channels through the graph of a model, and can change every number of channels
in it. In a live model only parameters can change: a program that says ``view(8, 64, 7, 7)`` runs
with 64 channels only. Which channels these are is found out by pruning some and running the
program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .compression import CompressionStats, ModelCompressor
from .errors import UnsupportedOperatorError
from .model import Model

#: How much of an output's norm the live model's may differ from the engine's when both are pruned:
#: far more than sums in another order make, far less than channels in the wrong place.
_TOLERANCE = 1e-2


def new_values(smaller: Model, stats: CompressionStats) -> dict[str, np.ndarray]:
    """Values of the constants that lost channels, by their names before.

    Raises
    ------
    UnsupportedOperatorError
        For a constant that keeps different channels in different places.
    """
    made = smaller.initializers
    found: dict[str, str] = {}
    for constant in stats.constants:
        known = found.setdefault(constant.name, constant.result)
        is_left = constant.result != constant.name and constant.name in made
        if is_left or not np.array_equal(made[known], made[constant.result]):
            raise UnsupportedOperatorError(
                f"constant '{constant.name}' would keep different channels in different places"
            )
    return {name: made[result] for name, result in found.items()}


def fixed_layers(backend: Any, make: Callable[[], ModelCompressor]) -> dict[str, str]:
    """Layers, by weight, whose inputs the program of a live model cannot do without, and why.

    Parameters
    ----------
    backend : Backend
        The live model.
    make : callable
        Returns a compressor that needs no data and keeps the inputs of ``backend.fixed``.
    """
    backend.fixed = {}
    inputs = backend.example()
    compressor = make()
    sizes = {layer.weight: max(layer.maximum_rank // 2, 1) for layer in compressor.layers}
    if _problem(backend, compressor, sizes, inputs) is None:
        return {}
    for layer in compressor.layers:
        problem = _problem(backend, compressor, {layer.weight: sizes[layer.weight]}, inputs)
        if problem is not None:
            backend.fixed |= dict.fromkeys(layer.readers, problem)
    compressor = make()
    sizes = {layer.weight: sizes[layer.weight] for layer in compressor.layers}
    problem = _problem(backend, compressor, sizes, inputs)
    if problem is not None:
        raise UnsupportedOperatorError(f"the model cannot be pruned: {problem}")
    return backend.fixed


def _problem(
    backend: Any, compressor: ModelCompressor, sizes: dict[str, int], inputs: dict[str, Any]
) -> str | None:
    """Why a live model does not compute what the engine computes when both are pruned; or None."""
    smaller, stats = compressor.compress(ranks=sizes)
    if not stats.constants:
        return None
    expected = list(smaller.run(inputs).values())
    try:
        actual = backend.outputs(backend.swapped(smaller, stats), inputs)
    except Exception as error:
        # Whatever a program raises when a number of channels is another than it was written for.
        reason = str(error).strip().split("\n")[0]
        return f"the program does not run with fewer of its input channels: {reason}"
    for ours, theirs in zip(expected, actual, strict=False):
        if ours.shape != theirs.shape or not _is_close(ours, theirs):
            return "the program computes something else with fewer of its input channels"
    return None


def _is_close(a: np.ndarray, b: np.ndarray) -> bool:
    if not np.issubdtype(a.dtype, np.floating):
        return True
    return bool(np.linalg.norm(a - b) <= _TOLERANCE * np.linalg.norm(a))
