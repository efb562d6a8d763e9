# SPDX-License-Identifier: Apache-2.0
"""The networks of `test_keras_torch_parity.py` in PyTorch, run by that test in another process.

`torch_encodings.py FOLDER` reads `FOLDER/<network>.npz` (weights in PyTorch's layout and data) and
exports each network in each setting as `FOLDER/<network>.<setting>`.
"""

import pathlib
import sys

import numpy as np
import torch
from torch import nn

from halfstep.torch import QuantizationSimModel, equalize_model, fold_all_batch_norms


class Pictures(nn.Module):
    """Convolutions, plain and depthwise, batch norms, a bounded activation, an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8, eps=1e-3)
        self.relu1 = nn.ReLU6()
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn2 = nn.BatchNorm2d(8, eps=1e-3)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 1)
        self.relu3 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        """Return five logits."""
        x = self.relu2(self.bn2(self.dw(self.relu1(self.bn1(self.conv1(x))))))
        x = x + self.relu3(self.conv2(x))
        return self.head(self.flatten(self.average(self.up(self.pool(x)))))


class Tokens(nn.Module):
    """Products of matrices, a layer norm and gates on sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 24)
        self.tanh = nn.Tanh()
        self.norm = nn.LayerNorm(24, eps=1e-3)
        self.fc2 = nn.Linear(24, 12)
        self.sigmoid = nn.Sigmoid()
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        """Return four values for each token."""
        y = self.fc2(self.norm(self.tanh(self.fc1(x))))
        return self.head(x * self.sigmoid(y))


NETWORKS = {"pictures": Pictures, "tokens": Tokens}
#: Folding and equalization, scheme, widths of weights, configuration.
SETTINGS = {
    "plain": ("none", "min_max", 8, None),
    "folded": ("fold", "min_max", 8, None),
    "equalized": ("equalize", "sqnr", 8, "default"),
    "narrow": ("fold", "mse", 4, None),
}


def main(folder: pathlib.Path) -> None:
    """Write the encodings of every network that the folder has."""
    for name, make in NETWORKS.items():
        given = dict(np.load(folder / f"{name}.npz"))
        data = torch.from_numpy(given.pop("data"))
        for setting, (change, scheme, bits, config) in SETTINGS.items():
            model = make().eval()
            state = {key: torch.from_numpy(value) for key, value in given.items()}
            model.load_state_dict(state, strict=False)
            assert not {k for k in model.state_dict() if "num_batches" not in k} - given.keys()
            if change == "fold":
                fold_all_batch_norms(model, dummy_input=data[:1])
            elif change == "equalize":
                equalize_model(model, dummy_input=data[:1])
            sim = QuantizationSimModel(
                model,
                data[:1],
                quant_scheme=scheme,
                default_param_bw=bits,
                config_file=config,
            )
            sim.compute_encodings(lambda m, data=data: [m(part) for part in data.split(4)])
            sim.export(folder, f"{name}.{setting}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
