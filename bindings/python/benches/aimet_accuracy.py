# SPDX-License-Identifier: Apache-2.0
# AIMET's accuracy on EfficientNet-Lite0 and the labelled photos; runs in the AIMET environment.
"""Measure aimet-onnx on EfficientNet-Lite0: top-1, agreement with FP32, logit SQNR.

Needs the model and the split that ``examples/python/efficientnet_lite0.py --photos`` writes.

    .venv-aimet/bin/python aimet_accuracy.py --data .build/demo --out aimet_accuracy.json

``--adaround 500`` measures AdaRound with 500 iterations a layer (its default is 10,000) and with
10 instead: the difference tells what an iteration of all layers costs. It takes an hour.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

BATCH = 8
#: Samples an iteration of AdaRound sees; AIMET takes up to 32, which costs four times as much.
ADAROUND_BATCH = 8

#: Name to (weight bits, activation bits, per channel, scheme, CLE). Batch norms are folded in all.
SETTINGS: dict[str, tuple[int, int, bool, str, bool]] = {
    "W8A8 per tensor, min_max": (8, 8, False, "min_max", False),
    "W8A8 per tensor, min_max, CLE": (8, 8, False, "min_max", True),
    "W8A8 per channel, min_max": (8, 8, True, "min_max", False),
    "W8A8 per channel, tf_enhanced": (8, 8, True, "tf_enhanced", False),
    "W4A8 per channel, min_max": (4, 8, True, "min_max", False),
    "W8A8 per tensor, tf_enhanced, CLE": (8, 8, False, "tf_enhanced", True),
    "W8A8 per channel, min_max, CLE": (8, 8, True, "min_max", True),
}


def batches(images: np.ndarray, size: int = BATCH):
    """Yield the pictures as inputs of the network, some at a time."""
    for start in range(0, len(images), size):
        yield {"image": images[start : start + size]}


def logits(session, images: np.ndarray) -> np.ndarray:
    """Run all the pictures."""
    return np.concatenate([session.run(None, batch)[0] for batch in batches(images)])


def score(got: np.ndarray, reference: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return top-1, agreement with the reference's top class, and SQNR of the logits in dB."""
    error = np.square(got.astype(np.float64) - reference).sum()
    signal = np.square(reference.astype(np.float64)).sum()
    return {
        "top1": round(float((got.argmax(1) == labels).mean()), 4),
        "agreement": round(float((got.argmax(1) == reference.argmax(1)).mean()), 4),
        "sqnr_db": None if error == 0 else round(float(10 * np.log10(signal / error)), 2),
    }


def simulate(
    path: str, calibration: np.ndarray, images: np.ndarray, setting, iterations: int = 0
) -> tuple[np.ndarray, dict]:
    """Quantize with AIMET and return the simulated logits and the seconds of each step.

    With `iterations`, weights are rounded by as many iterations of AdaRound a layer.
    """
    import onnx
    from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight
    from aimet_onnx.common.quantsim_config.utils import (
        get_path_for_per_channel_config,
        get_path_for_per_tensor_config,
    )
    from aimet_onnx.cross_layer_equalization import equalize_model
    from aimet_onnx.quantsim import QuantizationSimModel

    weight_bits, activation_bits, per_channel, scheme, equalized = setting
    config = get_path_for_per_channel_config() if per_channel else get_path_for_per_tensor_config()
    seconds = {}
    model = onnx.load(path)
    start = time.perf_counter()
    if equalized:
        equalize_model(model)  # folds too
    else:
        fold_all_batch_norms_to_weight(model)
    seconds["fold" + ("+CLE" if equalized else "")] = round(time.perf_counter() - start, 3)
    sim = QuantizationSimModel(
        model,
        param_type=f"int{weight_bits}",
        activation_type=f"int{activation_bits}",
        quant_scheme=scheme,
        config_file=config,
        providers=["CPUExecutionProvider"],
    )
    if iterations:
        from aimet_onnx.adaround.adaround_weight import Adaround

        inputs = list(batches(calibration, ADAROUND_BATCH))
        start, processor = time.perf_counter(), time.process_time()
        Adaround.apply_adaround(sim, inputs, iterations)
        seconds["adaround"] = round(time.perf_counter() - start, 1)
        seconds["adaround, CPU"] = round(time.process_time() - processor, 1)
    start = time.perf_counter()
    sim.compute_encodings(batches(calibration))
    seconds["calibrate"] = round(time.perf_counter() - start, 3)
    start = time.perf_counter()
    result = logits(sim.session, images)
    seconds["simulate"] = round(time.perf_counter() - start, 3)
    return result, seconds


def main(arguments: list[str] | None = None) -> int:
    """Measure the settings whose names contain any of the given texts, all by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", default=".build/demo", help="folder with the model and photos500.npz"
    )
    parser.add_argument(
        "--out", default="aimet_accuracy.json", help="file to write (default %(default)s)"
    )
    parser.add_argument("--only", action="append", help="measure settings containing this text")
    parser.add_argument(
        "--keep", action="store_true", help="keep the results that the file already holds"
    )
    parser.add_argument(
        "--adaround", type=int, metavar="N", help="measure AdaRound with N iterations, W4A8"
    )
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)

    import onnxruntime

    data = Path(options.data)
    path = str(data / "efficientnet_lite0.onnx")
    photos = np.load(data / "photos500.npz")
    calibration, images, labels = photos["calib"], photos["images"], photos["labels"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    reference = logits(session, images)
    report: dict = {
        "model": "EfficientNet-Lite0",
        "pictures": {"tested": len(images), "calibrated": len(calibration)},
        "split": "calibration = positions floor(k * 500 / 64), k = 0..63, sorted by class",
        "versions": {
            p: version(p) for p in ("aimet-onnx", "onnxruntime", "onnx", "numpy", "torch")
        },
        "machine": platform.processor() or platform.machine(),
        "results": {"FP32": score(reference, reference, labels)},
    }
    if options.keep and Path(options.out).exists():
        report["results"] |= json.loads(Path(options.out).read_text())["results"]
    runs = {name: (setting, 0) for name, setting in SETTINGS.items()}
    if options.adaround:
        rounded = (4, 8, True, "min_max", True)
        runs = {
            f"W4A8 per channel, min_max, CLE, AdaRound, {count} iterations": (rounded, count)
            for count in (options.adaround, 10)
        }
    for name, (setting, iterations) in runs.items():
        if options.keep and name in report["results"]:
            continue
        if options.only and not any(text in name for text in options.only):
            continue
        got, seconds = simulate(path, calibration, images, setting, iterations)
        report["results"][name] = score(got, reference, labels) | {"seconds": seconds}
        print(name, report["results"][name], flush=True)
        Path(options.out).write_text(json.dumps(report, indent=2) + "\n")
    print(f"FP32 {report['results']['FP32']}\nwrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
