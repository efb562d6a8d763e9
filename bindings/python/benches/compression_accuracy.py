# SPDX-License-Identifier: Apache-2.0
# Accuracy of EfficientNet-Lite0 over the share of multiply-accumulates that remains.
"""Compress EfficientNet-Lite0 to several costs, without and with data; print top-1 as a table.

Nothing is trained afterwards. 64 of the photos are the data, the others are tested. Needs the
packages of ``examples/python/requirements-data.txt`` and a folder of photos::

    python compression_accuracy.py --photos ../shared/data/photos500 --json .build/lite0.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import halfstep

REPOSITORY = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPOSITORY / "examples" / "python"))

import efficientnet_lite0  # noqa: E402

#: What each scheme does without data: channels are then ranked by magnitude and nothing is fitted.
PLAIN = {
    "weight_svd": {},
    "spatial_svd": {},
    "channel_pruning": {"importance": "magnitude", "reconstruct": False},
}
RATIOS = (0.98, 0.95, 0.9, 0.85, 0.8, 0.7)


def outputs(model: halfstep.Model, images: np.ndarray) -> np.ndarray:
    """Return the logits of images."""
    parts = np.array_split(images, -(-len(images) // 8))
    return np.concatenate([next(iter(model.run(part).values())) for part in parts])


def main() -> None:
    """Compress and test."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photos", type=Path, default=REPOSITORY.parent / "shared/data/photos500")
    parser.add_argument("--scheme", choices=list(PLAIN), default="spatial_svd")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--json", type=Path, help="gets the numbers")
    arguments = parser.parse_args()
    photos = efficientnet_lite0.split(arguments.photos)
    model = efficientnet_lite0.build_model()
    if not isinstance(model, halfstep.Model):
        model = halfstep.Model.load(model.SerializeToString())
    model.fold_batch_norms()
    labels = photos["labels"]
    reference = outputs(model, photos["images"])
    fp32 = float((reference.argmax(1) == labels).mean())
    plain = halfstep.ModelCompressor(model, arguments.scheme, **PLAIN[arguments.scheme])
    aware = halfstep.ModelCompressor(model, arguments.scheme, data=photos["calib"])
    rows = []
    print(f"FP32 top-1 {fp32:.3f} on {len(labels)} photos; {arguments.scheme}")
    print("| MACs | plain top-1 | dB | for data top-1 | dB |\n|---|---|---|---|---|")
    for ratio in arguments.ratios:
        row: dict[str, float] = {"ratio": ratio}
        for name, compressor in (("plain", plain), ("data", aware)):
            small, stats = compressor.compress(ranks=compressor.select(ratio))
            logits = outputs(small, photos["images"])
            noise = np.square(logits - reference, dtype=np.float64).sum()
            row[f"{name}_macs"] = stats.mac_ratio
            row[f"{name}_top1"] = float((logits.argmax(1) == labels).mean())
            row[f"{name}_db"] = float(
                10 * np.log10(np.square(reference, dtype=np.float64).sum() / noise)
            )
        rows.append(row)
        print(
            f"| {row['data_macs']:.2f} | {row['plain_top1']:.3f} | {row['plain_db']:.1f} |"
            f" {row['data_top1']:.3f} | {row['data_db']:.1f} |",
            flush=True,
        )
    if arguments.json is not None:
        document = {"fp32": fp32, "scheme": arguments.scheme, "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
