# SPDX-License-Identifier: Apache-2.0
# Loads ONNX models and their encodings into AIMET; runs in AIMET's environment, prints JSON.
"""Load encodings into aimet-onnx QuantizationSimModels and report what did not match.

    python load_encodings.py JOBS.json

The file holds a list of jobs: ``model`` and ``encodings`` (paths); ``config`` ("default",
"default_per_channel", the name of one of AIMET's files without ".json", or a path); ``weights`` and
``activations`` (bits of AIMET's own placement, 8); ``strict`` (true); ``input`` and ``output`` (npz
paths, to simulate as well). The last line printed is a JSON list with one object a job:

    mismatches    the report of ``load_encodings_to_sim``, one entry a quantizer
    loaded        names of the quantizers that carry an encoding afterwards
    disabled      names of quantizers that AIMET would have placed and the file does not mention
    biases        names of int32 bias encodings left out before loading; strict loading refuses
                  them, also in files of version 2.0.0 that AIMET itself has written
    different     encodings that AIMET, asked to write the same version again, writes differently
    rejected      AIMET's message when it refused the file; then the other keys are absent
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np


def simulation(model_path: str, config: str, weight_bits: int, activation_bits: int):
    """Build a simulation the way AIMET's user would before loading encodings."""
    import onnx
    from aimet_onnx.common.quantsim_config.utils import (
        get_path_for_per_channel_config,
        get_path_for_per_tensor_config,
    )
    from aimet_onnx.quantsim import QuantizationSimModel

    known = {
        "default": get_path_for_per_tensor_config,
        "default_per_channel": get_path_for_per_channel_config,
    }
    if config in known:
        path = known[config]()
    elif config.endswith(".json"):
        path = config
    else:
        path = str(Path(get_path_for_per_tensor_config()).with_name(f"{config}.json"))
    return QuantizationSimModel(
        onnx.load(model_path),
        param_type=f"int{weight_bits}",
        activation_type=f"int{activation_bits}",
        config_file=path,
        providers=["CPUExecutionProvider"],
    )


def by_name(document: dict) -> dict[str, object]:
    """Return the encodings of any version as name to entry."""
    if document["version"] == "2.0.0":
        return {entry["name"]: entry for entry in document["encodings"]}
    sections = [document["activation_encodings"], document["param_encodings"]]
    if document["version"] == "0.6.1":
        return {name: entry for section in sections for name, entry in section.items()}
    return {entry["name"]: entry for section in sections for entry in section}


def same(a: object, b: object) -> bool:
    """Compare JSON values; numbers to 1e-6 relative, because AIMET passes them through float32."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (a, b))
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12) if numbers else a == b


def written_again(sim, version: str) -> dict:
    """Return the encodings that AIMET exports from the simulation."""
    with tempfile.TemporaryDirectory() as folder:
        sim.export(folder, "again", encoding_version=version)
        return json.loads((Path(folder) / "again.encodings").read_text())


def without_biases(document: dict) -> list[str]:
    """Remove the int32 entries of a 2.0.0 document and return their names."""
    if document["version"] != "2.0.0":
        return []
    removed = [entry["name"] for entry in document["encodings"] if entry["output_dtype"] == "int32"]
    document["encodings"] = [e for e in document["encodings"] if e["output_dtype"] != "int32"]
    return removed


def report(job: dict) -> dict:
    """Do one job; see the module's text for the keys."""
    from aimet_onnx.quantsim import load_encodings_to_sim

    sim = simulation(
        job["model"],
        job.get("config", "default_per_channel"),
        job.get("weights", 8),
        job.get("activations", 8),
    )
    document = json.loads(Path(job["encodings"]).read_text())
    strict = job.get("strict", True)
    biases = without_biases(document)
    placed = {name for name, quantizer in sim.qc_quantize_op_dict.items() if quantizer.enabled}
    try:
        mismatches = load_encodings_to_sim(sim, document, strict=strict)
    except Exception as error:  # any refusal is the result that the caller asks for
        return {"rejected": f"{type(error).__name__}: {error}"}
    loaded = {name for name, quantizer in sim.qc_quantize_op_dict.items() if quantizer.enabled}
    ours, theirs = by_name(document), by_name(written_again(sim, document["version"]))
    # Version 2.0.0 of AIMET's writer adds int32 biases, which its strict loading refuses.
    added = [name for name in theirs if name not in ours]
    for name in added:
        if document["version"] == "2.0.0" and theirs[name]["output_dtype"] == "int32":
            del theirs[name]
    result = {
        "mismatches": [
            {key: value for key, value in vars(entry).items() if value is not None}
            for entry in mismatches
        ],
        "loaded": sorted(loaded),
        "disabled": sorted(placed - loaded),
        "biases": biases,
        "different": [
            {"name": name, "file": ours.get(name), "aimet": theirs.get(name)}
            for name in sorted(ours.keys() | theirs.keys())
            if not (name in ours and name in theirs and same(ours[name], theirs[name]))
        ],
    }
    if "input" in job:
        with np.load(job["input"]) as arrays:
            feed = {name: arrays[name] for name in arrays.files}
        # AIMET calls an output that it quantizes "<name>_updated".
        names = [o.name.removesuffix("_updated") for o in sim.session.get_outputs()]
        np.savez(job["output"], **dict(zip(names, sim.session.run(None, feed), strict=True)))
    return result


def main() -> int:
    """Do the jobs and print the reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", help="JSON file with the list of jobs")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    reports = [report(job) for job in json.loads(Path(options.jobs).read_text())]
    print(json.dumps(reports))
    return 0


if __name__ == "__main__":
    sys.exit(main())
