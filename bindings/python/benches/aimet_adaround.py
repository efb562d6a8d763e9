# SPDX-License-Identifier: Apache-2.0
# AdaRound beside AIMET's: seconds an iteration, layer by layer, and of a whole network.
"""Measure AdaRound beside aimet-onnx: seconds an iteration, one layer at a time.

For each layer both run AdaRound on that layer alone, W4 per channel, with ``--few`` and with
``--iterations`` iterations (Halfstep ten times as many more); the difference over the number of
iterations between them is what one costs, without what comes before the first. AIMET takes 32
samples an iteration, its default, Halfstep 256 output positions from all over the data, or all of
them by their moments (see ``AdaRoundOptions``). A whole network is extrapolated as the sum over the
measured layers of ``--network-iterations`` iterations each, for both; ``gram`` is measured as it
is, in a process of its own, on ``--gram-samples`` samples: the given ones, then their mirror
images, then the given ones again.

    python aimet_adaround.py --model net.onnx --inputs inputs.npz --array calib \
        --aimet-python .build/venv-aimet/bin/python --layer layer1.0.conv1

Batch norms are folded first, by Halfstep, for both. Without ``--layer`` all layers are measured,
which takes AIMET about a quarter of an hour for ResNet18.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def aimet(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of AIMET's AdaRound on a layer for each number of iterations; in its environment."""
    import logging

    import onnx

    logging.disable(logging.WARNING)
    from aimet_onnx.adaround.adaround_weight import Adaround
    from aimet_onnx.common.quantsim_config.utils import get_path_for_per_channel_config
    from aimet_onnx.quantsim import QuantizationSimModel

    samples = np.load(arguments.inputs)[arguments.array]
    batch = arguments.aimet_batch
    seconds = {}
    for iterations in (arguments.few, arguments.iterations):
        model = onnx.load(arguments.model)
        name = model.graph.input[0].name
        sim = QuantizationSimModel(
            model,
            param_type="int4",
            activation_type="int8",
            quant_scheme="min_max",
            config_file=get_path_for_per_channel_config(),
            providers=["CPUExecutionProvider"],
        )
        inputs = [{name: samples[start : start + batch]} for start in range(0, len(samples), batch)]
        sim.compute_encodings(inputs[:1])
        start = time.perf_counter()
        Adaround.apply_adaround(sim, inputs, iterations, nodes_to_include=[arguments.worker])
        seconds[str(iterations)] = time.perf_counter() - start
    return seconds


def halfstep_layer(
    model, samples: np.ndarray, layer: str, counts: tuple[int, int]
) -> dict[str, float]:
    """Seconds of our gradient AdaRound on a layer for each number of iterations."""
    others = [other.name for other in model.inspect() if other.name != layer]
    seconds = {}
    for iterations in counts:
        copy = model.copy()
        start = time.perf_counter()
        copy.adaround(samples, method="gradient", iterations=iterations, excluded_layers=others)
        seconds[str(iterations)] = time.perf_counter() - start
    return seconds


def whole_network(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds and megabytes of ``gram`` on the whole network, the samples among the latter."""
    import halfstep

    samples = np.load(arguments.gram_worker, mmap_mode="r")
    model = halfstep.Model.load(arguments.model)
    model.fold_batch_norms()
    start, processor = time.perf_counter(), time.process_time()
    model.adaround(samples, method="gram")
    return {
        "seconds": time.perf_counter() - start,
        "processor": time.process_time() - processor,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "samples": samples.nbytes / 1e6,
    }


def spawned(arguments: argparse.Namespace, *others: str | Path) -> dict[str, float]:
    """What this program prints last as a process of its own."""
    command = [sys.executable, __file__, "--model", arguments.model, "--inputs", arguments.inputs]
    done = subprocess.run([*command, *others], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measured_gram(arguments: argparse.Namespace, samples: np.ndarray) -> dict[str, float]:
    """Costs of ``gram`` on as many samples as are asked for."""
    parts = [samples, samples[..., ::-1]] * (arguments.gram_samples // (2 * len(samples)) + 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.npy"
        np.save(path, np.concatenate(parts)[: arguments.gram_samples])
        return spawned(arguments, "--gram-worker", path)


def per_iteration(seconds: dict[str, float]) -> float:
    """Seconds of one iteration from those of two numbers of them."""
    (few, first), (many, second) = sorted((int(count), time) for count, time in seconds.items())
    if second <= first:
        raise SystemExit(f"{many} iterations took no longer than {few}: measure more, or in quiet")
    return (second - first) / (many - few)


def main(arguments: list[str] | None = None) -> int:
    """Measure the layers that are asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True, help=".npz of one input's samples")
    parser.add_argument("--array", default="calib")
    parser.add_argument("--layer", action="append", help="name of a node; may be repeated")
    parser.add_argument("--aimet-python", help="interpreter with aimet-onnx; none to leave it out")
    parser.add_argument("--aimet-batch", type=int, default=32)
    parser.add_argument("--without-gram", action="store_true", help="measure iterations only")
    parser.add_argument("--few", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=510)
    parser.add_argument("--network-iterations", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path(".build/aimet_adaround.json"))
    parser.add_argument("--gram-samples", type=int, default=1024)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--gram-worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.iterations <= options.few:
        parser.error("--iterations: expected more than --few")
    if options.worker:
        print(json.dumps(aimet(options)))
        return 0
    if options.gram_worker:
        print(json.dumps(whole_network(options)))
        return 0

    import halfstep

    # Ours are so short that what comes before the first would drown fewer of them.
    own_iterations = options.few + 10 * (options.iterations - options.few)
    samples = np.load(options.inputs)[options.array]
    model = halfstep.Model.load(options.model)
    model.fold_batch_norms()
    results: dict = {"layers": {}}
    if not options.without_gram:
        gram = results["gram"] = measured_gram(options, samples)
        print(
            f"gram, whole network, {options.gram_samples} samples: {gram['seconds']:.1f} s, "
            f"{gram['processor']:.0f} CPU s, peak {gram['peak']:.0f} MB, "
            f"of which {gram['samples']:.0f} MB are samples"
        )
    layers = options.layer or [layer.name for layer in model.inspect()]
    print("| layer | halfstep, s an iteration | AIMET | times |")
    with tempfile.TemporaryDirectory() as folder:
        folded = Path(folder) / "folded.onnx"
        model.save(folded)
        for layer in layers:
            own = per_iteration(
                halfstep_layer(model, samples, layer, (options.few, own_iterations))
            )
            entry = {"halfstep": own}
            if options.aimet_python:
                command = [options.aimet_python, __file__, "--worker", layer, "--model", folded]
                command += ["--inputs", options.inputs, "--array", options.array]
                command += ["--few", str(options.few), "--iterations", str(options.iterations)]
                command += ["--aimet-batch", str(options.aimet_batch)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    print(f"{layer}: {done.stderr.strip()}", file=sys.stderr)
                    return 1
                entry["aimet"] = per_iteration(json.loads(done.stdout.splitlines()[-1]))
            results["layers"][layer] = entry
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n")
            other = entry.get("aimet")
            cells = "– | –" if other is None else f"{other:.4f} | {other / own:.1f}"
            print(f"| {layer} | {own:.5f} | {cells} |", flush=True)
    totals = {}
    for name in ("halfstep", "aimet"):
        costs = [entry[name] for entry in results["layers"].values() if name in entry]
        if costs:
            total = totals[name] = sum(costs) * options.network_iterations
            print(
                f"{name}: {len(costs)} layers of {options.network_iterations} iterations, "
                f"extrapolated from {options.iterations - options.few} a layer: {total:.0f} s"
            )
    if len(totals) == 2:
        print(f"gradient: {totals['aimet'] / totals['halfstep']:.1f} times as fast an iteration")
    if "aimet" in totals and "gram" in results:
        print(f"gram: {totals['aimet'] / results['gram']['seconds']:.0f} times as fast")
    return 0


if __name__ == "__main__":
    sys.exit(main())
