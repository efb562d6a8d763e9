# SPDX-License-Identifier: Apache-2.0
# By magnitude: the channels, shapes and costs that AIMET's channel pruning was recorded with.
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from support import pruned_networks  # noqa: E402

from halfstep.torch import (  # noqa: E402
    ChannelPruningParameters,
    CompressionScheme,
    CostMetric,
    ModelCompressor,
    ModuleCompRatioPair,
)

RECORDED = Path(__file__).parents[1] / "fixtures/aimet_channel_pruning/pruned.json"
NAMES = list(pruned_networks.RATIOS)


@pytest.fixture(scope="module")
def recorded():
    return json.loads(RECORDED.read_text())


def prune(name, samples):
    """Channels chosen by magnitude; the layers that lose inputs are fitted if there are samples."""
    model = pruned_networks.network(name)
    kind = ChannelPruningParameters
    ratios = pruned_networks.RATIOS[name]
    pairs = [ModuleCompRatioPair(model.get_submodule(n), r) for n, r in ratios.items()]
    data = [pruned_networks.pictures(name, 64, "fitted")]
    mode = kind.ManualModeParams(pairs)
    small, stats = ModelCompressor.compress_model(
        model,
        lambda *_: 0.5,
        1,
        (1, *pruned_networks.SHAPES[name]),
        CompressionScheme.channel_pruning,
        CostMetric.mac,
        kind(data, samples, False, kind.Mode.manual, mode, importance="magnitude"),
    )
    return model, small, stats


@pytest.mark.parametrize("name", NAMES)
def test_channels_shapes_and_costs_are_aimets(name, recorded):
    theirs = recorded[name]
    model, small, stats = prune(name, samples=0)
    kept = {(c.name, c.axis): c.kept for c in stats.engine.constants}
    for layer, pruned in theirs["pruned"].items():
        module = model.get_submodule(layer)
        expected = tuple(i for i in range(module.in_channels) if i not in pruned)
        assert kept[f"{layer}.weight", 1] == expected, layer
    shapes = {key: list(value.shape) for key, value in small.state_dict().items()}
    assert shapes == theirs["shapes"]
    assert stats.mac_compression_ratio == theirs["mac_ratio"]
    assert stats.memory_compression_ratio == theirs["memory_ratio"]
    # Nothing is fitted: weights that stay are the network's.
    old, new = model.state_dict(), small.state_dict()
    for layer, pruned in theirs["pruned"].items():
        at = [i for i in range(old[f"{layer}.weight"].shape[1]) if i not in pruned]
        rows = kept.get((f"{layer}.weight", 0), range(len(old[f"{layer}.weight"])))
        assert torch.equal(new[f"{layer}.weight"], old[f"{layer}.weight"][list(rows)][:, at])
    costs = {layer.name: layer for layer in stats.engine.layers}
    for index, key in enumerate(("before", "after")):
        wanted = dict(theirs[key])
        total = wanted.pop("total")
        assert [stats.engine.parameters[index], stats.engine.macs[index]] == total
        assert {n: [c.parameters[index], c.macs[index]] for n, c in costs.items()} == wanted


def errors(name, recorded):
    """Errors of the network that is pruned, pruned and fitted, and that of AIMET."""
    shown = pruned_networks.pictures(name, 8, "shown")
    with torch.no_grad():
        model, plain, _ = prune(name, samples=0)
        wanted = model(shown).numpy()
        ours = [net(shown).numpy() for net in (plain, prune(name, samples=640)[1])]
    theirs = np.array(recorded[name]["outputs"], np.float32).reshape(wanted.shape)
    return [(found - wanted) / np.ptp(wanted) for found in (*ours, theirs)]


def test_fitted_layers_are_nearer_to_the_network_than_aimets(recorded):
    # AIMET solves least squares on ten output positions of each picture, whatever the weights were
    # before; ours are ridge regressions toward the old weights on all positions. That makes other
    # numbers, so that the noise of the outputs is what can be compared.
    plain, fitted, theirs = (float(np.square(e).sum()) for e in errors("plain", recorded))
    assert fitted < theirs and fitted < plain


def test_what_the_other_channels_can_express_is_kept_as_in_aimet(recorded):
    # The channels that go are mixtures of those that stay. AIMET's least squares finds them to
    # float rounding. A ridge of strength s (of the moments' mean diagonal m) leaves the share
    # s·m / (λ + s·m) of a change along a direction of moment λ, which is an error of the output of
    # √λ times that: at most √s / 2 of √m. The engine's least s is 1e-4, so 0.005, for a change
    # smaller than the weights.
    plain, fitted, theirs = (float(np.abs(e).max()) for e in errors("redundant", recorded))
    assert theirs < 1e-5 and fitted < 0.005 and plain > 0.02
