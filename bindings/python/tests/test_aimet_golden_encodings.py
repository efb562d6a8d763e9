# SPDX-License-Identifier: Apache-2.0
# The AIMET helper itself: what AIMET wrote loads back without a complaint, damaged files do not.
import json

import pytest
from support.environment import load_in_aimet, shared

VERSIONS = ("0.6.1", "1.0.0", "2.0.0")
NETWORKS = ("cbrc", "dwsep")
CONFIGS = ("default_config", "default_config_per_channel", "htp_quantsim_config_v73")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """All golden files, and three damaged copies, in one AIMET process."""
    golden = shared("reference", "golden", "onnx_export")
    folder = tmp_path_factory.mktemp("aimet")
    jobs, keys = [], []
    for network in NETWORKS:
        for config in CONFIGS:
            case = golden / f"{network}_{config}_w8a8_minmax"
            for version in VERSIONS:
                job = {
                    "model": case / "v2.0.0.onnx",
                    "encodings": case / f"v{version}.encodings",
                    "config": config,
                }
                jobs.append(job)
                keys.append((network, config, version))
    source = golden / "cbrc_default_config_w8a8_minmax"
    document = json.loads((source / "v1.0.0.encodings").read_text())
    document["param_encodings"][0]["name"] = "no.such.tensor"
    (folder / "renamed.encodings").write_text(json.dumps(document))
    document = json.loads((source / "v1.0.0.encodings").read_text())
    document["param_encodings"][0]["is_sym"] = False
    (folder / "asymmetric.encodings").write_text(json.dumps(document))
    document = json.loads((source / "v1.0.0.encodings").read_text())
    dropped = document["activation_encodings"].pop()["name"]
    (folder / "dropped.encodings").write_text(json.dumps(document))
    for name in ("renamed", "asymmetric", "dropped"):
        path = folder / f"{name}.encodings"
        jobs.append(
            {"model": source / "v2.0.0.onnx", "encodings": path, "config": "default_config"}
        )
        keys.append(name)
    return dict(zip(keys, load_in_aimet(jobs, folder), strict=True)) | {"name dropped": dropped}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("network", NETWORKS)
def test_golden_file_loads_strictly_and_is_written_back_the_same(reports, network, config, version):
    report = reports[network, config, version]
    assert "rejected" not in report, report["rejected"]
    assert report["mismatches"] == report["different"] == report["disabled"] == []
    assert len(report["loaded"]) >= 7  # cbrc: 3 weights, input, 2 activations, output
    assert bool(report["biases"]) == (version == "2.0.0")


def test_unknown_tensor_is_rejected(reports):
    assert "rejected" in reports["renamed"]


def test_wrong_symmetry_is_rejected(reports):
    assert "symmetric" in reports["asymmetric"]["rejected"]


def test_missing_activation_is_rejected(reports):
    assert reports["name dropped"] in reports["dropped"]["rejected"]
