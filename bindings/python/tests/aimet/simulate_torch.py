# SPDX-License-Identifier: Apache-2.0
# Quantizers and scales of AIMET's default configuration; runs in AIMET's environment.
"""Build a network of `NETWORKS`, calibrate it in aimet-torch, print its scales as JSON.

    python simulate_torch.py NAME STATE.pth INPUTS.npy

The last line printed is an object ``{"in" | "out" | parameter: {module name: [scales]}}``.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from torch import nn


def layers() -> nn.Module:
    """Return a network without batch norms."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU6(),
        nn.Conv2d(8, 4, 1),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


def norms() -> nn.Module:
    """Return a network with batch norms behind and before layers, and with some that stay."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.BatchNorm2d(8),  # folds forward only
        nn.Conv2d(8, 4, 1),
        nn.Hardswish(),
        nn.BatchNorm2d(4),  # stays
        nn.ConvTranspose2d(4, 6, 2, stride=2),
        nn.BatchNorm2d(6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
        nn.BatchNorm1d(5),
    )


def mobilenet() -> nn.Module:
    """Return MobileNetV2, batch norms unfolded."""
    from torchvision.models import mobilenet_v2

    return mobilenet_v2(weights=None)


def sequence() -> nn.Module:
    """Return layers of a transformer between which nothing functional happens."""
    return nn.Sequential(
        nn.Linear(12, 16),
        nn.LayerNorm(16),
        nn.GELU(),
        nn.Linear(16, 8, bias=False),
        nn.Softmax(-1),
        nn.Linear(8, 8),
        nn.Sigmoid(),
    )


NETWORKS = {"layers": layers, "norms": norms, "sequence": sequence, "mobilenet": mobilenet}


def main() -> None:
    """Simulate, and print the scales."""
    from aimet_torch.model_preparer import prepare_model
    from aimet_torch.quantsim import QuantizationSimModel

    name, state, data = sys.argv[1:]
    net = NETWORKS[name]().eval()
    net.load_state_dict(torch.load(state, weights_only=True))
    inputs = torch.from_numpy(np.load(data))
    if name == "mobilenet":
        net = prepare_model(net)
    sim = QuantizationSimModel(net, inputs[:1])
    sim.compute_encodings(lambda model, _: model(inputs), None)
    found: dict[str, dict[str, list[float]]] = {"in": {}, "out": {}}
    for place, module in sim.model.named_modules():
        if not hasattr(module, "param_quantizers"):
            continue
        places = [("in", q) for q in module.input_quantizers]
        places += [("out", q) for q in module.output_quantizers]
        places += [(key, q) for key, q in module.param_quantizers.items()]
        for kind, quantizer in places:
            if quantizer is not None:
                scales = quantizer.get_scale().detach().reshape(-1).tolist()
                found.setdefault(kind, {})[place] = scales
    print(json.dumps(found))


if __name__ == "__main__":
    main()
