# SPDX-License-Identifier: Apache-2.0
# Trains small networks on Fashion-MNIST, compresses them, trains them on, quantizes them.
"""Compression from beginning to end, on real data, in some CPU minutes.

Trains a MobileNetV2-style and a ResNet-style network on the 60,000 pictures of Fashion-MNIST and
makes them smaller until half of the multiply-accumulates remain: by channel pruning and by spatial
SVD, each without and with unlabeled data, and by pruning first and SVD then. Trains the results for
one more epoch, and quantizes the last one to 8 bits. Prints the accuracies on all 10,000 test
pictures, and writes a page on what each layer lost.

The pictures come from Debian's package ``dataset-fashion-mnist``. From a shell::

    apt-get install dataset-fashion-mnist
    python torch_compress.py --out .build/torch-compress
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
from torch import nn
from torch_qat import DATA, Data, Network, accuracy, conv_bn, load, simulate, train

from halfstep.torch import (
    AutomaticSelectionParameters,
    ChannelPruningParameters,
    CompressionScheme,
    CostMetric,
    ModelCompressor,
    SpatialSvdParameters,
)

CALIBRATION = 256  # unlabeled pictures that layers are made for
SELECTION = 5000  # labeled training pictures that decide between pruning and SVD
PRUNED = (0.9, 0.8, 0.7, 0.6)  # what pruning may leave to SVD

# --- network -----------------------------------------------------------------------------------


class Residual(nn.Module):
    """ResNet's basic block (He et al., 2015, arXiv:1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *conv_bn(inputs, outputs, 3, stride), nn.ReLU(), *conv_bn(outputs, outputs, 3)
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(*conv_bn(inputs, outputs, 1, stride))
        )
        self.activation = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's result."""
        return self.activation(self.layers(x) + self.shortcut(x))


class ResNet(nn.Module):
    """A small ResNet for pictures of 28 by 28."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        blocks = [(16, 16, 2), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
        self.features = nn.Sequential(
            *conv_bn(1, 16, 3), nn.ReLU(), *(Residual(*block) for block in blocks)
        )
        self.classifier = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits ``[N, classes]`` of pictures ``[N, 1, 28, 28]``."""
        x = nn.functional.adaptive_avg_pool2d(self.features(x), 1)
        return self.classifier(torch.flatten(x, 1))


NETWORKS: dict[str, type[nn.Module]] = {"mobilenet": Network, "resnet": ResNet}

# --- compression -------------------------------------------------------------------------------


def trained(name: str, training: Data, epochs: int, weights: Path) -> nn.Module:
    """Return a network with weights from a file, or from training, which the file then gets."""
    torch.manual_seed(0)
    # Channels last is the layout in which depthwise convolutions train fastest on a CPU.
    model = NETWORKS[name]().to(memory_format=torch.channels_last)
    if weights.is_file():
        model.load_state_dict(torch.load(weights))
        print(f"float network from {weights}")
        return model
    print(f"training the {name} in float")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    train(model, training, epochs, optimizer, peak=[4e-3])
    torch.save(model.state_dict(), weights)
    return model


def compressed(
    model: nn.Module, scheme: str, ratio: float, test: Data, data: torch.Tensor | None, page: Path
) -> tuple[nn.Module, float]:
    """Return a network with a share of the multiply-accumulates, and the share."""
    choice = AutomaticSelectionParameters(ratio)
    if scheme == "channel_pruning":
        kind = ChannelPruningParameters
        # AIMET counts ten samples a picture. Without data: smallest weights go, others stay.
        loader, samples = ([], 0) if data is None else ([data], 10 * len(data))
        parameters = kind(
            *(loader, samples, False, kind.Mode.auto, kind.AutoModeParams(choice)),
            importance="magnitude" if data is None else "reconstruction",
        )
    else:
        kind = SpatialSvdParameters
        parameters = kind(kind.Mode.auto, kind.AutoModeParams(choice))
    small, stats = ModelCompressor.compress_model(
        model,
        eval_callback=lambda network, iterations, use_cuda: accuracy(network, test),
        eval_iterations=None,
        input_shape=(1, 1, 28, 28),
        compress_scheme=CompressionScheme[scheme],
        cost_metric=CostMetric.mac,
        parameters=parameters,
        data=data if scheme == "spatial_svd" else None,
        report=page,
    )
    return small, float(stats.mac_compression_ratio)


def pruned_and_split(
    model: nn.Module, ratio: float, training: Data, pages: Path, name: str
) -> tuple[nn.Module, float]:
    """Return a network that was pruned, then split, each as far as does best on some pictures."""
    data = training[0][:CALIBRATION]
    chosen = tuple(part[-SELECTION:] for part in training)
    best, score = None, -1.0
    for first in (share for share in PRUNED if share > ratio):
        page = pages / f"{name}-pruned-{first}.html"
        small, share = compressed(model, "channel_pruning", first, chosen, data, page)
        page = pages / f"{name}-pruned-{first}-split.html"
        small, rest = compressed(small, "spatial_svd", ratio / share, chosen, data, page)
        own = accuracy(small, chosen)
        print(f"  pruned to {share:.3f}, split to {share * rest:.3f}: {own:.4f} of these pictures")
        if own > score:
            best, score = (small, share * rest), own
    assert best is not None
    return best


def tuned(model: nn.Module, training: Data) -> nn.Module:
    """Return a copy that was trained for one epoch."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    train(model, training, 1, optimizer, peak=[1e-3])
    return model.eval()


def run(name: str, arguments: argparse.Namespace, training: Data, test: Data) -> list:
    """Return the rows of a network's table: what, accuracy, share of multiply-accumulates."""
    weights = arguments.out / f"{name}{'-quick' if arguments.quick else ''}.pt"
    model = trained(name, training, arguments.epochs, weights).eval()
    rows = [("FP32", accuracy(model, test), 1.0)]
    control = tuned(model, training)
    rows.append(("  one epoch more", accuracy(control, test), 1.0))
    data = training[0][:CALIBRATION]
    for what, scheme, samples in (
        ("pruned by magnitude", "channel_pruning", None),
        ("pruned for data", "channel_pruning", data),
        ("plain SVD", "spatial_svd", None),
        ("SVD for data", "spatial_svd", data),
    ):
        page = arguments.out / f"{name}-{what.replace(' ', '-')}.html"
        small, share = compressed(model, scheme, arguments.ratio, test, samples, page)
        rows.append((what, accuracy(small, test), share))
        rows.append(("  and one epoch", accuracy(tuned(small, training), test), share))
    small, share = pruned_and_split(model, arguments.ratio, training, arguments.out, name)
    rows.append(("pruned and SVD for data", accuracy(small, test), share))
    best = tuned(small, training)
    rows.append(("  and one epoch", accuracy(best, test), share))
    sim = simulate(best, training, 8)
    rows.append(("  and W8A8", accuracy(sim.model, test), share))
    sim.export(str(arguments.out), f"{name}-w8a8", dummy_input=training[0][:1])
    return rows


# --- program -----------------------------------------------------------------------------------


def main() -> None:
    """Train, compress, quantize, print the tables."""
    parser = argparse.ArgumentParser(description="Compression on Fashion-MNIST")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four IDX files")
    parser.add_argument("--out", type=Path, default=Path("torch-compress"), help="for results")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--ratio", type=float, default=0.5, help="multiply-accumulates to keep")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of float training")
    parser.add_argument("--quick", action="store_true", help="32 batches, to see that it works")
    arguments = parser.parse_args()
    if not (arguments.data / "train-images-idx3-ubyte.gz").is_file():
        sys.exit(f"torch_compress: no pictures in {arguments.data}; see --help")
    arguments.out.mkdir(parents=True, exist_ok=True)
    training, test = load(arguments.data, "train"), load(arguments.data, "t10k")
    if arguments.quick:
        training = tuple(part[:4096] for part in training)
        test = tuple(part[:500] for part in test)
        arguments.epochs = 1
    for name in arguments.networks:
        rows = run(name, arguments, training, test)
        print(f"\n{name + ', top-1 of ' + format(len(test[0]), ','):28}  {'':6}  MACs   below FP32")
        for what, value, share in rows:
            print(f"{what:28}  {value:.4f}  {share:.3f}  {100 * (rows[0][1] - value):+.2f} points")
        print(flush=True)
    print(f"written to {arguments.out}: NAME-METHOD.html, NAME-w8a8.onnx, NAME-w8a8.encodings")


if __name__ == "__main__":
    main()
