# SPDX-License-Identifier: Apache-2.0
# The same ratios give AIMET's ranks, and a network with AIMET's outputs.
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from support import torchvision_models  # noqa: E402
from support.environment import aimet_python  # noqa: E402

from halfstep.torch import (  # noqa: E402
    CompressionScheme,
    CostMetric,
    ModelCompressor,
    ModuleCompRatioPair,
    SpatialSvdParameters,
    WeightSvdParameters,
)

SCRIPT = Path(__file__).parents[1] / "aimet" / "compress_torch.py"


@pytest.mark.parametrize("scheme", ["spatial_svd", "weight_svd"])
def test_resnet18_is_that_of_aimet(scheme, tmp_path):
    python = aimet_python()
    torch.manual_seed(0)
    torchvision = torchvision_models._torchvision()
    model = torchvision.models.resnet18(weights=None).eval()
    names = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Conv2d)]
    if scheme == "weight_svd":
        # AIMET takes minutes for the wide ones.
        names = [name for name in names if not name.startswith(("layer3", "layer4"))] + ["fc"]
    ratios = {name: (0.3, 0.5, 0.75)[index % 3] for index, name in enumerate(names)}
    inputs = torch.randn(2, 3, 96, 96)
    torch.save(model.state_dict(), tmp_path / "state.pth")
    np.save(tmp_path / "inputs.npy", inputs.numpy())
    job = {
        "arch": "resnet18",
        "state": str(tmp_path / "state.pth"),
        "inputs": str(tmp_path / "inputs.npy"),
        "outputs": str(tmp_path / "outputs.npy"),
        "scheme": scheme,
        "ratios": ratios,
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [python, "-W", "ignore", str(SCRIPT), str(tmp_path / "job.json")],
        capture_output=True,
        text=True,
        # AIMET writes files where it runs.
        cwd=tmp_path,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.splitlines()[-1])

    kind = SpatialSvdParameters if scheme == "spatial_svd" else WeightSvdParameters
    pairs = [ModuleCompRatioPair(model.get_submodule(name), r) for name, r in ratios.items()]
    small, stats = ModelCompressor.compress_model(
        model,
        lambda *_: 0.5,
        1,
        (1, 3, 96, 96),
        CompressionScheme[scheme],
        CostMetric.mac,
        kind(kind.Mode.manual, kind.ManualModeParams(pairs)),
    )
    ours = {layer.name: layer.rank for layer in stats.engine.layers if layer.rank}
    assert ours == theirs["ranks"]
    with torch.no_grad():
        actual = small(inputs).numpy()
    expected = np.load(tmp_path / "outputs.npy")
    # AIMET decomposes in float, the engine in double.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.ptp(expected))
