# SPDX-License-Identifier: Apache-2.0
# The part of the Model class that rounds.
"""Rounding and bias correction as methods of a model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ._progress import Progress

if TYPE_CHECKING:
    from .records import TensorInfo
    from .rounding import Details, RoundedLayer


class RoundingMethods:
    """Methods of `halfstep.Model`."""

    __slots__ = ()

    if TYPE_CHECKING:
        _handle: Any

        @property
        def inputs(self) -> tuple[TensorInfo, ...]:
            """Tensors that a run needs."""

    def adaround(
        self,
        data: Mapping[str, Any] | Any | None,
        param_bits: int = 4,
        method: str = "auto",
        config: str | os.PathLike[str] | None = None,
        *,
        activation_bits: int | None = 8,
        quant_scheme: str = "min_max",
        percentile: float = 100.0,
        excluded_layers: Iterable[str] = (),
        max_rows: int = 1 << 15,
        max_bytes: int = 1 << 26,
        seed: int = 0,
        floor_or_ceil: bool = False,
        iterations: int | None = None,
        block_size: int | None = None,
        reg_param: float = 0.01,
        beta_range: tuple[float, float] = (20, 2),
        warm_start: float = 0.2,
        num_candidates: int = 20,
        layer_bits: Mapping[str, int] | None = None,
        cache: str | os.PathLike[str] | None = None,
        progress: bool | Progress = False,
        details: Details | None = None,
    ) -> tuple[RoundedLayer, ...]:
        """Round weights so that the network's outputs change least, with unlabeled data.

        Fold batch norms first, and equalize if scales are per tensor. Each layer aims at what the
        float network computes, given what the layers rounded before it make of the data; what does
        not do better than rounding to nearest on held-out rows is not kept. Weights and biases
        change in place; the model remembers the grids, and a `QuantizationSimModel` made from it
        uses them.

        Parameters
        ----------
        data : array, dict of str to array, iterable of these, or None
            Inputs, ``[N, ...]`` each; how they are batched does not matter. None rounds by what
            folded batch norms let expect of layers' inputs, so that errors within kernels and rows
            cancel: better than to nearest, far from what a few dozen samples give.
        param_bits : int
            Width of weights, 2 to 16.
        method : str
            ``"gram"`` (linear algebra on Gram matrices of the layers' inputs), ``"gradient"``
            (AdaRound by gradient descent, with AIMET's defaults), ``"sequential_mse"`` (rounding
            to nearest on scales searched for the least error of each layer's output) or
            ``"auto"``: what does best on held-out rows for the effort.
        config : str, path or None
            Built-in runtime configuration or a JSON file; None means ``"default_per_channel"``.
        activation_bits : int or None
            Width of activations while rounding, 2 to 16; None keeps them in float.
        quant_scheme : str
            How ranges of activations, and of weights rounded to nearest, are chosen; give
            `QuantizationSimModel` the same.
        percentile : float
            For the scheme of that name, 50 to 100.
        excluded_layers : iterable of str
            Names of nodes that stay in float.
        max_rows : int
            Rows of its input that a layer learns from at most.
        max_bytes : int
            Bytes of activations held in memory; more goes to a temporary file.
        seed : int
            Decides which rows are drawn.
        floor_or_ceil : bool
            Whether a weight may only go to one of its two neighbors on the grid, as in AdaRound.
        iterations : int or None
            Steps of ``"gradient"`` for each layer; None means AIMET's 10,000 for 8 bits and more,
            15,000 below.
        block_size : int or None
            Input channels that share a scale, in weights of convolutions, Gemm and MatMul that the
            configuration quantizes per channel; None means all of a channel. The last block may be
            smaller. Give `QuantizationSimModel` the same.
        reg_param : float
            Weight of the regularizer with which ``"gradient"`` pushes weights to the grid.
        beta_range : pair of float
            Exponent of the regularizer when it sets in and at the end, 1 to 1,000.
        warm_start : float
            Share of the steps without the regularizer, less than 1.
        num_candidates : int
            Fractions of the range that ``"sequential_mse"`` tries.
        layer_bits : dict of str to int, optional
            Widths of single layers' weights by node name, none of them excluded; `param_bits` for
            all others.
        cache : str, path or None
            Folder, made if it is not there, in which the result of each layer is kept under a hash
            of all that it depends on: a cancelled run goes on where it ended, and one with another
            option redoes only the layers that it changes. Nothing is ever removed.
        progress : bool or callable
            True shows a bar on a terminal if tqdm is installed, with about how long the rest will
            take. A callable gets the number of layers done and in all, and cancels by returning
            False or raising; the model is then unchanged.
        details : callable, optional
            Gets a `RoundingProgress` now and then, also within layers; cancels as `progress` does.

        Returns
        -------
        tuple of RoundedLayer
            In the order in which the layers run.

        Raises
        ------
        InvalidArgumentError, UnknownNameError, InvalidConfigurationError
            For the arguments.
        EmptyStatisticsError, NonFiniteValueError, ShapeMismatchError
            For the data: no rows, a NaN or infinity, a wrong shape.
        UnsupportedOperatorError
            Naming every operator that cannot run.
        CancelledError
            If `progress` or `details` returned False.

        References
        ----------
        Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020,
        arXiv:2004.10568. Frantar et al., "GPTQ", 2022, arXiv:2210.17323.

        Examples
        --------
        >>> import halfstep
        >>> import numpy as np
        >>> model = halfstep.Model.load("net.onnx")
        >>> _ = model.fold_batch_norms()
        >>> data = np.random.default_rng(0).standard_normal((16, 3, 8, 8), np.float32)
        >>> layers = model.adaround(data, param_bits=4)
        >>> all(layer.noise_after <= layer.noise_before for layer in layers)
        True
        """
        from .errors import InvalidArgumentError
        from .rounding import Settings, round_model

        settings = Settings(
            param_bits=param_bits,
            method=method,
            config=config,
            activation_bits=activation_bits,
            quant_scheme=quant_scheme,
            percentile=percentile,
            excluded_layers=excluded_layers,
            max_rows=max_rows,
            max_bytes=max_bytes,
            seed=seed,
            floor_or_ceil=floor_or_ceil,
            iterations=0 if iterations is None else iterations,
            block_size=block_size,
            cache=cache,
            reg_param=reg_param,
            beta_range=beta_range,
            warm_start=warm_start,
            num_candidates=num_candidates,
            layer_bits=layer_bits,
            details=details,
        )
        if iterations is not None and not 1 <= iterations < 2**31:
            raise InvalidArgumentError(f"iterations: expected 1 or more, got {iterations}")
        return round_model(self._handle.adaround, "rounding", self.inputs, data, settings, progress)

    def correct_biases(
        self,
        data: Mapping[str, Any] | Any | None,
        param_bits: int = 8,
        config: str | os.PathLike[str] | None = None,
        *,
        activation_bits: int | None = 8,
        quant_scheme: str = "min_max",
        percentile: float = 100.0,
        excluded_layers: Iterable[str] = (),
        max_rows: int = 1 << 15,
        max_bytes: int = 1 << 26,
        seed: int = 0,
        block_size: int | None = None,
        cache: str | os.PathLike[str] | None = None,
        progress: bool | Progress = False,
        details: Details | None = None,
    ) -> tuple[RoundedLayer, ...]:
        """Correct biases for what rounding weights to nearest does to the means of outputs.

        Weights stay as they are; make the `QuantizationSimModel` with the same arguments. A
        layer's bias changes only if that brings the outputs of the quantized network nearer to
        those of the float network, on up to 32 samples from all over the data.

        Parameters
        ----------
        data : array, dict of str to array, iterable of these, or None
            Inputs, ``[N, ...]`` each; how they are batched does not matter. None corrects
            analytically: the means of layers' inputs are those that folded batch norms let expect.
        param_bits : int
            Width that weights will have, 2 to 16.
        quant_scheme : str
            How ranges of activations, and of weights rounded to nearest, are chosen; as for
            `QuantizationSimModel`.
        config, activation_bits, percentile, excluded_layers, max_rows, max_bytes, seed, block_size
            As in `adaround`.
        cache, progress, details
            As in `adaround`.

        Returns
        -------
        tuple of RoundedLayer
            In the order in which the layers run.

        Raises
        ------
        InvalidArgumentError, UnknownNameError, InvalidConfigurationError
            For the arguments.
        EmptyStatisticsError, NonFiniteValueError, ShapeMismatchError
            For the data: no rows, a NaN or infinity, a wrong shape.
        UnsupportedOperatorError
            Naming every operator that cannot run.
        CancelledError
            If `progress` or `details` returned False.

        References
        ----------
        Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
        2019. arXiv:1906.04721

        Examples
        --------
        >>> import halfstep
        >>> import numpy as np
        >>> model = halfstep.Model.load("net.onnx")
        >>> _ = model.fold_batch_norms()
        >>> data = np.random.default_rng(0).standard_normal((16, 3, 8, 8), np.float32)
        >>> [layer.kept for layer in model.correct_biases(data)][0]
        'nearest, bias corrected'
        """
        from .rounding import Settings, round_model

        settings = Settings(
            param_bits=param_bits,
            method="auto",
            config=config,
            activation_bits=activation_bits,
            quant_scheme=quant_scheme,
            percentile=percentile,
            excluded_layers=excluded_layers,
            max_rows=max_rows,
            max_bytes=max_bytes,
            seed=seed,
            floor_or_ceil=False,
            iterations=0,
            block_size=block_size,
            cache=cache,
            details=details,
        )
        return round_model(
            self._handle.correct_biases, "correcting biases", self.inputs, data, settings, progress
        )
