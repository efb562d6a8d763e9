# SPDX-License-Identifier: Apache-2.0
# Data and a score for tests of compression.
import torch
from torch import nn

#: Shape of one input.
SHAPE = (1, 3, 16, 16)


def pictures(count, seed=0):
    """Pictures with neighbors that resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(count, 3, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(base, scale_factor=4, mode="bilinear")
    return smooth + 0.1 * torch.randn(count, *SHAPE[1:], generator=generator)


class Closeness:
    """Minus the squared distance of a network's outputs from wanted ones; can be pickled."""

    def __init__(self, model):
        self.x = pictures(16, seed=5)
        with torch.no_grad():
            self.wanted = model(self.x)
        self.calls = []

    def __call__(self, model, iterations, use_cuda):
        assert not model.training and use_cuda is False
        self.calls.append(iterations)
        with torch.no_grad():
            return -float(((model(self.x) - self.wanted) ** 2).mean() / self.wanted.var())
