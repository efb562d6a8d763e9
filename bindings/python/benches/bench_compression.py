# SPDX-License-Identifier: Apache-2.0
# How long compression takes beside AIMET, and how much faster the compressed network is.
"""Compress ResNet50 by spatial SVD to half of each layer, here and with AIMET, and time both.

Each measurement is a process of its own, ours and AIMET's by turns; imports, building the network
and loading weights do not count. halfstep.torch hands the live module to the engine through torch's
ONNX exporter, which the row "halfstep on an ONNX file" does without. Then the network before and
after runs by turns in onnxruntime and in the engine, beside the share of multiply-accumulates.
Medians. Needs torch, torchvision, onnxscript, onnxruntime; AIMET in an environment of its own. For
a quiet machine, from a clone::

    make python venv-test venv-aimet
    .build/venv/bin/python bindings/python/benches/bench_compression.py \\
        --aimet-python .build/venv-aimet/bin/python
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from support import torchvision_models  # noqa: E402

#: The issue's goal: AIMET's time over ours.
GOAL = 5.0


def network(arch: str) -> Any:
    """Return a network with seeded weights."""
    import torch

    torch.manual_seed(0)
    model = getattr(torchvision_models._torchvision().models, arch)(weights=None)
    return model.eval()


def ratios_of(model: Any, ratio: float) -> dict[str, float]:
    """Return a ratio for each layer that AIMET splits."""
    import torch

    convolutions = (torch.nn.Conv2d,)
    return {
        name: ratio
        for name, part in model.named_modules()
        if isinstance(part, convolutions) and part.groups == 1
    }


def compress(model: Any, ratio: float) -> Any:
    """Return the split network and its statistics."""
    from halfstep.torch import (
        CompressionScheme,
        CostMetric,
        ModelCompressor,
        ModuleCompRatioPair,
        SpatialSvdParameters,
    )

    kind = SpatialSvdParameters
    ratios = ratios_of(model, ratio)
    pairs = [ModuleCompRatioPair(model.get_submodule(name), r) for name, r in ratios.items()]
    return ModelCompressor.compress_model(
        model,
        lambda *_: 0.5,
        1,
        (1, 3, 224, 224),
        CompressionScheme.spatial_svd,
        CostMetric.mac,
        kind(kind.Mode.manual, kind.ManualModeParams(pairs)),
    )


def work(arch: str, ratio: float) -> None:
    """Time one compression in this process."""
    model = network(arch)
    import halfstep.torch  # noqa: F401

    start, used = time.perf_counter(), time.process_time()
    _, stats = compress(model, ratio)
    report = {
        "wall": time.perf_counter() - start,
        "seconds": time.process_time() - used,
        "mac_ratio": stats.mac_compression_ratio,
        "ranks": {layer.name: layer.rank for layer in stats.engine.layers if layer.rank},
    }
    print(json.dumps(report))


def work_on_file(path: str, ratio: float) -> None:
    """Time the same on a file that holds the network, reading included."""
    import halfstep

    start, used = time.perf_counter(), time.process_time()
    model = halfstep.Model.load(path)
    _, stats = halfstep.ModelCompressor(model, "spatial_svd").compress(ratio)
    report = {
        "wall": time.perf_counter() - start,
        "seconds": time.process_time() - used,
        "mac_ratio": stats.macs[1] / stats.macs[0],
        "ranks": {},
    }
    print(json.dumps(report))


def spawned(command: list[str], folder: Path) -> dict[str, Any]:
    """Return what a process prints last."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    """Time compression, ours and AIMET's by turns."""
    import torch

    script = str(Path(__file__).resolve())
    flags = ["--worker", "--arch", arguments.arch, "--ratio", str(arguments.ratio)]
    commands = {"halfstep.torch": [sys.executable, "-W", "ignore", script, *flags]}
    path = str(folder / "network.onnx")
    torch.onnx.export(
        *(network(arguments.arch), (torch.zeros(1, 3, 224, 224),), path),
        dynamo=True,
        verbose=False,
        external_data=False,
    )
    commands["halfstep on an ONNX file"] = [*commands["halfstep.torch"], "--file", path]
    if arguments.aimet_python:
        model = network(arguments.arch)
        torch.save(model.state_dict(), folder / "state.pth")
        np.save(folder / "inputs.npy", torchvision_models.inputs("resnet50", 1))
        job = {
            "arch": arguments.arch,
            "state": str(folder / "state.pth"),
            "inputs": str(folder / "inputs.npy"),
            "outputs": str(folder / "outputs.npy"),
            "scheme": "spatial_svd",
            "ratios": ratios_of(model, arguments.ratio),
        }
        (folder / "job.json").write_text(json.dumps(job))
        python = str(Path(arguments.aimet_python).absolute())
        other = str(TESTS / "aimet/compress_torch.py")
        commands["aimet-torch"] = [python, "-W", "ignore", other, str(folder / "job.json")]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for _ in range(arguments.rounds):
        for name, command in commands.items():
            found[name].append(spawned(command, folder))
    print(f"{arguments.arch}, spatial SVD, {arguments.ratio:g} of each layer")
    print(f"| | wall s (median of {arguments.rounds}) | least, most | CPU s | MACs |")
    print("|---|---|---|---|---|")
    medians = {}
    for name, runs in found.items():
        walls = [run["wall"] for run in runs]
        medians[name] = statistics.median(walls)
        cpu = statistics.median(run["seconds"] for run in runs)
        print(
            f"| {name} | {medians[name]:.2f} | {min(walls):.2f}, {max(walls):.2f} | {cpu:.1f} |"
            f" {runs[0]['mac_ratio']} |"
        )
    if "aimet-torch" in medians:
        times = medians["aimet-torch"] / medians["halfstep.torch"]
        same = found["halfstep.torch"][0]["ranks"] == found["aimet-torch"][0]["ranks"]
        verdict = "reached" if times >= GOAL else "missed"
        print(f"{times:.1f} times as fast (goal {GOAL:g}: {verdict}); equal ranks: {same}")


def speed(arguments: argparse.Namespace, folder: Path) -> None:
    """Time the network before and after, by turns, in onnxruntime and in the engine."""
    import onnxruntime
    import torch

    import halfstep

    model = network(arguments.arch)
    small, stats = compress(model, arguments.ratio)
    inputs = torchvision_models.inputs("resnet50", arguments.batch)
    runs: dict[tuple[str, str], Any] = {}
    for what, one in (("before", model), ("after", small)):
        path = str(folder / f"{what}.onnx")
        torch.onnx.export(
            *(one, (torch.from_numpy(inputs),), path),
            dynamo=True,
            verbose=False,
            external_data=False,
        )
        engine = halfstep.Model.load(path)
        engine.fold_batch_norms()
        engine.save(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: inputs}
        runs["onnxruntime", what] = lambda s=session, f=feed: s.run(None, f)
        runs["engine", what] = lambda e=engine: e.run(inputs)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for turn in range(arguments.turns + 1):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            # The first turn makes buffers and plans.
            if turn:
                seconds[key].append(time.perf_counter() - start)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    share = {e: medians[e, "after"] / medians[e, "before"] for e in ("onnxruntime", "engine")}
    print(f"\nforward pass of {arguments.batch} pictures, median of {arguments.turns}, seconds")
    print("| | multiply-accumulates | onnxruntime | engine |\n|---|---|---|---|")
    macs = stats.engine.macs
    for what, count in zip(("before", "after"), macs, strict=True):
        row = [f"{medians[e, what]:.3f}" for e in ("onnxruntime", "engine")]
        print(f"| {what} | {count * arguments.batch / 1e9:.2f} G | {' | '.join(row)} |")
    print(
        f"| after / before | {macs[1] / macs[0]:.3f} | {share['onnxruntime']:.3f} |"
        f" {share['engine']:.3f} |"
    )


def main() -> None:
    """Compress, time, print tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--aimet-python", help="AIMET's interpreter; without it, AIMET is left out")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each compressor")
    parser.add_argument("--turns", type=int, default=15, help="forward passes of each network")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.file:
        work_on_file(arguments.file, arguments.ratio)
        return
    if arguments.worker:
        work(arguments.arch, arguments.ratio)
        return
    with tempfile.TemporaryDirectory() as name:
        compare(arguments, Path(name))
        speed(arguments, Path(name))


if __name__ == "__main__":
    main()
