# SPDX-License-Identifier: Apache-2.0
# Accuracy, time and memory of rounding methods on three networks.
"""Measure rounding: EfficientNet-Lite0 and photos, Fashion-MNIST, MiniLM.

Every setting runs in a process of its own, so that seconds, CPU seconds and peak memory are its
own. Lite0 needs the model and the split that ``examples/python/efficientnet_lite0.py --photos``
writes (``--data``), the other networks what ``rounding_models.py`` writes (``--networks``).

    python rounding_accuracy.py --data .build/demo --only "lite0: W4A8 per channel"
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Setting(NamedTuple):
    """What is measured. Batch norms are folded in all."""

    network: str
    bits: int
    method: str
    config: str = "default_per_channel"
    scheme: str = "sqnr"
    equalize: bool = True
    block_size: int | None = None
    #: How many photos further on the ones to calibrate lie: another split of the same 500.
    shift: int = 0
    arguments: dict[str, Any] = {}


#: Weights of matrix products alone, per channel: what weight-only quantization of transformers is.
WEIGHTS_ONLY = {
    "defaults": {
        "ops": {},
        "params": {"is_quantized": "False", "is_symmetric": "True"},
        "per_channel_quantization": "True",
        "strict_symmetric": "False",
    },
    "params": {},
    "op_type": {
        kind: {"params": {"weight": {"is_quantized": "True", "is_symmetric": "True"}}}
        for kind in ("MatMul", "Gemm")
    },
    "supergroups": [],
    "model_input": {},
    "model_output": {},
}

_GRADIENT = {"iterations": 1000}

SETTINGS: dict[str, Setting] = {
    "lite0: W4A8 per channel, nearest": Setting("lite0", 4, "nearest"),
    "lite0: W4A8 per channel, seq-MSE": Setting("lite0", 4, "sequential_mse"),
    "lite0: W4A8 per channel, gram": Setting("lite0", 4, "gram"),
    "lite0: W4A8 per channel, without data": Setting("lite0", 4, "data-free"),
    "lite0: W4A8 per channel, biases without data": Setting("lite0", 4, "analytic"),
    "lite0: W4A8 per channel, gram, min_max": Setting("lite0", 4, "gram", scheme="min_max"),
    "lite0: W4A8 per channel, gram, mse ranges": Setting("lite0", 4, "gram", scheme="mse"),
    "lite0: W4A8 per channel, gram, sqnr, no CLE": Setting("lite0", 4, "gram", equalize=False),
    "lite0: W4A8 per channel, gram, min_max, no CLE": Setting(
        "lite0", 4, "gram", scheme="min_max", equalize=False
    ),
    "lite0: W4A8 per channel, auto": Setting("lite0", 4, "auto"),
    "lite0: W4A8 per channel, auto, min_max": Setting("lite0", 4, "auto", scheme="min_max"),
    "lite0: W4A8 per channel, gradient": Setting("lite0", 4, "gradient"),
    **{
        f"lite0, photos shifted by {shift}: W4A8 per channel, {method}, {scheme}": Setting(
            "lite0", 4, method, scheme=scheme, shift=shift
        )
        for shift in (2, 4, 6)
        for method in ("gram", "auto")
        for scheme in ("min_max", "sqnr")
    },
    "lite0: W3A8 per channel, nearest": Setting("lite0", 3, "nearest"),
    "lite0: W3A8 per channel, gram": Setting("lite0", 3, "gram"),
    "lite0: W3A8 per channel, auto": Setting("lite0", 3, "auto"),
    "lite0: W4A8 per tensor, nearest": Setting("lite0", 4, "nearest", "default"),
    "lite0: W4A8 per tensor, gram": Setting("lite0", 4, "gram", "default"),
    "lite0: W4A8 per tensor, auto": Setting("lite0", 4, "auto", "default"),
    "lite0: W8A8 per tensor, nearest": Setting("lite0", 8, "nearest", "default"),
    "lite0: W8A8 per tensor, bias correction": Setting("lite0", 8, "biases", "default"),
    "lite0: W8A8 per tensor, biases without data": Setting("lite0", 8, "analytic", "default"),
    "lite0: W8A8 per channel, biases without data": Setting("lite0", 8, "analytic"),
    "lite0: W8A8 per channel, nearest": Setting("lite0", 8, "nearest"),
    "lite0: W8A8 per channel, bias correction": Setting("lite0", 8, "biases"),
    "lite0: W8A8 per channel, gram": Setting("lite0", 8, "gram"),
} | {
    f"{network}: W{bits}{where}, {name}": Setting(
        network, bits, method, equalize=False, block_size=block_size, arguments=arguments
    )
    for network, bits, block_size, where in (
        ("fashion", 4, None, "A8 per channel"),
        ("fashion", 3, None, "A8 per channel"),
        ("minilm", 4, None, " per channel"),
        ("minilm", 3, None, " per channel"),
        ("minilm", 4, 32, " per block of 32"),
        ("minilm", 3, 32, " per block of 32"),
    )
    for name, method, arguments in (
        ("nearest", "nearest", {}),
        ("seq-MSE", "sequential_mse", {}),
        ("gram", "gram", {}),
        ("gradient, 1,000 steps", "gradient", _GRADIENT),
        ("auto", "auto", {}),
    )
}


def shifted(file, shift: int, *, calibration: bool) -> tuple[dict, np.ndarray | None]:
    """Divide the photos of both parts in another way, as many to each."""
    old = np.concatenate([file["calib_indices"], file["image_indices"]])
    chosen = file["calib_indices"] + shift
    wanted = chosen if calibration else np.setdiff1d(np.arange(len(old)), chosen)
    places = np.argsort(old)[wanted]
    images = np.concatenate([file["calib"], file["images"]])[places]
    labels = np.concatenate([file["calib_labels"], file["labels"]])[places]
    return {"image": images}, None if calibration else labels


def load(
    network: str, folder: Path, *, calibration: bool, shift: int = 0
) -> tuple[dict, np.ndarray | None]:
    """Read the inputs to calibrate, or those to test with their labels if there are any."""
    name = {"lite0": "photos500"}.get(network, network)
    with np.load(folder / f"{name}.npz") as file:  # reads what is asked for only
        if network == "minilm":
            prefix = "calib_" if calibration else ""
            return {key: file[prefix + key] for key in ("ids", "mask")}, None
        if shift:
            return shifted(file, shift, calibration=calibration)
        if calibration:
            return {"image": file["calib"]}, None
        return {"image": file["images"]}, file["labels"]


def cut(inputs: dict[str, np.ndarray], size: int = 8):
    """Yield batches."""
    count = len(next(iter(inputs.values())))
    for start in range(0, count, size):
        yield {name: values[start : start + size] for name, values in inputs.items()}


def outputs(network, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Run a model or a simulation over all inputs."""
    return np.concatenate([next(iter(network.run(batch).values())) for batch in cut(inputs)])


def score(got: np.ndarray, reference: np.ndarray, labels: np.ndarray | None) -> dict[str, Any]:
    """Return top-1, agreement with FP32 and SQNR; the mean cosine without labels."""
    got, reference = got.astype(np.float64), reference.astype(np.float64)
    noise = np.square(got - reference).sum()
    ratio = None if noise == 0 else round(10 * np.log10(np.square(reference).sum() / noise), 2)
    if labels is None:
        norms = np.linalg.norm(got, axis=1) * np.linalg.norm(reference, axis=1)
        cosine = float(np.mean((got * reference).sum(1) / norms))
        return {"cosine": round(cosine, 4), "sqnr_db": ratio}
    return {
        "top1": round(float((got.argmax(1) == labels).mean()), 4),
        "agreement": round(float((got.argmax(1) == reference.argmax(1)).mean()), 4),
        "sqnr_db": ratio,
    }


def resident(field: str) -> float:
    """VmRSS, or VmHWM (its peak), of this process in MB (10⁶ bytes)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError(f"no {field} in /proc/self/status")


def measure(setting: Setting, model_path: Path, folder: Path) -> dict[str, Any]:
    """Round, simulate, and score, in this process."""
    import halfstep

    # While rounding, this process holds nothing but the model and the calibration data.
    calibration, _ = load(setting.network, folder, calibration=True, shift=setting.shift)
    reference = halfstep.Model.load(model_path)
    model = reference.copy()
    model.fold_batch_norms()
    if setting.equalize:
        model.equalize()
    is_weight_only = setting.network == "minilm"
    config: Any = setting.config
    if is_weight_only:
        config = folder / "weights_only.json"
        config.write_text(json.dumps(WEIGHTS_ONLY))
    arguments = {
        "param_bits": setting.bits,
        "config": config,
        "quant_scheme": setting.scheme,
        "activation_bits": None if is_weight_only else 8,
        "block_size": setting.block_size,
    }
    before = resident("VmRSS")
    start, processor = time.perf_counter(), time.process_time()
    if setting.method in ("biases", "analytic"):
        model.correct_biases(calibration if setting.method == "biases" else None, **arguments)
    elif setting.method == "data-free":
        model.adaround(None, **arguments)
    elif setting.method != "nearest":
        model.adaround(calibration, method=setting.method, **arguments, **setting.arguments)
    cost = {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - processor, 1),
        "peak_mb": round(resident("VmHWM")),
        "before_mb": round(before),
    }
    sim = halfstep.QuantizationSimModel(
        model,
        param_bits=setting.bits,
        activation_bits=8,
        quant_scheme=setting.scheme,
        config=config,
        block_size=setting.block_size,
    )
    sim.compute_encodings(cut(calibration), progress=False)
    test, labels = load(setting.network, folder, calibration=False, shift=setting.shift)
    wanted_path = folder / f".{setting.network}-{setting.shift}-reference.npy"
    if wanted_path.exists():
        wanted = np.load(wanted_path)
    else:
        wanted = outputs(reference, test)
        np.save(wanted_path, wanted)
    float_score = score(wanted, wanted, labels)
    return {"FP32": float_score} | score(outputs(sim, test), wanted, labels) | cost


def row(name: str, result: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [f"{result[key]:.3f}" for key in ("top1", "agreement") if key in result]
    if "cosine" in result:
        cells = [f"{result['cosine']:.4f}"]
    costs = "– | – | –"
    if result["seconds"]:
        costs = f"{result['seconds']} | {result['cpu_seconds']} | {result['peak_mb']}"
    return f"| {name} | {' | '.join(cells)} | {result['sqnr_db']:.1f} dB | {costs} |"


def main(arguments: list[str] | None = None) -> int:
    """Measure the settings whose names contain any of the given texts, all by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(".build/demo"))
    parser.add_argument("--networks", type=Path, default=Path(".build/rounding"))
    parser.add_argument("--out", type=Path, default=Path(".build/rounding_accuracy.json"))
    parser.add_argument("--only", action="append", help="measure settings containing this text")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)

    if options.worker:
        setting = SETTINGS[options.worker]
        folder = options.data if setting.network == "lite0" else options.networks
        file = {"lite0": "efficientnet_lite0"}.get(setting.network, setting.network)
        print(json.dumps(measure(setting, folder / f"{file}.onnx", folder)))
        return 0

    results: dict = {}
    if options.out.exists():
        results = json.loads(options.out.read_text())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    print("| setting | top-1, agreement; or cosine | SQNR | s | CPU s | peak MB |")
    for name in SETTINGS:
        if options.only and not any(text in name for text in options.only):
            continue
        command = [sys.executable, __file__, "--worker", name, "--data", options.data]
        done = subprocess.run(
            [*command, "--networks", options.networks], capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(f"{name}: {done.stderr.strip()}", file=sys.stderr)
            return 1
        results[name] = json.loads(done.stdout)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        print(row(name, results[name]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
