# SPDX-License-Identifier: Apache-2.0
# The demo behind `make demo`: a real network loses accuracy to integers and gets it back.
"""Quantizes EfficientNet-Lite0 five ways and prints what each costs.

Leaves ``lite0.onnx``, ``lite0.encodings``, ``lite0_qdq.onnx`` and ``weight_ranges.png`` in the
output folder. The ranges are calibrated on the 20 pictures that are also scored: this shows the
method, not a benchmark (that is docs/accuracy.md).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from efficientnet_lite0 import INPUT, OUTPUT, build_model, foolbox_pictures

import halfstep

BATCH = 4


class Stopwatch:
    """Seconds by step, in the order in which the steps ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, step: str, action: Callable):
        """Run ``action`` and add its seconds to ``step``."""
        start = time.perf_counter()
        result = action()
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start
        return result


def batches(pictures: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Split pictures `[N, 3, 224, 224]` into inputs of the model."""
    return [{INPUT: pictures[i : i + BATCH]} for i in range(0, len(pictures), BATCH)]


def logits(network, pictures: np.ndarray) -> np.ndarray:
    """Run a model or a simulation over all pictures; `[N, 1000]`."""
    return np.concatenate([network.run(batch)[OUTPUT] for batch in batches(pictures)])


def sqnr(reference: np.ndarray, other: np.ndarray) -> float:
    """Signal-to-quantization-noise ratio in decibels."""
    noise = np.sum((reference - other) ** 2, dtype=np.float64)
    return float(10 * np.log10(np.sum(reference**2, dtype=np.float64) / noise))


def row(name: str, result: np.ndarray, reference: np.ndarray, labels: np.ndarray) -> str:
    """One line of the table."""
    top1 = int((result.argmax(1) == labels).sum())
    agreement = (result.argmax(1) == reference.argmax(1)).mean()
    ratio = "       " if result is reference else f"{sqnr(reference, result):5.1f} dB"
    return f"{name:<42} {top1:>3} of {len(labels)}   {agreement:>6.0%}   {ratio}"


def draw_ranges(before: halfstep.Model, after: halfstep.Model, path: Path) -> None:
    """Draw the spread of per-channel weight ranges of every layer, before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, figsize=(11, 7), sharex=True, sharey=True)
    titles = ("batch norms folded", "and cross-layer equalized")
    for axis, model, title in zip(axes, (before, after), titles, strict=True):
        ranges = [
            np.maximum(np.abs(layer.channel_minimum), np.abs(layer.channel_maximum))
            for layer in model.inspect()
        ]
        ranges = [np.maximum(values, 1e-6) for values in ranges]
        positions = range(1, len(ranges) + 1)
        axis.vlines(
            positions, [r.min() for r in ranges], [r.max() for r in ranges], color="#9db8d9", lw=5
        )
        axis.plot(positions, [np.median(r) for r in ranges], "o", color="#1f3b63", ms=3)
        axis.set_yscale("log")
        axis.set_ylabel("max |w| of a channel")
        axis.set_title(f"{title}: least, median and largest channel of each layer", loc="left")
        axis.grid(axis="y", alpha=0.3)
    axes[-1].set_xlabel("layer")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    timed = Stopwatch()
    pictures, labels = foolbox_pictures()
    content = timed("build the network", lambda: build_model().SerializeToString())
    model = timed("load", lambda: halfstep.Model.load(content))
    reference = timed("FP32 inference, 20 pictures", lambda: logits(model, pictures))

    folded = model.copy()
    folds = timed("fold batch norms", folded.fold_batch_norms)
    equalized = folded.copy()
    report = timed("equalize", equalized.equalize)

    def simulate(network: halfstep.Model, bits: int, config: str, scheme: str):
        sim = timed(
            "create simulation",
            lambda: halfstep.QuantizationSimModel(
                network, param_bits=bits, quant_scheme=scheme, config=config
            ),
        )
        timed(
            f"calibrate, {scheme}, 20 pictures",
            lambda: sim.compute_encodings(batches(pictures), progress=False),
        )
        return sim, timed("simulated inference, 20 pictures", lambda: logits(sim, pictures))

    _, naive = simulate(model, 8, "default", "min_max")
    _, per_tensor = simulate(equalized, 8, "default", "sqnr")
    best, per_channel = simulate(equalized, 8, "default_per_channel", "sqnr")
    _, four_bits = simulate(equalized, 4, "default_per_channel", "sqnr")

    print(f"{'EfficientNet-Lite0':<42} {'top-1':>9}   {'agrees':>6}   logit SQNR")
    print(row("FP32", reference, reference, labels))
    print(row("W8A8 per tensor, naive (min_max)", naive, reference, labels))
    print(row("  + batch-norm folding and CLE, sqnr", per_tensor, reference, labels))
    print(row("W8A8 per channel, folding and CLE, sqnr", per_channel, reference, labels))
    print(row("W4A8 per channel, folding and CLE, sqnr", four_bits, reference, labels))
    print(f"\n{len(folds)} batch norms folded, {len(report.sets)} sets of layers equalized")

    timed("export", lambda: best.export(options.out, "lite0"))
    timed("export QDQ", lambda: best.export_qdq(options.out / "lite0_qdq.onnx"))
    draw_ranges(folded, equalized, options.out / "weight_ranges.png")

    print("\nseconds")
    for step, seconds in timed.seconds.items():
        print(f"  {step:<40} {seconds:8.3f}")
    files = ("lite0.onnx", "lite0.encodings", "lite0_qdq.onnx", "weight_ranges.png")
    print("\nwrote " + ", ".join(str(options.out / name) for name in files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
