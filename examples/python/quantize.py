# SPDX-License-Identifier: Apache-2.0
"""Quantizes an ONNX model in Python: fold, equalize, calibrate, export.

python quantize.py model.onnx calibration.npy output-folder
"""

import pathlib
import sys

import numpy as np

import halfstep


def quantize(model_path: str, data_path: str, folder: str) -> None:
    """Write model.onnx, model.encodings and model_qdq.onnx to a folder."""
    model = halfstep.Model.load(model_path)
    model.fold_batch_norms()
    model.equalize()

    # The calibration data is one array [N, ...]; any iterable of batches will do.
    images = np.load(data_path)
    batches = [images[start : start + 8] for start in range(0, len(images), 8)]
    simulation = halfstep.QuantizationSimModel(model)
    simulation.compute_encodings(batches, progress=False)

    simulation.export(folder, "model")
    simulation.export_qdq(str(pathlib.Path(folder) / "model_qdq.onnx"))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(f"usage: {sys.argv[0]} model.onnx calibration.npy output-folder")
    quantize(*sys.argv[1:])
