# SPDX-License-Identifier: Apache-2.0
# Real networks on Qualcomm's emulator and in a DLC, beside the simulation.
"""Quantizes ONNX classifiers as an HTP target does, runs them on its emulator, writes their DLC.

    .build/venv-qnn/bin/python bindings/python/benches/qualcomm_networks.py net.onnx ...

Weights of the networks may be random: what is compared is the emulator and the simulation.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

import halfstep
from halfstep import qualcomm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support import torchvision_models


def measure(path: str, bits: tuple[int, int], rows: int, folder: Path) -> str:
    """Return one row of the table: differences at the output, sizes."""
    model = halfstep.Model.load(path)
    model.fold_batch_norms()
    (info,) = model.inputs
    feed = {info.name: torchvision_models.inputs("resnet18", batch=rows, seed=32)}
    sim = halfstep.QuantizationSimModel(model, *bits, config="htp_v73")
    sim.compute_encodings([feed], progress=False)
    sim.export_qdq(folder / "net.onnx", prequantize_constants=True, int32_bias=True)
    sim.export_dlc(folder / "net.dlc")
    theirs = qualcomm.run_on_htp(folder / "net.onnx", feed)
    ours, original = sim.run(feed), sim.model.run(feed)
    ((name, values),) = theirs.items()
    off = np.rint(np.abs(values - ours[name]) / sim.encoding(name).scales[0])

    def decibels(noisy: np.ndarray) -> float:
        noise = np.square(noisy - original[name], dtype=np.float64).sum()
        return float(10 * np.log10(np.square(original[name], dtype=np.float64).sum() / noise))

    return (
        f"| {Path(path).stem} | W{bits[0]}A{bits[1]} | {(off == 0).mean():.1%}"
        f" | {(off == 1).mean():.1%} | {(off > 1).mean():.1%} | {off.max():.0f}"
        f" | {decibels(ours[name]):.1f} | {decibels(values):.1f}"
        f" | {(folder / 'net.dlc').stat().st_size / 1e6:.1f} |"
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="+", metavar="ONNX", help="classifiers of 224² pictures")
    parser.add_argument("--rows", type=int, default=4, help="pictures, also for calibration")
    options = parser.parse_args()
    columns = ["network", "bits", "equal", "1 step", "more", "largest"]
    columns += ["simulation dB", "emulator dB", "DLC MB"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for path in options.networks:
        for bits in ((8, 8), (8, 16), (4, 8)):
            with tempfile.TemporaryDirectory() as folder:
                print(measure(path, bits, options.rows, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
