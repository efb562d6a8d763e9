# SPDX-License-Identifier: Apache-2.0
# AIMET places the same quantizers in the same module, with the same ranges.
import importlib.util
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from support import torchvision_models  # noqa: E402
from support.environment import aimet_python  # noqa: E402
from torch.nn.modules.batchnorm import _BatchNorm  # noqa: E402

from halfstep.torch import QuantizationSimModel, fold_all_batch_norms  # noqa: E402

SCRIPT = Path(__file__).parents[1] / "aimet" / "simulate_torch.py"
SPEC = importlib.util.spec_from_file_location("simulate_torch", SCRIPT)
NETWORKS = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(NETWORKS)


def build(name):
    if name == "mobilenet":
        inputs = torchvision_models.inputs("mobilenet_v2", 4, seed=3, size=64)
        return torchvision_models.build("mobilenet_v2"), torch.from_numpy(inputs)
    torch.manual_seed(4)
    net = NETWORKS.NETWORKS[name]().eval()
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.normal_(module.running_mean)
    shape = (16, 7, 12) if name == "sequence" else (16, 3, 12, 12)
    return net, torch.randn(shape)


def simulate_in_aimet(name, net, inputs, folder):
    torch.save(net.state_dict(), folder / "state.pth")
    np.save(folder / "inputs.npy", inputs.numpy())
    done = subprocess.run(
        [aimet_python(), str(SCRIPT), name, str(folder / "state.pth"), str(folder / "inputs.npy")],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # Inputs belong to the first module there, to the network here.
    (first,) = found["in"].values()
    found["in"] = {"": first}
    # Functional operators became modules.
    found["out"] = {
        re.sub(r"module_(\w+?)(_\d+)?$", r"\1", place): scales
        for place, scales in found["out"].items()
    }
    return found


#: What AIMET calls an operator that has another name here.
OPERATORS = {"mean": "adaptive_avg_pool2d"}


def place(name):
    """Kind and module of a quantizer, as `simulate_torch.py` reports them."""
    *owner, kind, key = name.split(".")
    if kind == "input_quantizers":
        return "in", ""
    if kind == "param_quantizers":
        return key, ".".join(owner)
    if kind == "functional_quantizers":
        operator = re.sub(r"_\d+$", "", key)
        owner.append(OPERATORS.get(operator, operator))
    return "out", ".".join(owner)


def quantizers(sim):
    found = {"in": {}, "out": {}}
    for name, quantizer in sim.named_quantizers():
        if quantizer.enabled:
            kind, module = place(name)
            found.setdefault(kind, {})[module] = quantizer
    return found


def scales(quantizer):
    return np.atleast_1d(quantizer.get_encoding()["scale"]).reshape(-1)


def expect_same_places(ours, theirs):
    assert {k: sorted(v) for k, v in ours.items()} == {k: sorted(v) for k, v in theirs.items()}


def expect_same_scales(ours, theirs, rtol=1e-6):
    for kind, modules in theirs.items():
        for module, expected in modules.items():
            got = scales(ours[kind][module])
            # The same kernels of torch on both sides; the grids may differ by an ulp or two.
            np.testing.assert_allclose(got, expected, rtol, err_msg=f"{kind} {module}")


@pytest.mark.parametrize("name", ["layers", "sequence"])
def test_same_quantizers_and_scales_as_aimet(name, tmp_path):
    net, inputs = build(name)
    theirs = simulate_in_aimet(name, net, inputs, tmp_path)
    sim = QuantizationSimModel(net, inputs[:1])
    sim.compute_encodings(lambda model: model(inputs))
    expect_same_places(quantizers(sim), theirs)
    expect_same_scales(quantizers(sim), theirs)


def test_unfolded_batch_norms_are_quantized_as_aimet_does(tmp_path):
    net, inputs = build("norms")
    theirs = simulate_in_aimet("norms", net, inputs, tmp_path)
    sim = QuantizationSimModel(net, inputs[:1])
    ours = quantizers(sim)
    expect_same_places(ours, theirs)
    # docs/aimet-differences.md: the scales of batch norms that stay are symmetric in aimet-torch.
    for module in ("6", "9"):
        assert not ours["weight"][module].is_symmetric
        ours["weight"][module].is_symmetric = True
    sim.compute_encodings(lambda model: model(inputs))
    expect_same_scales(ours, theirs)


def test_folded_batch_norms_leave_the_quantizers_where_unfolded_ones_had_them():
    net, inputs = build("norms")
    unfolded = quantizers(QuantizationSimModel(net, inputs[:1]))
    fold_all_batch_norms(net, inputs[:1])
    folded = quantizers(QuantizationSimModel(net, inputs[:1]))
    # A batch norm's result is the layer's afterwards. The one that only folds forward was
    # quantized, and is no more.
    moved = {"4": "3", "11": "10", "15": "14", "1": "0"}
    expected = {moved.get(name, name) for name in unfolded["out"]} - {"6"}
    assert set(folded["out"]) == expected
    assert set(folded["weight"]) == set(unfolded["weight"]) - {"6"}


def test_mobilenet_as_in_aimet(tmp_path):
    net, inputs = build("mobilenet")
    theirs = simulate_in_aimet("mobilenet", net, inputs, tmp_path)
    sim = QuantizationSimModel(net, inputs[:1])
    ours = quantizers(sim)
    expect_same_places(ours, theirs)
    expect_same_scales({"weight": ours["weight"]}, {"weight": theirs["weight"]})
    # A quarter of the weights' scales is an ulp apart, which moves four of two million weights
    # across a border of two codes, and the activations behind them by up to 2e-4. With AIMET's
    # scales for the weights, the ranges of all activations are AIMET's.
    for module, expected in theirs["weight"].items():
        quantizer = ours["weight"][module]
        quantizer.set_encoding(expected, np.zeros(len(expected), np.int32))
        quantizer.freeze()
    # AIMET's convolutions run row-major.
    sim.model.channels_last = False
    sim.compute_encodings(lambda model: model(inputs))
    expect_same_scales(ours, theirs)
    # Sums of up to 960 float32 products in another order, one layer behind the other: 2e-6 seen.
    sim.model.channels_last = True
    sim.compute_encodings(lambda model: model(inputs))
    expect_same_scales(ours, theirs, rtol=1e-5)
