# SPDX-License-Identifier: Apache-2.0
# How long compression takes beside AIMET, and how much faster the compressed network is.
"""Compress ResNet50 by spatial SVD to half of each layer, here and with AIMET, and time both.

Then times a forward pass before and after in onnxruntime and in the engine, beside the share of
multiply-accumulates. Needs torch, torchvision, onnxscript, onnxruntime; AIMET in an environment of
its own. For a quiet machine::

    python bench_compression.py --aimet-python .build/venv-aimet/bin/python
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import halfstep

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from support import torchvision_models  # noqa: E402


def timed(run: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Return the least wall seconds, and the least seconds of CPU time."""
    wall, cpu = [], []
    for _ in range(rounds):
        start, used = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    return min(wall), min(cpu)


def theirs(python: str, arch: str, model: object, inputs: np.ndarray, ratios: dict) -> float:
    """Return the seconds of CPU time that AIMET takes."""
    import torch

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(model.state_dict(), folder / "state.pth")
        np.save(folder / "inputs.npy", inputs)
        job = {
            "arch": arch,
            "state": str(folder / "state.pth"),
            "inputs": str(folder / "inputs.npy"),
            "outputs": str(folder / "outputs.npy"),
            "scheme": "spatial_svd",
            "ratios": ratios,
        }
        (folder / "job.json").write_text(json.dumps(job))
        done = subprocess.run(
            [
                str(Path(python).absolute()),
                *("-W", "ignore"),
                str(TESTS / "aimet/compress_torch.py"),
                folder / "job.json",
            ],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    return json.loads(done.stdout.splitlines()[-1])["seconds"]


def main() -> None:
    """Compress, time, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--aimet-python", help="AIMET's interpreter; without it, AIMET is left out")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    import onnxruntime
    import torch

    from halfstep.torch import (
        CompressionScheme,
        CostMetric,
        ModelCompressor,
        ModuleCompRatioPair,
        SpatialSvdParameters,
    )

    torchvision = torchvision_models._torchvision()
    torch.manual_seed(0)
    model = getattr(torchvision.models, arguments.arch)(weights=None).eval()
    names = [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d) and m.groups == 1
    ]
    ratios = dict.fromkeys(names, arguments.ratio)
    pairs = [ModuleCompRatioPair(model.get_submodule(n), r) for n, r in ratios.items()]
    parameters = SpatialSvdParameters(
        SpatialSvdParameters.Mode.manual, SpatialSvdParameters.ManualModeParams(pairs)
    )
    found: list = []

    def ours() -> None:
        found[:] = ModelCompressor.compress_model(
            model,
            lambda *_: 0.5,
            1,
            (1, 3, 224, 224),
            CompressionScheme.spatial_svd,
            CostMetric.mac,
            parameters,
        )

    wall, cpu = timed(ours, 1)
    print(f"halfstep.torch: {wall:.1f} s, {cpu:.1f} s of CPU time")
    inputs = np.random.default_rng(0).standard_normal((8, 3, 224, 224), np.float32)
    if arguments.aimet_python:
        other = theirs(arguments.aimet_python, arguments.arch, model, inputs[:1], ratios)
        print(f"aimet-torch: {other:.1f} s of CPU time, {other / cpu:.1f} times as much")

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for what, network in (("before", model), ("after", found[0])):
            path = str(Path(folder) / f"{what}.onnx")
            torch.onnx.export(
                network, (torch.from_numpy(inputs),), path, dynamo=True, verbose=False,
                external_data=False,
            )  # fmt: skip
            engine = halfstep.Model.load(path)
            engine.fold_batch_norms()
            engine.save(path)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            feed = {session.get_inputs()[0].name: inputs}
            runs = (lambda s=session, f=feed: s.run(None, f), lambda e=engine: e.run(inputs))
            seconds = []
            for run in runs:
                run()
                seconds.append(timed(run, arguments.rounds)[0])
            rows.append((what, seconds))
    print(f"MACs {found[1].mac_compression_ratio} of before; least seconds for 8 pictures")
    print("| | onnxruntime | engine |\n|---|---|---|")
    for what, seconds in rows:
        print(f"| {what} | {seconds[0]:.3f} | {seconds[1]:.3f} |")
    share = [after / before for before, after in zip(rows[0][1], rows[1][1], strict=True)]
    print(f"| after / before | {share[0]:.2f} | {share[1]:.2f} |")


if __name__ == "__main__":
    main()
