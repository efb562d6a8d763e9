# SPDX-License-Identifier: Apache-2.0
# The same ratios give AIMET's ranks, channels and costs, and a network with AIMET's outputs.
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
    ChannelPruningParameters,
    CompressionScheme,
    CostMetric,
    ModelCompressor,
    ModuleCompRatioPair,
    SpatialSvdParameters,
    WeightSvdParameters,
)

SCRIPT = Path(__file__).parents[1] / "aimet" / "compress_torch.py"


def in_aimet(folder, model, scheme, ratios, inputs, **more):
    """What AIMET makes of a ResNet18: its report, and the outputs."""
    torch.save(model.state_dict(), folder / "state.pth")
    np.save(folder / "inputs.npy", inputs.numpy())
    job = {
        "arch": "resnet18",
        "state": str(folder / "state.pth"),
        "inputs": str(folder / "inputs.npy"),
        "outputs": str(folder / "outputs.npy"),
        "scheme": scheme,
        "ratios": ratios,
        **more,
    }
    (folder / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [aimet_python(), "-W", "ignore", str(SCRIPT), str(folder / "job.json")],
        capture_output=True,
        text=True,
        # AIMET writes files where it runs.
        cwd=folder,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), np.load(folder / "outputs.npy")


@pytest.mark.parametrize("scheme", ["spatial_svd", "weight_svd"])
def test_resnet18_is_that_of_aimet(scheme, tmp_path):
    aimet_python()
    torch.manual_seed(0)
    torchvision = torchvision_models._torchvision()
    model = torchvision.models.resnet18(weights=None).eval()
    names = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Conv2d)]
    if scheme == "weight_svd":
        # AIMET takes minutes for the wide ones.
        names = [name for name in names if not name.startswith(("layer3", "layer4"))] + ["fc"]
    ratios = {name: (0.3, 0.5, 0.75)[index % 3] for index, name in enumerate(names)}
    inputs = torch.randn(2, 3, 96, 96)
    theirs, expected = in_aimet(tmp_path, model, scheme, ratios, inputs)

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
    if scheme == "spatial_svd":
        # Strided pairs of weight SVD have a first layer that AIMET counts at the wrong place.
        assert stats.mac_compression_ratio == theirs["mac_ratio"]
    assert stats.memory_compression_ratio == theirs["memory_ratio"]
    with torch.no_grad():
        actual = small(inputs).numpy()
    # AIMET decomposes in float, the engine in double.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.ptp(expected))


def test_pruned_resnet18_has_the_channels_of_aimet_and_less_noise(tmp_path):
    aimet_python()
    torch.manual_seed(0)
    torchvision = torchvision_models._torchvision()
    model = torchvision.models.resnet18(weights=None)
    pictures = torch.from_numpy(torchvision_models.inputs("resnet18", 48, size=64))
    with torch.no_grad():
        # Statistics of batch norms that fit the pictures.
        for _ in range(8):
            model.train()(pictures)
    model.eval()
    data, inputs = pictures[:32], pictures[32:]
    # What AIMET prunes: layers whose input nothing else reads.
    names = [name for name, _ in model.named_modules() if name.endswith("conv2")][:5]
    ratios = {name: (0.3, 0.5, 0.8)[index % 3] for index, name in enumerate(names)}
    np.save(tmp_path / "data.npy", data.numpy())
    files = {"data": str(tmp_path / "data.npy"), "pruned": str(tmp_path / "pruned.npz")}
    theirs, theirs_out = in_aimet(tmp_path, model, "channel_pruning", ratios, inputs, **files)
    weights = np.load(files["pruned"])

    kind = ChannelPruningParameters
    pairs = [ModuleCompRatioPair(model.get_submodule(name), r) for name, r in ratios.items()]
    parameters = kind(
        *([data], 10 * len(data), False, kind.Mode.manual, kind.ManualModeParams(pairs)),
        importance="magnitude",
    )
    small, stats = ModelCompressor.compress_model(
        model,
        lambda *_: 0.5,
        1,
        (1, 3, 64, 64),
        CompressionScheme.channel_pruning,
        CostMetric.mac,
        parameters,
    )
    assert {name: small.get_submodule(name).in_channels for name in names} == theirs["ranks"]
    assert stats.mac_compression_ratio == theirs["mac_ratio"]
    assert stats.memory_compression_ratio == theirs["memory_ratio"]
    for name, value in small.state_dict().items():
        if name not in weights:
            # A layer without a bias may get one from the fit.
            assert name.endswith("conv2.bias")
            continue
        assert tuple(value.shape) == weights[name].shape, name
        # The layers in front tell which channels stayed; only the reading ones are fitted.
        if "conv2" not in name and "bn" not in name and name.startswith("layer"):
            np.testing.assert_array_equal(value.numpy(), weights[name], err_msg=name)
    with torch.no_grad():
        wanted, ours_out = model(inputs).numpy(), small(inputs).numpy()

    def noise(values):
        return float(np.square(values - wanted).sum() / np.square(wanted - wanted.mean(0)).sum())

    print(f"noise over signal of the outputs: ours {noise(ours_out):.4f}, {noise(theirs_out):.4f}")
    assert noise(ours_out) < noise(theirs_out)
