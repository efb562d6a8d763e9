# SPDX-License-Identifier: Apache-2.0
# Trains a small network on Fashion-MNIST, quantizes it, trains it again with quantization.
"""Quantization-aware training from beginning to end, on real data, in a few CPU minutes.

Trains a small MobileNetV2-style network on the 60,000 pictures of Fashion-MNIST, folds its batch
norms, simulates 8-bit and 4-bit weights, trains the 4-bit simulation for up to two epochs (weights
and ranges), prints the accuracies on all 10,000 test pictures, exports the result with
QuantizeLinear nodes, and checks that onnxruntime computes what the simulation computes.

The pictures come from Debian's package ``dataset-fashion-mnist``. From a shell::

    apt-get install dataset-fashion-mnist
    python torch_qat.py --out .build/torch-qat
"""

from __future__ import annotations

import argparse
import gzip
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from halfstep.torch import QuantizationSimModel, fold_all_batch_norms

DATA = Path("/usr/share/datasets/fashion-mnist")
MEAN, DEVIATION = 0.2860, 0.3530  # of the training pictures, scaled to 0...1
CALIBRATION = 512  # pictures that ranges are measured on

# --- data --------------------------------------------------------------------------------------


def read_idx(path: Path) -> np.ndarray:
    """Return the bytes of an IDX file: a big-endian header, then uint8 values."""
    data = gzip.decompress(path.read_bytes())
    rank = data[3]
    shape = np.frombuffer(data, ">i4", rank, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def load(folder: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pictures ``[N, 1, 28, 28]``, normalized, and their classes ``[N]``."""
    pictures = read_idx(folder / f"{part}-images-idx3-ubyte.gz").astype(np.float32) / 255
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz").astype(np.int64)
    return torch.from_numpy((pictures[:, None] - MEAN) / DEVIATION), torch.from_numpy(labels)


Data = tuple[torch.Tensor, torch.Tensor]


def batches(data: Data, size: int, generator: torch.Generator | None = None) -> Iterator[Data]:
    """Yield batches, shuffled and flipped at random if there is a generator."""
    count = len(data[0])
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    for part in order.split(size):
        pictures = data[0][part]
        if generator is not None:
            flips = torch.rand(len(part), generator=generator) < 0.5
            pictures = torch.where(flips[:, None, None, None], pictures.flip(3), pictures)
        yield pictures, data[1][part]


# --- network -----------------------------------------------------------------------------------


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list:
    """Return a convolution without bias and its batch norm."""
    padding = kernel // 2
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class InvertedResidual(nn.Module):
    """MobileNetV2's block (Sandler et al., 2018, arXiv:1801.04381)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        inner = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            *conv_bn(inputs, inner, 1),
            nn.ReLU6(),
            *conv_bn(inner, inner, 3, stride, groups=inner),
            nn.ReLU6(),
            *conv_bn(inner, outputs, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's result, with the input added where the shapes agree."""
        y = self.layers(x)
        return x + y if self.residual else y


class Network(nn.Module):
    """A small MobileNetV2 for pictures of 28 by 28."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *conv_bn(1, 16, 3, stride=2),
            nn.ReLU6(),
            InvertedResidual(16, 24, 1),
            InvertedResidual(24, 24, 1),
            InvertedResidual(24, 40, 2),
            InvertedResidual(40, 40, 1),
            InvertedResidual(40, 64, 1),
            *conv_bn(64, 160, 1),
            nn.ReLU6(),
        )
        self.classifier = nn.Linear(160, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits ``[N, classes]`` of pictures ``[N, 1, 28, 28]``."""
        x = nn.functional.adaptive_avg_pool2d(self.features(x), 1)
        return self.classifier(torch.flatten(x, 1))


# --- training ----------------------------------------------------------------------------------


def train(
    model: nn.Module,
    data: Data,
    epochs: int,
    optimizer: torch.optim.Optimizer,
    peak: list[float],
    size: int = 128,
) -> None:
    """Run an ordinary training loop, the learning rate rising to its peak and falling to zero."""
    model.train()
    steps = epochs * -(-len(data[0]) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps, pct_start=0.2)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    generator = torch.Generator().manual_seed(1)
    for epoch in range(epochs):
        start, total = time.perf_counter(), 0.0
        for pictures, labels in batches(data, size, generator):
            optimizer.zero_grad()
            loss = loss_of(model(pictures), labels)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(labels)
        seconds = time.perf_counter() - start
        print(f"  epoch {epoch + 1}: loss {total / len(data[0]):.4f}, {seconds:.0f} s", flush=True)


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Return the share of pictures whose class is right."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches(data, 500))
    return right / len(data[0])


# --- quantization ------------------------------------------------------------------------------


def simulate(model: nn.Module, data: Data, weight_bits: int) -> QuantizationSimModel:
    """Return a calibrated simulation with the given weights and 8-bit activations."""
    sim = QuantizationSimModel(
        model,
        dummy_input=data[0][:1],
        quant_scheme="tf_enhanced",
        default_param_bw=weight_bits,
        default_output_bw=8,
    )

    def calibrate(quantized: nn.Module, pictures: torch.Tensor) -> None:
        for part in pictures.split(64):
            quantized(part)

    sim.compute_encodings(calibrate, data[0][:CALIBRATION])
    return sim


def train_quantized(sim: QuantizationSimModel, data: Data, epochs: int) -> None:
    """Train weights and ranges of a simulation."""
    ranges, weights = [], []
    for name, parameter in sim.model.named_parameters():
        if parameter.requires_grad:
            (ranges if name.endswith((".minimum", ".maximum")) else weights).append(parameter)
    optimizer = torch.optim.Adam([{"params": weights}, {"params": ranges}])
    train(sim.model, data, epochs, optimizer, peak=[5e-4, 5e-4])


def check_export(sim: QuantizationSimModel, path: Path, data: Data) -> tuple[float, float, float]:
    """Write the network with QuantizeLinear nodes and run it on all pictures in onnxruntime.

    Returns its accuracy with onnxruntime's integer kernels, and, computed node by node as written,
    the shares of logits that differ from the simulation by one step of their grid and by more. (A
    float sum in another order can move a value across a rounding border.)
    """
    import onnxruntime

    sim.onnx.export(str(path))
    sim.model.eval()
    with torch.no_grad():
        expected = torch.cat([sim.model(pictures) for pictures, _ in batches(data, 500)])
    gaps = torch.unique(expected).diff()
    step = gaps[gaps > 1e-6].min()
    logits = []
    levels = onnxruntime.GraphOptimizationLevel
    for level in (levels.ORT_ENABLE_ALL, levels.ORT_DISABLE_ALL):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        runs = [
            session.run(None, {name: pictures.numpy()})[0] for pictures, _ in batches(data, 500)
        ]
        logits.append(torch.from_numpy(np.concatenate(runs)))
    right = int((logits[0].argmax(1) == data[1]).sum()) / len(expected)
    steps = ((logits[1] - expected) / step).abs()
    one = ((steps > 0.5) & (steps < 1.5)).double().mean()
    return right, float(one), float((steps > 1.5).double().mean())


# --- program -----------------------------------------------------------------------------------


def main() -> None:
    """Train, quantize, print the table, export."""
    parser = argparse.ArgumentParser(description="Quantization-aware training on Fashion-MNIST")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four IDX files")
    parser.add_argument("--out", type=Path, default=Path("torch-qat"), help="folder for results")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of float training")
    parser.add_argument("--qat-epochs", type=int, default=2, help="epochs of quantized training")
    parser.add_argument("--quick", action="store_true", help="32 batches, to see that it works")
    arguments = parser.parse_args()
    if not (arguments.data / "train-images-idx3-ubyte.gz").is_file():
        sys.exit(f"torch_qat: no pictures in {arguments.data}; see --help")
    arguments.out.mkdir(parents=True, exist_ok=True)
    training, test = load(arguments.data, "train"), load(arguments.data, "t10k")
    if arguments.quick:
        training = tuple(part[:4096] for part in training)
        test = tuple(part[:500] for part in test)
        arguments.epochs = arguments.qat_epochs = 1

    torch.manual_seed(0)
    # Channels last is the layout in which depthwise convolutions train fastest on a CPU.
    model = Network().to(memory_format=torch.channels_last)
    weights = arguments.out / ("float-quick.pt" if arguments.quick else "float.pt")
    if weights.is_file():
        model.load_state_dict(torch.load(weights))
        print(f"float network from {weights}")
    else:
        print("training in float")
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
        train(model, training, arguments.epochs, optimizer, peak=[4e-3])
        torch.save(model.state_dict(), weights)
    table = [("FP32", accuracy(model, test))]

    model.eval()
    fold_all_batch_norms(model, dummy_input=training[0][:1])
    table.append(("FP32, batch norms folded", accuracy(model, test)))
    table.append(("W8A8", accuracy(simulate(model, training, 8).model, test)))
    sim = simulate(model, training, 4)
    table.append(("W4A8", accuracy(sim.model, test)))

    print("training W4A8: weights and ranges")
    train_quantized(sim, training, arguments.qat_epochs)
    table.append((f"W4A8, {arguments.qat_epochs} epochs of QAT", accuracy(sim.model, test)))

    sim.export(str(arguments.out), "w4a8", dummy_input=training[0][:1])
    exported, one, more = check_export(sim, arguments.out / "w4a8_qdq.onnx", test)
    table.append(("the same in onnxruntime (QDQ)", exported))

    print(f"\n{'top-1 of ' + format(len(test[0]), ','):32}  {'':6}  less than FP32")
    for name, value in table:
        print(f"{name:32}  {value:.4f}  {100 * (table[0][1] - value):+.2f} points")
    print(f"\nlogits off by one step, node by node: {100 * one:.3f} %; by more: {100 * more:.3f} %")
    print(f"written to {arguments.out}: w4a8.onnx, w4a8.pth, w4a8.encodings, w4a8_qdq.onnx")


if __name__ == "__main__":
    main()
