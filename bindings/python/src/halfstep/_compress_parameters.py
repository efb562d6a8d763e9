# SPDX-License-Identifier: Apache-2.0
# Parameters and results of compressing live models, under AIMET's names.
"""What `compress_model` takes and returns, for `halfstep.torch` and `halfstep.keras`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from .compression import CompressionStats as EngineStats
from .errors import InvalidArgumentError


class CompressionScheme(Enum):
    """How layers are made smaller."""

    weight_svd = 1
    spatial_svd = 2
    channel_pruning = 3


class CostMetric(Enum):
    """What ratios speak of: compressed cost over original cost."""

    mac = 1
    memory = 2


class RankSelectScheme(Enum):
    """How weight SVD chooses ranks."""

    greedy = 1


class ModuleCompRatioPair:
    """A layer and the ratio that it is to have."""

    def __init__(self, module: Any, comp_ratio: float | None) -> None:
        self.module = module
        self.comp_ratio = comp_ratio


class GreedySelectionParameters:
    """Ratios chosen from scores of networks in which one layer is compressed.

    Parameters
    ----------
    target_comp_ratio : float
        Cost wanted over original cost, in (0, 1].
    num_comp_ratio_candidates : int
        Each layer is tried at ``1 / num`` to ``(num - 1) / num``.
    use_monotonic_fit : bool
        Whether a rising polynomial replaces each layer's scores first.
    saved_eval_scores_dict : path, optional
        File of scores: read if it exists (JSON, or a pickle that AIMET wrote), and written, as
        JSON, if scores had to be made.
    """

    def __init__(
        self,
        target_comp_ratio: float,
        num_comp_ratio_candidates: int = 10,
        use_monotonic_fit: bool = False,
        saved_eval_scores_dict: str | os.PathLike[str] | None = None,
    ) -> None:
        if num_comp_ratio_candidates < 2:
            raise InvalidArgumentError(
                f"num_comp_ratio_candidates: expected 2 or more, got {num_comp_ratio_candidates}"
            )
        self.target_comp_ratio = target_comp_ratio
        self.num_comp_ratio_candidates = num_comp_ratio_candidates
        self.use_monotonic_fit = use_monotonic_fit
        self.saved_eval_scores_dict = saved_eval_scores_dict


class AutomaticSelectionParameters:
    """Ratios chosen without evaluating the network: least sum of the layers' errors.

    Stands where AIMET has `GreedySelectionParameters`. Give `compress_model` data, and errors are
    those of the layers' outputs.

    Parameters
    ----------
    target_comp_ratio : float
        Cost wanted over original cost, in (0, 1].
    """

    def __init__(self, target_comp_ratio: float) -> None:
        self.target_comp_ratio = target_comp_ratio


class _Parameters:
    """What the parameters of all schemes have in common."""

    class ManualModeParams:
        """Ratios of layers."""

        def __init__(self, list_of_module_comp_ratio_pairs: Sequence[ModuleCompRatioPair]) -> None:
            self.list_of_module_comp_ratio_pairs = list_of_module_comp_ratio_pairs

    class AutoModeParams:
        """A ratio of the whole network."""

        def __init__(
            self, greedy_select_params: Any, modules_to_ignore: Sequence[Any] | None = None
        ) -> None:
            self.greedy_params = greedy_select_params
            self.modules_to_ignore = list(modules_to_ignore or ())

    class Mode(Enum):
        """Who chooses ratios."""

        manual = 1
        auto = 2

    def __init__(self, mode: Any, params: Any, multiplicity: int = 1) -> None:
        if mode.name == "manual" and not hasattr(params, "list_of_module_comp_ratio_pairs"):
            raise InvalidArgumentError("manual mode: expected ManualModeParams")
        if mode.name == "auto" and not hasattr(params, "greedy_params"):
            raise InvalidArgumentError("auto mode: expected AutoModeParams")
        self.mode = mode
        self.mode_params = params
        self.multiplicity = multiplicity


class SpatialSvdParameters(_Parameters):
    """How spatial SVD compresses; see `CompressionScheme`."""


class WeightSvdParameters(_Parameters):
    """How weight SVD compresses; see `CompressionScheme`."""

    class AutoModeParams(_Parameters.AutoModeParams):
        """A ratio of the whole network."""

        def __init__(
            self,
            rank_select_scheme: RankSelectScheme,
            select_params: Any,
            modules_to_ignore: Sequence[Any] | None = None,
        ) -> None:
            super().__init__(select_params, modules_to_ignore)
            self.rank_select_scheme = rank_select_scheme
            self.select_params = select_params


class ChannelPruningParameters(_Parameters):
    """How channel pruning compresses; see `CompressionScheme`.

    Layers are named by what they read: a layer's ratio is the share of its input channels that
    stays, and layers to ignore keep their inputs.

    Parameters
    ----------
    data_loader : iterable of batches
        Inputs that layers are fitted to; `data` of `compress_model` goes before.
    num_reconstruction_samples : int
        As AIMET takes ten output positions of a picture, batches are read until there is a tenth of
        this number of pictures; of these, all positions count. 0 keeps the weights.
    allow_custom_downsample_ops : bool
        Not used: layers whose channels are coupled are pruned together.
    mode : Mode
        Who chooses ratios.
    params : ManualModeParams or AutoModeParams
        Ratios, or how they are chosen.
    multiplicity : int
        Numbers of channels are rounded up to multiples of this.
    importance : {"reconstruction", "magnitude"}
        Which channels go first: those that are missed least once the others make up for them, or,
        as in AIMET, those that are read with the smallest squared weights.
    """

    def __init__(
        self,
        data_loader: Any,
        num_reconstruction_samples: int,
        allow_custom_downsample_ops: bool,
        mode: Any,
        params: Any,
        multiplicity: int = 1,
        *,
        importance: str = "reconstruction",
    ) -> None:
        super().__init__(mode, params, multiplicity)
        if num_reconstruction_samples < 0:
            raise InvalidArgumentError(
                f"num_reconstruction_samples: expected 0 or more, got {num_reconstruction_samples}"
            )
        self.data_loader = data_loader
        self.num_reconstruction_samples = num_reconstruction_samples
        self.allow_custom_downsample_ops = allow_custom_downsample_ops
        self.importance = importance


class GreedyCompressionRatioSelectionStats:
    """Scores of networks in which one layer is compressed, by layer and ratio."""

    def __init__(self, eval_scores_dict: Mapping[str, Mapping[float, float]]) -> None:
        self.eval_scores_dictionary = eval_scores_dict

    def __str__(self) -> str:
        lines = ["Scores by layer and ratio"]
        for layer, scores in self.eval_scores_dictionary.items():
            row = ", ".join(f"{ratio:g}: {score:g}" for ratio, score in sorted(scores.items()))
            lines.append(f"  {layer}: {row}")
        return "\n".join(lines)


class CompressionStats:
    """What compression did to a live model; ``str`` gives a table.

    Numbers are text of six decimals where AIMET's are.
    """

    class LayerStats:
        """The ratio of a layer that was compressed."""

        def __init__(self, name: str, comp_ratio: float) -> None:
            self.name = name
            self.compression_ratio = comp_ratio

    def __init__(
        self,
        base_accuracy: float,
        comp_accuracy: float,
        engine: EngineStats,
        per_layer_stats: Sequence[LayerStats],
        selection: GreedyCompressionRatioSelectionStats | None,
        curves: Mapping[str, Sequence[tuple[float, float]]],
        curve_label: str,
    ) -> None:
        self.baseline_model_accuracy = format(base_accuracy, ".6f")
        self.compressed_model_accuracy = format(comp_accuracy, ".6f")
        self.memory_compression_ratio = format(engine.memory_ratio, ".6f")
        self.mac_compression_ratio = format(engine.mac_ratio, ".6f")
        self.per_layer_stats = list(per_layer_stats)
        self.compression_ratio_selection_stats = selection
        #: What the engine reports, layers under their names in the model.
        self.engine = engine
        self._curves = curves
        self._curve_label = curve_label

    def __str__(self) -> str:
        lines = [
            f"accuracy {self.baseline_model_accuracy} before,"
            f" {self.compressed_model_accuracy} after",
            str(self.engine),
        ]
        if self.compression_ratio_selection_stats is not None:
            lines.append(str(self.compression_ratio_selection_stats))
        return "\n".join(lines)

    def write_html(self, path: str | os.PathLike[str]) -> None:
        """Write a page with the table, and what each layer's ratios cost it, as one file."""
        from .compression_report import write_html

        write_html(
            path,
            self.engine,
            curves=self._curves,
            curve_label=self._curve_label,
            scores=(float(self.baseline_model_accuracy), float(self.compressed_model_accuracy)),
        )
