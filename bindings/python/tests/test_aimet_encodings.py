# SPDX-License-Identifier: Apache-2.0
# AIMET loads the encodings that Halfstep writes: strictly, completely, and simulates the same.
import json

import numpy as np
import onnx
import pytest
from support.environment import load_in_aimet, shared

import halfstep

VERSIONS = ("0.6.1", "1.0.0", "2.0.0")
CONFIGS = ("default", "default_per_channel")
NETWORKS = ("net_cbrc", "net_cbrc_relu6", "net_dwsep", "net_misc", "model_tiny_resnet/net")
STAGES = ("folded", "equalized")


def bounds(path) -> set[str]:
    """Tensors that AIMET's placement quantizes and ours, like a fused clip on a target, does not.

    The bounds of a Clip if Constant nodes give them, as in torch's exports; and the inputs of a
    Min, what equalization makes of a clip whose bound differs by channel. AIMET's strict loading
    refuses any file that lacks encodings for them.
    """
    graph = onnx.load(path, load_external_data=False).graph
    constants = {node.output[0] for node in graph.node if node.op_type == "Constant"}
    clips = {name for node in graph.node if node.op_type == "Clip" for name in node.input[1:]}
    minima = {name for node in graph.node if node.op_type == "Min" for name in node.input}
    return clips & constants | minima


def clipped(path) -> set[str]:
    """Tensors that Clip nodes read."""
    graph = onnx.load(path, load_external_data=False).graph
    return {node.input[0] for node in graph.node if node.op_type == "Clip"}


def example(path, batch: int = 4) -> dict[str, np.ndarray]:
    """Seeded inputs for the one input of a golden network."""
    (value,) = onnx.load(path).graph.input
    shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
    fixed = [size or batch for size in shape]
    rng = np.random.Generator(np.random.PCG64(17))
    return {value.name: rng.standard_normal(fixed, dtype=np.float32)}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Quantize every network in every way, then let one AIMET process load all that was written."""
    folder = tmp_path_factory.mktemp("ours")
    golden = shared("reference", "golden")
    jobs, results = [], {}
    for network in NETWORKS:
        for stage in STAGES:
            model = halfstep.Model.load(golden / f"{network}.onnx")
            model.fold_batch_norms()
            if stage == "equalized":
                model.equalize()
            feed = example(golden / f"{network}.onnx")
            for config in CONFIGS:
                sim = halfstep.QuantizationSimModel(model, config=config)
                sim.compute_encodings([feed], progress=False)
                name = f"{network.replace('/', '-')}-{stage}-{config}"
                sim.export(folder, name)
                strict = not bounds(folder / f"{name}.onnx")
                np.savez(folder / f"{name}.in.npz", **feed)
                for version in VERSIONS:
                    document = sim.encodings(version)
                    path = folder / f"{name}.{version}.json"
                    path.write_text(json.dumps(document))
                    job = {"model": folder / f"{name}.onnx", "encodings": path, "config": config}
                    job |= {"strict": strict}
                    job |= {"input": folder / f"{name}.in.npz", "output": f"{path}.npz"}
                    jobs.append(job)
                    results[network, stage, config, version] = (sim, feed, job)
    reports = load_in_aimet(jobs, folder)
    return {key: (*results[key], report) for key, report in zip(results, reports, strict=True)}


def output_step(sim, name: str) -> float:
    """The largest scale of a graph output's encoding."""
    entries = {entry["name"]: entry for entry in sim.encodings("1.0.0")["activation_encodings"]}
    return max(entries[name]["scale"])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("network", NETWORKS)
def test_aimet_loads_our_encodings(cases, network, stage, config, version):
    sim, feed, job, report = cases[network, stage, config, version]
    assert "rejected" not in report, report.get("rejected")
    absent = [
        entry["quantizer_name"]
        for entry in report["mismatches"]
        if entry.keys() == {"quantizer_name", "enabled_mismatch"}
    ]
    assert len(absent) == len(report["mismatches"])  # no other kind of mismatch
    assert set(absent) == set(report["disabled"]) <= bounds(job["model"])
    # To 1e-6 relative: AIMET keeps scales as float32 and adds minimum and maximum from them.
    # Version 2.0.0 of AIMET's writer also lists tensors without a quantizer, such as clips' inputs.
    added = {entry["name"] for entry in report["different"] if entry["file"] is None}
    assert added <= bounds(job["model"]) | clipped(job["model"])
    different = [entry for entry in report["different"] if entry["name"] not in added]
    assert different == []
    with np.load(job["output"]) as simulated:
        for name, ours in sim.run(feed).items():
            # Sums in another order may move a value across a rounding border: one output step.
            step = output_step(sim, name)
            assert np.abs(ours - simulated[name]).max() <= step * 1.001
            # And that must be rare: most values are equal to a hundredth of a step.
            assert (np.abs(ours - simulated[name]) > step / 100).mean() < 0.02
