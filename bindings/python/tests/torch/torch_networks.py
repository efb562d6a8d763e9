# SPDX-License-Identifier: Apache-2.0
# Small modules that the tests of the PyTorch simulation share.
"""Small seeded modules."""

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """A residual block with one ReLU that is called twice, and functional operators."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


class Net(nn.Module):
    """Convolutions, a reused ReLU, cat, functional relu and dropout, dropout as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = Block(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.block(functional.relu(self.stem(x)))
        x = torch.cat([x, functional.hardswish(self.depthwise(x))], dim=1)
        x = x.mean((2, 3))
        x = functional.dropout(self.drop(x), 0.25, self.training)
        return self.fc(x)


class Branches(nn.Module):
    """Python control flow on values, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        if x.sum() > 0:  # the line that the error names
            return self.fc(x)
        return x


def network(seed: int = 0) -> Net:
    """Return a network with seeded weights and batch-norm statistics, in evaluation mode."""
    torch.manual_seed(seed)
    net = Net()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


def pictures(rows: int = 4, seed: int = 1) -> torch.Tensor:
    """Return seeded inputs, ``[rows, 3, 8, 8]``."""
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
