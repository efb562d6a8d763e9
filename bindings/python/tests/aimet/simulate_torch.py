# SPDX-License-Identifier: Apache-2.0
# Simulates a torch network with AIMET's default configuration; runs in AIMET's environment.
"""Build the network of `layers`, calibrate it in aimet-torch, print its scales as JSON.

    python simulate_torch.py STATE.pth INPUTS.npy

The last line printed is an object ``{"in" | "out" | "weight": {module name: [scales]}}``.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from torch import nn


def layers() -> nn.Sequential:
    """Return the network without batch norms that both tools simulate."""
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


def main() -> None:
    """Simulate, and print the scales."""
    from aimet_torch.v2.quantsim import QuantizationSimModel

    net = layers().eval()
    net.load_state_dict(torch.load(sys.argv[1], weights_only=True))
    inputs = torch.from_numpy(np.load(sys.argv[2]))
    sim = QuantizationSimModel(net, inputs[:1])
    sim.compute_encodings(lambda model, _: model(inputs), None)
    found: dict[str, dict[str, list[float]]] = {"in": {}, "out": {}, "weight": {}}
    for name, module in sim.model.named_modules():
        if not hasattr(module, "param_quantizers"):
            continue
        places = [("in", q) for q in module.input_quantizers]
        places += [("out", q) for q in module.output_quantizers]
        places += [(key, q) for key, q in module.param_quantizers.items()]
        for place, quantizer in places:
            if quantizer is not None:
                scales = quantizer.get_scale().detach().reshape(-1).tolist()
                found.setdefault(place, {})[name] = scales
    print(json.dumps(found))


if __name__ == "__main__":
    main()
