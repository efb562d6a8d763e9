# SPDX-License-Identifier: Apache-2.0
"""Rounds an ONNX model's weights to 4 bits in Python, with a cache to resume from.

python round_weights.py model.onnx output-folder [calibration.npy]

Without calibration data, layers are rounded by what folded batch norms let expect of their inputs.
"""

import pathlib
import sys

import numpy as np

import halfstep


def round_weights(model_path: str, folder: str, data_path: str | None = None) -> None:
    """Write model.onnx with rounded weights and model.encodings with their grids to a folder."""
    model = halfstep.Model.load(model_path)
    model.fold_batch_norms()
    model.equalize()

    # Each layer's result is kept, so that a run which was stopped goes on where it ended, and one
    # with another width for one layer redoes only what that changes.
    data = None if data_path is None else np.load(data_path)
    first = model.inspect()[0].name
    layers = model.adaround(
        data,
        param_bits=4,
        layer_bits={first: 8},
        cache=None if data is None else pathlib.Path(folder) / "rounded-layers",
        progress=True,
    )
    for layer in layers:
        print(f"{layer.name}: {layer.bits} bits, noise {layer.noise_before:.4f}", end=" ")
        print(f"to {layer.noise_after:.4f} ({layer.kept})")

    # The simulation takes the grids that the model carries.
    simulation = halfstep.QuantizationSimModel(model, param_bits=4)
    if data is not None:
        simulation.compute_encodings(data, progress=False)
        simulation.export(folder, "model")
    else:
        model.save(pathlib.Path(folder) / "model.onnx")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(f"usage: {sys.argv[0]} model.onnx output-folder [calibration.npy]")
    round_weights(*sys.argv[1:])
