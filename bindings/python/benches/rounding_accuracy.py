# SPDX-License-Identifier: Apache-2.0
# Accuracy of rounding methods on EfficientNet-Lite0 and the labelled photos.
"""Measure rounding on EfficientNet-Lite0: top-1, agreement with FP32, logit SQNR, seconds.

Needs the model and the split that ``examples/python/efficientnet_lite0.py --photos`` writes.

    python rounding_accuracy.py --data .build/demo --only "W4A8 per channel"
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
from accuracy import logits
from aimet_accuracy import batches, score

import halfstep

#: Name to (weight bits, configuration, scheme, equalize, method). Batch norms are folded in all.
SETTINGS: dict[str, tuple[int, str, str, bool, str]] = {
    "W4A8 per channel, nearest": (4, "default_per_channel", "min_max", False, "nearest"),
    "W4A8 per channel, gram": (4, "default_per_channel", "min_max", False, "gram"),
    "W4A8 per channel, gram, CLE": (4, "default_per_channel", "min_max", True, "gram"),
    "W3A8 per channel, gram": (3, "default_per_channel", "min_max", False, "gram"),
    "W4A8 per tensor, gram, CLE": (4, "default", "min_max", True, "gram"),
    "W8A8 per tensor, nearest, CLE": (8, "default", "min_max", True, "nearest"),
    "W8A8 per tensor, bias correction, CLE": (8, "default", "min_max", True, "biases"),
    "W8A8 per channel, bias correction": (8, "default_per_channel", "min_max", False, "biases"),
}


def measure(path: Path, calibration: np.ndarray, images: np.ndarray, setting):
    """Round, simulate, and return the logits and what rounding took."""
    bits, config, scheme, equalize, method = setting
    model = halfstep.Model.load(path)
    model.fold_batch_norms()
    if equalize:
        model.equalize()
    start = time.perf_counter()
    arguments = {"param_bits": bits, "config": config, "quant_scheme": scheme}
    if method == "biases":
        model.correct_biases(calibration, **arguments)
    elif method != "nearest":
        model.adaround(calibration, method=method, **arguments)
    seconds = time.perf_counter() - start
    sim = halfstep.QuantizationSimModel(
        model, param_bits=bits, activation_bits=8, quant_scheme=scheme, config=config
    )
    sim.compute_encodings(batches(calibration), progress=False)
    return logits(sim, images), {"seconds": round(seconds, 1)}


def main(arguments: list[str] | None = None) -> int:
    """Measure the settings whose names contain any of the given texts, all by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(".build/demo"))
    parser.add_argument("--out", type=Path, default=Path(".build/rounding_accuracy.json"))
    parser.add_argument("--only", action="append", help="measure settings containing this text")
    options = parser.parse_args(arguments)

    path = options.data / "efficientnet_lite0.onnx"
    with np.load(options.data / "photos500.npz") as photos:
        calibration, images, labels = photos["calib"], photos["images"], photos["labels"]
    reference = logits(halfstep.Model.load(path), images)
    results: dict = {"FP32": score(reference, reference, labels)}
    print("| setting | top-1 | agrees with FP32 | logit SQNR | seconds |\n|---|---|---|---|---|")
    for name, setting in SETTINGS.items():
        if options.only and not any(text in name for text in options.only):
            continue
        got, cost = measure(path, calibration, images, setting)
        result = score(got, reference, labels) | cost
        results[name] = result
        print(
            f"| {name} | {result['top1']:.3f} | {result['agreement']:.3f} "
            f"| {result['sqnr_db']:.1f} dB | {result['seconds']} |",
            flush=True,
        )
    # The largest of all settings so far, data and FP32 run included.
    results["peak_mebibytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
