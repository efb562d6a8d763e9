# SPDX-License-Identifier: Apache-2.0
# Folding the batch norms of a trained simulation into weights and scales.
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("halfstep.torch.folding")

from torch import nn  # noqa: E402

from halfstep.errors import InvalidStateError  # noqa: E402
from halfstep.torch import QuantizationSimModel  # noqa: E402
from halfstep.torch.bn_reestimation import reestimate_bn_stats  # noqa: E402
from halfstep.torch.fold_to_scale import fold_all_batch_norms_to_scale  # noqa: E402


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.a_norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.b_norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        x = self.a_norm(self.a(x))
        x = x + self.relu(self.b_norm(self.b(x)))
        return self.linear(x.mean((2, 3)))


def simulation(config=None, between=False):
    torch.manual_seed(0)
    network = Network()
    with torch.no_grad():
        network.a_norm.weight.uniform_(0.5, 2)[0] = -0.5
        network.b_norm.weight.uniform_(0.5, 2)
        network.b_norm.bias.normal_()
    x = torch.randn(16, 3, 8, 8)
    sim = QuantizationSimModel(network, x[:1], config_file=config)
    if between:
        sim.model.a.output_quantizers[0].enabled = True
    sim.compute_encodings(lambda model: model(x))
    return sim, x


def test_after_training_the_function_stays():
    sim, x = simulation()
    sim.model.train()
    optimizer = torch.optim.SGD(sim.model.parameters(), 0.05)
    for _ in range(4):
        optimizer.zero_grad()
        sim.model(x).square().mean().backward()
        optimizer.step()
    reestimate_bn_stats(sim, x.split(4))
    sim.model.eval()
    before = sim.model(x).detach()
    codes = {}
    for name in ("a", "b"):
        quantizer = sim.model.get_submodule(f"{name}.param_quantizers.weight")
        scale, _ = quantizer.get_scale_and_zero_point()
        codes[name] = (sim.model.get_submodule(name).weight / scale.reshape(-1, 1, 1, 1)).round()
    negative = sim.model.get_submodule("a_norm").weight[0] < 0
    assert negative
    pairs = fold_all_batch_norms_to_scale(sim)
    kinds = [(type(layer).__name__, type(norm).__name__) for layer, norm in pairs]
    assert kinds == [("Conv2d", "BatchNorm2d")] * 2
    assert not any(isinstance(part, nn.BatchNorm2d) for part in sim.model.modules())
    for name, signs in (("a", -1), ("b", 1)):
        quantizer = sim.model.get_submodule(f"{name}.param_quantizers.weight")
        scale, _ = quantizer.get_scale_and_zero_point()
        folded = (sim.model.get_submodule(name).weight / scale.reshape(-1, 1, 1, 1)).round()
        folded[0] *= signs
        # A weight within an ulp of a tie may round the other way.
        assert (folded != codes[name]).float().mean() < 0.01
    after = sim.model(x)
    # A step of the output's grid, for values that a sum in another order moves over a border.
    step = sim.quantizers["linear"].get_encoding()["scale"].item()
    assert (after - before).abs().max() <= 1.01 * step
    assert ((after - before).abs() > step / 2).float().mean() < 0.1
    assert not sim.model.training
    sim.encodings()


def test_what_cannot_fold_is_refused():
    sim, x = simulation(between=True)
    before = sim.model(x)
    with pytest.raises(InvalidStateError, match="result of layer 'a'.*switch the quantizer off"):
        fold_all_batch_norms_to_scale(sim)
    assert torch.equal(sim.model(x), before)
    sim, x = simulation(config="default")
    with pytest.raises(InvalidStateError, match="one range serves several channels"):
        fold_all_batch_norms_to_scale(sim)
