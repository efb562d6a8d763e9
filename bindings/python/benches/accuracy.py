# SPDX-License-Identifier: Apache-2.0
# Halfstep's accuracy on EfficientNet-Lite0 and the labelled photos, the settings beside AIMET's.
"""Measure Halfstep on EfficientNet-Lite0: top-1, agreement with FP32, logit SQNR.

Needs the model and the split that ``examples/python/efficientnet_lite0.py --photos`` writes. With
``--aimet FILE`` (what aimet_accuracy.py wrote) the table shows AIMET's figures beside ours.

    python accuracy.py --data .build/demo --aimet .build/aimet_accuracy.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from aimet_accuracy import batches, score

import halfstep

#: Name to (weight bits, configuration, scheme, equalize). Batch norms are folded in all.
SETTINGS: dict[str, tuple[int, str, str, bool]] = {
    "W8A8 per tensor, min_max": (8, "default", "min_max", False),
    "W8A8 per tensor, min_max, CLE": (8, "default", "min_max", True),
    "W8A8 per tensor, sqnr, CLE": (8, "default", "sqnr", True),
    "W8A8 per tensor, mse, CLE": (8, "default", "mse", True),
    "W8A8 per channel, min_max": (8, "default_per_channel", "min_max", False),
    "W8A8 per channel, sqnr": (8, "default_per_channel", "sqnr", False),
    "W8A8 per channel, min_max, CLE": (8, "default_per_channel", "min_max", True),
    "W8A8 per channel, sqnr, CLE": (8, "default_per_channel", "sqnr", True),
    "W8A8 per channel, mse, CLE": (8, "default_per_channel", "mse", True),
    "W4A8 per channel, min_max": (4, "default_per_channel", "min_max", False),
    "W4A8 per channel, sqnr, CLE": (4, "default_per_channel", "sqnr", True),
    "W4A8 per channel, mse, CLE": (4, "default_per_channel", "mse", True),
}


def logits(network, images: np.ndarray) -> np.ndarray:
    """Run all the pictures through a model or a simulation."""
    return np.concatenate([network.run(batch)["logits"] for batch in batches(images)])


def simulate(path: Path, calibration: np.ndarray, images: np.ndarray, setting):
    """Quantize and return the simulated logits and the seconds of each step."""
    bits, config, scheme, equalize = setting
    seconds = {}

    def timed(name, action):
        start = time.perf_counter()
        result = action()
        seconds[name] = round(time.perf_counter() - start, 4)
        return result

    model = halfstep.Model.load(path)
    timed("fold", model.fold_batch_norms)
    if equalize:
        timed("CLE", model.equalize)
    sim = halfstep.QuantizationSimModel(
        model, param_bits=bits, activation_bits=8, quant_scheme=scheme, config=config
    )
    timed("calibrate", lambda: sim.compute_encodings(batches(calibration), progress=False))
    return timed("simulate", lambda: logits(sim, images)), seconds


def cells(result: dict | None) -> str:
    """Three columns of the table."""
    if result is None:
        return "– | – | –"
    ratio = "–" if result["sqnr_db"] is None else f"{result['sqnr_db']:.1f} dB"
    return f"{result['top1']:.3f} | {result['agreement']:.3f} | {ratio}"


def table(report: dict, aimet: dict) -> str:
    """Render the results as Markdown, AIMET's tf_enhanced beside our sqnr."""
    lines = [
        "| setting | top-1 | agrees | logit SQNR | AIMET: top-1 | agrees | logit SQNR |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in report["results"].items():
        theirs = aimet.get(name.replace("sqnr", "tf_enhanced"))
        lines.append(f"| {name} | {cells(result)} | {cells(theirs)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure the settings whose names contain any of the given texts, all by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(".build/demo"))
    parser.add_argument("--out", type=Path, default=Path(".build/accuracy.json"))
    parser.add_argument("--aimet", type=Path, help="results of aimet_accuracy.py")
    parser.add_argument("--only", action="append", help="measure settings containing this text")
    options = parser.parse_args(arguments)

    path = options.data / "efficientnet_lite0.onnx"
    with np.load(options.data / "photos500.npz") as photos:
        calibration, images, labels = photos["calib"], photos["images"], photos["labels"]
    reference = logits(halfstep.Model.load(path), images)
    report: dict = {"results": {"FP32": score(reference, reference, labels)}}
    for name, setting in SETTINGS.items():
        if options.only and not any(text in name for text in options.only):
            continue
        got, seconds = simulate(path, calibration, images, setting)
        report["results"][name] = score(got, reference, labels) | {"seconds": seconds}
        print(name, report["results"][name], file=sys.stderr, flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    aimet = json.loads(options.aimet.read_text())["results"] if options.aimet else {}
    print(table(report, aimet))
    return 0


if __name__ == "__main__":
    sys.exit(main())
