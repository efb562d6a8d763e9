# SPDX-License-Identifier: Apache-2.0
# Compresses a torchvision network with AIMET, in AIMET's environment.
"""Split or prune layers of a network as AIMET does.

    compress_torch.py JOB.json

The job names the network (``arch``), a file of weights (``state``), inputs as ``.npy``
(``inputs``), the scheme (``spatial_svd``, ``weight_svd`` or ``channel_pruning``), ``ratios`` by
layer, and a file for the outputs (``outputs``); for channel pruning also pictures to reconstruct
with (``data``, ``.npy``) and a file for the weights (``pruned``, ``.npz``). Prints ranks by layer,
the ratios of costs, and the seconds that it took (CPU time, wall time) as JSON.
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
    ChannelPruningParameters,
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
    pairs = [ModuleCompRatioPair(model.get_submodule(n), r) for n, r in job["ratios"].items()]
    if job["scheme"] == "channel_pruning":
        kind = ChannelPruningParameters
        data = torch.from_numpy(np.load(job["data"]))
        dataset = torch.utils.data.TensorDataset(data, torch.zeros(len(data)))
        loader = torch.utils.data.DataLoader(dataset, batch_size=8)
        # Ten output positions of each picture.
        settings = (loader, 10 * len(data), False)
    else:
        kind = SpatialSvdParameters if job["scheme"] == "spatial_svd" else WeightSvdParameters
        settings = ()
    start, wall = time.process_time(), time.perf_counter()
    small, stats = ModelCompressor.compress_model(
        model,
        eval_callback=lambda *_: 0.5,
        eval_iterations=1,
        input_shape=(1, *inputs.shape[1:]),
        compress_scheme=CompressionScheme[job["scheme"]],
        cost_metric=CostMetric.mac,
        parameters=kind(*settings, kind.Mode.manual, kind.ManualModeParams(pairs)),
    )
    seconds, wall = time.process_time() - start, time.perf_counter() - wall
    with torch.no_grad():
        np.save(job["outputs"], small(inputs).numpy())
    ranks = {}
    for name in job["ratios"]:
        layer = small.get_submodule(name)
        if job["scheme"] == "channel_pruning":
            ranks[name] = layer.in_channels
            continue
        ranks[name] = getattr(layer[0], "out_channels", getattr(layer[0], "out_features", None))
    if "pruned" in job:
        np.savez(job["pruned"], **{n: v.numpy() for n, v in small.state_dict().items()})
    report = {
        "ranks": ranks,
        "mac_ratio": str(stats.mac_compression_ratio),
        "memory_ratio": str(stats.memory_compression_ratio),
        "seconds": seconds,
        "wall": wall,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
