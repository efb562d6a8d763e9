# SPDX-License-Identifier: Apache-2.0
# Compresses a torchvision network with AIMET, in AIMET's environment.
"""Split layers of a network as AIMET does.

    compress_torch.py JOB.json

The job names the network (``arch``), a file of weights (``state``), inputs as ``.npy``
(``inputs``), the scheme (``spatial_svd`` or ``weight_svd``), ``ratios`` by layer, and a file for
the outputs (``outputs``). Prints ranks by layer and the seconds of CPU time that it took as JSON.
"""

import json
import sys
import time

import numpy as np
import torch
import torchvision
from aimet_torch.common.defs import CompressionScheme, CostMetric
from aimet_torch.compress import ModelCompressor
from aimet_torch.defs import (
    ModuleCompRatioPair,
    SpatialSvdParameters,
    WeightSvdParameters,
)


def main() -> None:
    """Run the job of the command line."""
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    model = getattr(torchvision.models, job["arch"])(weights=None)
    model.load_state_dict(torch.load(job["state"], weights_only=True))
    model.eval()
    inputs = torch.from_numpy(np.load(job["inputs"]))
    kind = SpatialSvdParameters if job["scheme"] == "spatial_svd" else WeightSvdParameters
    pairs = [ModuleCompRatioPair(model.get_submodule(n), r) for n, r in job["ratios"].items()]
    start = time.process_time()
    small, _ = ModelCompressor.compress_model(
        model,
        eval_callback=lambda *_: 0.5,
        eval_iterations=1,
        input_shape=(1, *inputs.shape[1:]),
        compress_scheme=CompressionScheme[job["scheme"]],
        cost_metric=CostMetric.mac,
        parameters=kind(kind.Mode.manual, kind.ManualModeParams(pairs)),
    )
    seconds = time.process_time() - start
    with torch.no_grad():
        np.save(job["outputs"], small(inputs).numpy())
    ranks = {}
    for name in job["ratios"]:
        first = small.get_submodule(name)[0]
        ranks[name] = getattr(first, "out_channels", getattr(first, "out_features", None))
    print(json.dumps({"ranks": ranks, "seconds": seconds}))


if __name__ == "__main__":
    main()
