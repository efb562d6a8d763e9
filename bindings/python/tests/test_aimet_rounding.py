# SPDX-License-Identifier: Apache-2.0
# Sequential MSE on ONNX models beside what aimet-onnx chose.
import json

import numpy as np
import pytest
from support.environment import shared

import halfstep

NETS = ("cbrc", "dwsep")


@pytest.fixture(scope="module")
def chosen():
    """Of each network, configuration and weight: ``[bits, scale, offset, minimum, maximum]``s."""
    return json.loads(shared("reference", "golden", "onnx_seq_mse_w4.json").read_text())


@pytest.fixture(scope="module")
def pictures():
    with np.load(shared("reference", "golden", "torch_seq_mse_w4.npz")) as arrays:
        return arrays["x"]


def search(net, config, pictures):
    """The model before and after the search, and the layers' reports."""
    plain = halfstep.Model.load(shared("reference", "golden", f"net_{net}.onnx"))
    plain.fold_batch_norms()
    model = plain.copy()
    # AIMET has four pictures and no held-out rows. Sixteen copies of each make the held-out rows
    # those that were learned from, almost surely, and change no choice.
    data = {model.inputs[0].name: np.tile(pictures, (16, 1, 1, 1))}
    layers = model.adaround(
        data, 4, "sequential_mse", config, activation_bits=None, num_candidates=20
    )
    return plain, model, layers


@pytest.mark.parametrize("net", NETS)
def test_scales_per_channel_are_aimets(net, chosen, pictures):
    _, model, layers = search(net, "default_per_channel", pictures)
    sim = halfstep.QuantizationSimModel(model)
    expected = {
        key.split("|")[2]: grids
        for key, grids in chosen.items()
        if key.startswith(f"{net}|default_config_per_channel|")
    }
    assert len(expected) == 3 and {layer.weight for layer in layers} == set(expected)
    for weight, grids in expected.items():
        found = sim.encoding(weight)
        assert {(grid[0], grid[2]) for grid in grids} == {(4, -8.0)} and found.bits == 4
        # The same of 20 fractions of the same range. AIMET rounds both ends, the fraction and the
        # step to float32: four roundings of half a unit, of which 2^-24 is the largest.
        scales = [grid[1] for grid in grids]
        np.testing.assert_allclose(found.scales, scales, rtol=4 * 2**-24, err_msg=weight)
        minima = np.asarray(found.scales) * -8
        np.testing.assert_allclose(minima, [grid[3] for grid in grids], rtol=6 * 2**-24)


@pytest.mark.parametrize(("net", "first"), [("cbrc", "conv1"), ("dwsep", "pw1")])
def test_scales_per_tensor_are_those_of_the_least_sum(net, first, chosen, pictures):
    # AIMET takes the largest scale that any channel would choose for itself; here the sum over
    # channels decides (docs/aimet-differences.md). By definition, on the first layer:
    plain, model, layers = search(net, "default", pictures)
    sim = halfstep.QuantizationSimModel(model)
    weight = plain.initializers[f"{first}.weight"]
    largest = float(np.abs(weight).max())
    padding = weight.shape[-1] // 2
    x = np.pad(pictures, ((0, 0), (0, 0), *[(padding, padding)] * 2)).astype(np.float64)
    patches = np.lib.stride_tricks.sliding_window_view(x, weight.shape[-2:], (2, 3))

    def loss(scale):
        rounded = np.clip(np.rint(weight.astype(np.float64) / scale), -8, 7) * scale
        return np.square(np.einsum("nchwij,kcij->nkhw", patches, rounded - weight)).sum()

    scale = float(sim.encoding(f"{first}.weight").scales[0])
    fractions = [largest / 7 * step / 20 for step in range(1, 21)]
    losses = [loss(fraction) for fraction in fractions]
    best = fractions[int(np.argmin(losses))]
    assert scale == pytest.approx(best, rel=4 * 2**-24)
    for layer in layers:
        ((_, theirs, *_),) = chosen[f"{net}|default_config|{layer.weight}"]
        assert sim.encoding(layer.weight).scales[0] <= theirs * (1 + 4 * 2**-24)
