# SPDX-License-Identifier: Apache-2.0
# Speed beside the peers: every contestant in its own process, taking turns; medians and ratios.
"""Measure Halfstep beside onnxruntime, AIMET and torch.

Every contestant is a process of its own that waits while another measures; a step goes round the
contestants again and again (A B C A B C …), after one warm-up each. Ratios are of medians.

    python bench_peers.py --models .build/models --aimet-python .build/venv-aimet/bin/python

Prints a Markdown table; the samples go to the JSON file. A sample during which other processes used
more than a quarter of a core is marked, and the table says how many there were.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORKER = HERE / "peer_worker.py"
EXPORTER = HERE.parent / "tests" / "support" / "torchvision_models.py"
QUIET_CORES = 0.25

AIMET = ("aimet-onnx", "aimet-torch", "aimet-torch-module")
#: Contestants that work on a live torch module.
TORCH = ("torch-float", "aimet-torch-module", "halfstep-torch")
OURS = ("halfstep", "halfstep-torch")


@dataclass(frozen=True)
class Target:
    """What a row of the table is to reach."""

    text: str
    #: Contestant that ours is compared with.
    against: str
    #: Its time over ours, at least.
    least: float


@dataclass(frozen=True)
class Step:
    """A row of the table: who takes part, and what the target compares."""

    contestants: tuple[str, ...]
    #: The step that a contestant runs, where it is not the row's name.
    instead: dict[str, str] = field(default_factory=dict)
    #: Whether it depends on the model.
    per_model: bool = True
    targets: tuple[Target, ...] = ()
    #: Whose time the others are ratios of.
    baseline: str = "onnxruntime"


STEPS = {
    "fp32": Step(("onnxruntime", "halfstep")),
    "fold": Step(("aimet-onnx", "aimet-torch", "halfstep")),
    "fold_equalize": Step(
        ("aimet-onnx", "aimet-torch", "halfstep"),
        targets=(Target("≥ 20× faster than AIMET", "aimet-onnx", 20),),
    ),
    "calibrate_min_max": Step(
        ("onnxruntime", "aimet-onnx", "aimet-torch", "halfstep"),
        instead={"onnxruntime": "fp32"},
        targets=(Target("≤ 1.15× the onnxruntime FP32 pass", "onnxruntime", 1 / 1.15),),
    ),
    "calibrate_sqnr": Step(
        ("onnxruntime", "aimet-onnx", "halfstep"),
        instead={"onnxruntime": "fp32"},
        targets=(Target("≤ 1.3× the onnxruntime FP32 pass", "onnxruntime", 1 / 1.3),),
    ),
    "simulate": Step(
        ("onnxruntime", "aimet-onnx", "halfstep"),
        instead={"onnxruntime": "fp32"},
        targets=(Target("≥ 0.85× onnxruntime FP32 throughput", "onnxruntime", 0.85),),
    ),
    # The target is 12 GB/s, which the figures show.
    "fake_quantize": Step(("memcpy", "torch", "halfstep"), per_model=False),
    "torch_inference": Step(
        TORCH,
        targets=(
            Target("≥ 2× AIMET's throughput", "aimet-torch-module", 2),
            Target("≥ 0.8× the FP32 module's throughput", "torch-float", 0.8),
        ),
        baseline="torch-float",
    ),
    "torch_training_step": Step(
        TORCH,
        targets=(Target("≤ 1.5× the FP32 step", "torch-float", 1 / 1.5),),
        baseline="torch-float",
    ),
    "torch_calibrate_sqnr": Step(
        TORCH[1:], targets=(Target("≥ 6× faster than AIMET", "aimet-torch-module", 6),)
    ),
    "torch_fake_quantize": Step(
        TORCH[1:],
        per_model=False,
        targets=(Target("≥ 8× AIMET's bytes/s", "aimet-torch-module", 8),),
    ),
    "torch_fake_quantize_backward": Step(
        TORCH[1:],
        per_model=False,
        targets=(Target("≥ 10× AIMET's bytes/s", "aimet-torch-module", 10),),
    ),
}


def busy_seconds() -> float:
    """Return the seconds that all cores together have been busy since boot."""
    first = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, soft, *_ = map(int, first)
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


class Worker:
    """A contestant's process."""

    def __init__(self, name: str, python: str, models: Path, threads: int):
        environment = os.environ | {
            variable: str(threads)
            for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        }
        self.name = name
        self.process = subprocess.Popen(
            [python, str(WORKER), name, str(models), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not os.environ.get("BENCH_VERBOSE") else None,
            text=True,
            env=environment,
        )
        self.import_seconds = self.read()["import_seconds"]

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}")
        return json.loads(line)

    def measure(self, step: str, model: str) -> dict:
        """Run a step; add how many cores other processes used meanwhile."""
        busy, start = busy_seconds(), time.perf_counter()
        self.process.stdin.write(json.dumps({"step": step, "model": model}) + "\n")
        self.process.stdin.flush()
        result = self.read()
        wall = time.perf_counter() - start
        # The kernel counts in hundredths of a second; short steps cannot be judged this way.
        others = (busy_seconds() - busy - result["cpu_seconds"]) / wall
        return result | {"other_cores": round(others, 2) if wall > 0.2 else None}

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


def describe_machine() -> dict:
    """Return what a reader must know to judge the figures."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    values = dict(line.split(":", 1) for line in info if ":" in line)
    values = {key.strip(): value.strip() for key, value in values.items()}
    flags = values.get("flags", "").split()
    return {
        "cpu": values.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "extensions": [f for f in ("avx2", "avx512f", "avx512_vnni", "avx_vnni") if f in flags],
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "kernel": platform.release(),
        "load": os.getloadavg()[0],
    }


def versions(python: str, packages: tuple[str, ...]) -> dict[str, str]:
    """Ask an interpreter for the versions of the packages that it has."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "have = {d.metadata['Name'].lower() for d in m.distributions()}\n"
        "print(json.dumps({p: m.version(p) for p in sys.argv[1:] if p in have}))"
    )
    done = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def import_seconds(python: str, module: str) -> float | None:
    """Time an import in a fresh interpreter; the interpreter's own start is not counted."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    done = subprocess.run([python, "-W", "ignore", "-c", code], capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def prepare(models: Path, names: list[str], python: str) -> None:
    """Export what is missing, and write the pictures that everybody uses."""
    models.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not (models / f"{name}.onnx").exists()]
    if missing:
        subprocess.run([python, str(EXPORTER), "--out", str(models), *missing], check=True)
    import numpy as np

    sys.path.insert(0, str(HERE.parent / "tests"))
    from support import torchvision_models

    pictures = torchvision_models.inputs(names[0], batch=64, seed=11)
    np.save(models / "bench_images.npy", pictures)


def take_turns(step: str, model: str, workers: dict[str, Worker], rounds: int) -> dict:
    """Measure one row; return each contestant's samples, without the warm-up."""
    row = STEPS[step]
    taking_part = [name for name in row.contestants if name in workers]
    samples: dict[str, list[dict]] = {name: [] for name in taking_part}
    for turn in range(rounds + 1):
        for name in list(taking_part):
            sample = workers[name].measure(row.instead.get(name, step), model)
            if "error" in sample:
                print(f"{step} {model}: {name}: {sample['error']}", file=sys.stderr)
                taking_part.remove(name)
                samples[name] = [sample]
            elif turn > 0:
                samples[name].append(sample)
    return samples


def summarize(samples: dict[str, list[dict]]) -> dict[str, dict]:
    """Reduce samples to median, least and greatest, and count the disturbed ones."""
    result = {}
    for name, taken in samples.items():
        seconds = [sample["seconds"] for sample in taken if "seconds" in sample]
        if not seconds:
            result[name] = {"error": taken[0]["error"]} if taken else {"error": "no sample"}
            continue
        result[name] = {
            "median": statistics.median(seconds),
            "least": min(seconds),
            "greatest": max(seconds),
            "samples": len(seconds),
            "disturbed": sum((s["other_cores"] or 0) > QUIET_CORES for s in taken),
        }
        for extra in ("gb_per_s", "create_seconds", "clock_cpu"):
            if extra in taken[0]:
                result[name][extra] = statistics.median(sample[extra] for sample in taken)
    return result


def number(value: float) -> str:
    """Write three significant digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def table(report: dict) -> str:
    """Render a report as Markdown."""
    machine = report["machine"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {' '.join(machine['extensions'])}; "
        f"{report['threads']} threads; load at the start {machine['load']:.2f}; "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "",
        "| step | model | contestant | median s | min..max | × FP32 pass | ours is faster by "
        "| disturbed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        plain = row["contestants"].get(STEPS[row["step"]].baseline, {}).get("median")
        ours = next(
            (row["contestants"][o].get("median") for o in OURS if o in row["contestants"]), 0
        )
        for name, figures in row["contestants"].items():
            head = f"| {row['step']} | {row['model'] or '–'} | {name} |"
            if "error" in figures:
                lines.append(f"{head} {figures['error'][:80]} | | | | |")
                continue
            median = figures["median"]
            rate = f" ({figures['gb_per_s']:.1f} GB/s)" if "gb_per_s" in figures else ""
            more = (
                f" + create {number(figures['create_seconds'])}"
                if "create_seconds" in figures
                else ""
            )
            spread = f"{number(figures['least'])}..{number(figures['greatest'])}"
            to_plain = f"{median / plain:.2f}" if plain else ""
            faster = f"{median / ours:.2f}" if ours and name not in OURS else ""
            disturbed = f"{figures['disturbed']} of {figures['samples']}"
            lines.append(
                f"{head} {number(median)}{rate}{more} | {spread} | {to_plain} | {faster} "
                f"| {disturbed} |"
            )
    lines += ["", *target_lines(report)]
    lines += ["", "| import | seconds |", "|---|---|"]
    for name, seconds in report["imports"].items():
        lines.append(f"| {name} | {number(seconds) if seconds is not None else 'missing'} |")
    lines += ["", "| peak memory of calibration, MB | process | model file | over the model |"]
    lines.append("|---|---|---|---|")
    for entry in report["memory"]:
        own = entry["model_mb"]
        if "error" in entry:
            lines.append(f"| {entry['model']}, {entry['contestant']} | {entry['error'][:80]} | | |")
            continue
        lines.append(
            f"| {entry['model']}, {entry['contestant']} | {entry['peak_mb']:.0f} | {own:.0f} "
            f"| {entry['peak_mb'] - own:.0f} |"
        )
    return "\n".join(lines)


def target_lines(report: dict) -> list[str]:
    """Render what was to be reached: the other's time over ours, by the clock and in CPU time."""
    lines = [
        "| step | model | target | at least | by the clock | in CPU time | reached |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        contestants = row["contestants"]
        ours = next((contestants[name] for name in OURS if name in contestants), {})
        for target in STEPS[row["step"]].targets:
            other = contestants.get(target.against, {})
            if "median" not in ours or "median" not in other:
                continue
            ratio = other["median"] / ours["median"]
            cpu = other["clock_cpu"] / ours["clock_cpu"] if ours.get("clock_cpu") else 0
            lines.append(
                f"| {row['step']} | {row['model'] or '–'} | {target.text} | {target.least:.2f} "
                f"| {ratio:.2f} | {cpu:.2f} | {'yes' if ratio >= target.least else '**no**'} |"
            )
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, write the samples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path(".build/models"))
    parser.add_argument("--names", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--python", default=sys.executable, help="has onnxruntime and halfstep")
    parser.add_argument("--aimet-python", help="has aimet-onnx, aimet-torch and torch")
    parser.add_argument(
        "--steps",
        nargs="+",
        choices=[*STEPS, "torch"],
        default=list(STEPS),
        help="torch: its five",
    )
    parser.add_argument("--without", nargs="+", default=[], help="contestants to leave out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(".build/bench/peers.json"))
    options = parser.parse_args(arguments)

    if "torch" in options.steps:
        rest = [step for step in options.steps if step != "torch"]
        options.steps = [*rest, *(step for step in STEPS if step.startswith("torch_"))]
    options.models = options.models.resolve()
    prepare(options.models, options.names, options.python)
    aimet = options.aimet_python
    pythons = {"onnxruntime": options.python, "halfstep": options.python, "memcpy": options.python}
    pythons["torch"] = aimet or options.python
    pythons["torch-float"] = pythons["halfstep-torch"] = options.python
    if aimet:
        pythons |= dict.fromkeys(AIMET, aimet)
    for name in options.without:
        pythons.pop(name, None)

    report: dict = {
        "machine": describe_machine(),
        "threads": options.threads,
        "versions": versions(options.python, ("halfstep", "onnxruntime", "numpy"))
        | (versions(aimet, ("aimet-onnx", "aimet-torch", "torch")) if aimet else {}),
        "rows": [],
        "imports": {},
        "memory": [],
    }
    wanted = {c for step in options.steps for c in STEPS[step].contestants} & pythons.keys()
    workers: dict[str, Worker] = {}
    for name in sorted(wanted):
        try:
            workers[name] = Worker(name, pythons[name], options.models, options.threads)
        except (RuntimeError, OSError) as error:
            print(f"{name}: {error}", file=sys.stderr)
    for step in options.steps:
        for model in options.names if STEPS[step].per_model else [""]:
            samples = take_turns(step, model, workers, options.rounds)
            row = {"step": step, "model": model, "samples": samples}
            report["rows"].append(row | {"contestants": summarize(samples)})
            print(f"{step} {model} done", file=sys.stderr)
    for worker in workers.values():
        worker.close()

    modules = {"halfstep": "halfstep", "onnxruntime": "onnxruntime"}
    modules |= {"aimet-onnx": "aimet_onnx", "aimet-torch": "aimet_torch"}
    for name, module in modules.items():
        if name in workers:
            taken = [import_seconds(pythons[name], module) for _ in range(4)][1:]
            known = [seconds for seconds in taken if seconds is not None]
            report["imports"][name] = statistics.median(known) if known else None
    for model in options.names:
        for name in ("aimet-onnx", "aimet-torch", "halfstep"):
            if name not in workers:
                continue
            fresh = Worker(name, pythons[name], options.models, options.threads)
            entry = fresh.measure("memory", model)
            fresh.close()
            size = (options.models / f"{model}.onnx").stat().st_size / 1e6
            report["memory"].append(entry | {"model": model, "contestant": name, "model_mb": size})

    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
