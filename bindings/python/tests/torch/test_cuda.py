# SPDX-License-Identifier: Apache-2.0
# Simulations of modules on a GPU; skipped where there is none.
import copy

import pytest

torch = pytest.importorskip("torch")

import torch_networks  # noqa: E402

from halfstep.errors import InvalidStateError  # noqa: E402
from halfstep.torch import (  # noqa: E402
    DeviceMismatchError,
    QuantizationSimModel,
    equalize_model,
    fold_all_batch_norms,
    load_checkpoint,
    save_checkpoint,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

X = torch_networks.pictures(8)


def simulate(device):
    sim = QuantizationSimModel(torch_networks.network().to(device), X[:1].to(device))
    sim.compute_encodings(lambda model: model(X.to(device)))
    return sim


def output(sim, device):
    with torch.no_grad():
        return sim.model.eval()(X.to(device)).cpu()


def expect_close(sim, got, expected):
    """Convolutions sum in another order there: values on a border move by a step."""
    name = sim._network.exported.outputs[0]
    step = float(sim.quantizer(name).get_encoding()["scale"])
    off = (got - expected).abs() / step
    assert float(off.max()) <= 2.01 and float((off > 0.5).float().mean()) <= 0.1


def test_a_simulation_moves_to_the_gpu_and_back(tmp_path):
    sim = simulate("cpu")
    encodings, expected = sim.encodings(), output(sim, "cpu")
    sim.model.cuda()
    assert all(quantizer.minimum.is_cuda for quantizer in sim.quantizers.values())
    expect_close(sim, output(sim, "cuda"), expected)
    assert sim.encodings() == encodings
    save_checkpoint(sim, tmp_path / "sim.pkl")
    assert load_checkpoint(tmp_path / "sim.pkl").encodings() == encodings
    sim.model.cpu()
    assert torch.equal(output(sim, "cpu"), expected)


def test_a_model_on_the_gpu_is_calibrated_there():
    here, there = simulate("cpu"), simulate("cuda")
    assert all(parameter.is_cuda for parameter in there.model.parameters())
    for name, quantizer in there.quantizers.items():
        if quantizer.enabled:
            torch.testing.assert_close(
                quantizer.minimum.cpu(), here.quantizers[name].minimum, rtol=1e-3, atol=1e-3
            )
    expect_close(here, output(there, "cuda"), output(here, "cpu"))


def test_training_on_the_gpu_learns_what_the_cpu_learns(tmp_path):
    here = simulate("cpu")
    there = copy.deepcopy(here)
    there.model.cuda()
    losses = {}
    for device, sim in (("cpu", here), ("cuda", there)):
        sim.model.eval()
        optimizer = torch.optim.SGD(sim.model.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            loss = sim.model(X.to(device)).square().mean()
            loss.backward()
            optimizer.step()
            losses.setdefault(device, []).append(loss.item())
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.02)
    there.export(tmp_path, "net")
    there.onnx.export(tmp_path / "net.qdq.onnx")


def test_grids_follow_weights_on_the_gpu():
    sim = simulate("cuda")
    quantizer = sim.model.stem.param_quantizers["weight"]
    quantizer.learnable = False
    before = quantizer.maximum.clone()
    with torch.no_grad():
        sim.model.stem.weight.mul_(2)
    output(sim, "cuda")
    assert torch.equal(quantizer.maximum, 2 * before)  # doubling is exact


@pytest.mark.parametrize("function", [fold_all_batch_norms, equalize_model])
def test_folding_and_equalizing_on_the_gpu(function):
    net = torch_networks.network()
    expected = net(X).detach()
    net.cuda()
    function(net, dummy_input=X[:1].cuda())
    assert all(parameter.is_cuda for parameter in net.parameters())
    got = net.eval()(X.cuda()).cpu().detach()
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)  # TF32 convolutions


def test_what_lies_elsewhere_is_named():
    sim = simulate("cuda")
    with pytest.raises(InvalidStateError, match="quantizer 'x' is on cuda:0, its input on cpu"):
        sim.model(X)
    sim.model.fc.cpu()
    with pytest.raises(DeviceMismatchError, match=r"'fc\."):
        sim.compute_encodings([X])
