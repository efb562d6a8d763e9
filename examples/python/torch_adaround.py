# SPDX-License-Identifier: Apache-2.0
# Rounds a small network's weights to few bits by each method, without labels, on Fashion-MNIST.
"""Weights of 4 and 3 bits without training: what rounding recovers.

Takes the network of torch_qat.py (trained there, or here if it has not run), folds its batch norms,
rounds its weights with 512 unlabeled pictures by each method, and prints the accuracies on all
10,000 test pictures, 8-bit activations throughout. Each method's grids are written as a file that a
simulation takes. From a shell::

    apt-get install dataset-fashion-mnist
    python torch_adaround.py --out .build/torch-qat
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch_qat
from torch import nn
from torch.utils.data import DataLoader

from halfstep.torch import (
    AdaroundParameters,
    QuantizationSimModel,
    apply_adaround,
    apply_seq_mse,
    fold_all_batch_norms,
)


def trained(folder: Path, training: torch_qat.Data, epochs: int, weights: str) -> nn.Module:
    """Return the float network, batch norms folded."""
    torch.manual_seed(0)
    model = torch_qat.Network()
    if (folder / weights).is_file():
        model.load_state_dict(torch.load(folder / weights))
    else:
        print("training in float")
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
        torch_qat.train(model, training, epochs, optimizer, peak=[4e-3])
        torch.save(model.state_dict(), folder / weights)
    model.eval()
    fold_all_batch_norms(model, dummy_input=training[0][:1])
    return model


def simulation(model: nn.Module, pictures: torch.Tensor, bits: int) -> QuantizationSimModel:
    """Return a simulation that is not calibrated yet."""
    return QuantizationSimModel(
        model, pictures[:1], "tf_enhanced", default_param_bw=bits, default_output_bw=8
    )


def rounded(
    model: nn.Module, pictures: torch.Tensor, bits: int, method: str, out: Path
) -> QuantizationSimModel:
    """Return a calibrated simulation whose weights a method has rounded."""
    loader = DataLoader(pictures, batch_size=64)
    if method == "nearest":
        sim = simulation(model, pictures, bits)
    elif method == "sequential_mse":
        sim = simulation(model, pictures, bits)
        apply_seq_mse(sim, loader)
    else:
        name = f"{method}_w{bits}"
        params = AdaroundParameters(loader, num_batches=len(loader))
        model = apply_adaround(
            model, pictures[:1], params, out, name, default_param_bw=bits, method=method
        )
        sim = simulation(model, pictures, bits)
        sim.set_and_freeze_param_encodings(out / f"{name}.encodings")
    sim.compute_encodings(loader)
    return sim


def main() -> None:
    """Round by each method and print the table."""
    parser = argparse.ArgumentParser(description="Rounding of weights on Fashion-MNIST")
    parser.add_argument("--data", type=Path, default=torch_qat.DATA, help="folder of the IDX files")
    parser.add_argument("--out", type=Path, default=Path("torch-qat"), help="folder for results")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of float training")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3], help="widths of weights")
    parser.add_argument(
        "--methods", nargs="+", default=["nearest", "sequential_mse", "gram", "gradient", "auto"]
    )
    parser.add_argument("--quick", action="store_true", help="32 batches, to see that it works")
    arguments = parser.parse_args()
    if not (arguments.data / "train-images-idx3-ubyte.gz").is_file():
        sys.exit(f"torch_adaround: no pictures in {arguments.data}; see --help")
    arguments.out.mkdir(parents=True, exist_ok=True)
    training = torch_qat.load(arguments.data, "train")
    test = torch_qat.load(arguments.data, "t10k")
    if arguments.quick:
        training = tuple(part[:4096] for part in training)
        test = tuple(part[:500] for part in test)
        arguments.epochs = 1
    weights = "float-quick.pt" if arguments.quick else "float.pt"
    model = trained(arguments.out, training, arguments.epochs, weights)
    pictures = training[0][: torch_qat.CALIBRATION]

    print(f"{'weights':8}{'method':16}{'top-1':8}{'seconds':>8}")
    print(f"{'float':8}{'':16}{torch_qat.accuracy(model, test):<8.4f}")
    for bits in arguments.bits:
        for method in arguments.methods:
            start = time.perf_counter()
            sim = rounded(model, pictures, bits, method, arguments.out)
            seconds = time.perf_counter() - start
            value = torch_qat.accuracy(sim.model, test)
            print(f"{f'W{bits}A8':8}{method:16}{value:<8.4f}{seconds:8.1f}", flush=True)


if __name__ == "__main__":
    main()
