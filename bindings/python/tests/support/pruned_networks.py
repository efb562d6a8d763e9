# SPDX-License-Identifier: Apache-2.0
# Networks for channel pruning, the same whatever version of PyTorch builds them.
"""Networks whose weights are a function of their names, and the ratios to prune them with.

Both the tests and the script that records what AIMET does with them import this.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import nn

from . import torchvision_models

#: Share of the channels that each layer reads, by network and layer.
RATIOS: dict[str, dict[str, float]] = {
    "plain": {"conv2": 0.5, "conv3": 0.3, "conv4": 0.75},
    # Half of what the second layer reads is a mixture of the other half.
    "redundant": {"conv2": 0.5},
    # Of ResNet18, AIMET prunes what layers read that nothing else reads.
    "resnet18": {
        f"layer{stage}.{block}.conv2": ratio
        for stage, ratio in zip((1, 2, 3, 4), (0.3, 0.5, 0.8, 0.65), strict=True)
        for block in (0, 1)
    },
}
#: Shape of one sample.
SHAPES = {"plain": (3, 20, 20), "redundant": (3, 12, 12), "resnet18": (3, 64, 64)}


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 between -1 and 1, hashed from a name and positions."""
    count = np.prod(shape, dtype=np.int64)
    x = np.arange(count, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 20)
    for _ in range(3):
        x ^= x >> np.uint64(29)
        # Any odd multiplier of 64 bits mixes; this is 2^64 over the golden ratio.
        x *= np.uint64(0x9E3779B97F4A7C15)
        x ^= x >> np.uint64(32)
    return ((x >> np.uint64(40)).astype(np.float32) / (1 << 23) - 1).reshape(shape)


def pictures(network: str, count: int, name: str) -> torch.Tensor:
    """Smooth pictures, ``[N, 3, H, W]``."""
    _, height, width = SHAPES[network]
    coarse = values(f"{name} coarse", (count, 3, -(-height // 4), -(-width // 4)))
    smooth = np.repeat(np.repeat(coarse, 4, 2), 4, 3)[:, :, :height, :width]
    return torch.from_numpy(2 * smooth + values(f"{name} fine", (count, 3, height, width)))


class Plain(nn.Module):
    """Batch norms, pooling, strides and a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.relu1 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(12, 16, 3)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(16, 20, (3, 1), stride=2)
        self.bn3 = nn.BatchNorm2d(20)
        self.relu3 = nn.ReLU()
        self.conv4 = nn.Conv2d(20, 8, 1)
        self.relu4 = nn.ReLU()
        self.fc = nn.Linear(8 * 3 * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.relu1(self.bn1(self.conv1(x))))
        x = self.relu3(self.bn3(self.conv3(self.relu2(self.conv2(x)))))
        return self.fc(torch.flatten(self.relu4(self.conv4(x)), 1))


class Redundant(nn.Module):
    """A layer that reads four channels and four mixtures of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.conv2 = nn.Conv2d(8, 6, 3)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(6, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv3(self.relu2(self.conv2(self.conv1(x))))


#: Channel ``4 + i`` of the redundant network is the mixture that row ``i`` names of the first four.
MIXTURE = np.array(
    [[0.5, -0.25, 0, 1], [0, 0.75, 0.5, 0], [1, 1, -0.5, 0], [-0.25, 0, 0, 0.5]], np.float32
)


def network(name: str) -> nn.Module:
    """Build a network of `RATIOS`, in evaluation mode."""
    if name == "resnet18":
        model = torchvision_models._torchvision().models.resnet18(weights=None)
    else:
        model = {"plain": Plain, "redundant": Redundant}[name]()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            shape = tuple(tensor.shape)
            found = torch.from_numpy(values(f"{name} {key}", shape)) if shape else tensor
            if len(shape) > 1:
                fan = int(np.prod(shape[1:]))
                # Channels that are read are of different weight.
                reads = torch.from_numpy(values(f"{name} {key} reads", (shape[1],)))
                reads = reads.reshape(-1, *[1] * (len(shape) - 2))
                found = found * (1 + 0.5 * reads) * (5 / fan) ** 0.5
            elif key.endswith("running_var"):
                found = 1 + 0.5 * found
            elif "bn" in key and key.endswith("weight"):
                found = 1 + 0.3 * found
            elif shape:
                found = 0.2 * found
            tensor.copy_(found)
        if name == "redundant":
            mixture = torch.from_numpy(MIXTURE)
            model.conv1.weight[4:] = torch.tensordot(mixture, model.conv1.weight[:4], 1)
            model.conv1.bias[4:] = mixture @ model.conv1.bias[:4]
            model.conv2.weight[:, 4:] *= 0.25
    return model.eval()
