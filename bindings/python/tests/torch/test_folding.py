# SPDX-License-Identifier: Apache-2.0
# Batch-norm folding and equalization of live modules.
import copy

import pytest

torch = pytest.importorskip("torch")

import torch_networks  # noqa: E402
from torch import nn  # noqa: E402

from halfstep.errors import InvalidArgumentError, UnsupportedOperatorError  # noqa: E402
from halfstep.torch import BoundedReLU, equalize_model, fold_all_batch_norms  # noqa: E402


def expect_same_function(model, before, x):
    with torch.no_grad():
        # Folding rounds each weight once: 1e-7 a layer, over a handful of layers.
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", ["tensor", "shape", "shapes", "keyword"])
def test_batch_norms_fold_in_place(style):
    net = torch_networks.network()
    x = torch_networks.pictures(4)
    before = net(x).detach()
    weight = net.block.conv1.weight
    arguments = {
        "tensor": (net, x[:1]),
        "shape": (net, (1, 3, 8, 8)),
        "shapes": (net, [(1, 3, 8, 8)]),
        "keyword": (net, None, x[:1]),
    }[style]
    norms = (net.block.bn1, net.block.bn2)
    pairs = fold_all_batch_norms(*arguments)
    assert [tuple(pair) for pair in pairs] == [
        (net.block.conv1, norms[0]),
        (net.block.conv2, norms[1]),
    ]
    assert isinstance(net.block.bn1, nn.Identity) and net.block.conv1.bias is not None
    assert net.block.conv1.weight is weight and weight.requires_grad
    kept = [k for k in torch_networks.network().state_dict() if ".bn" not in k]
    assert set(kept) < set(net.state_dict())
    expect_same_function(net, before, x)


def test_fold_by_hand():
    # 1x1 convolution, weight 3; norm: (y - 1) / sqrt(4 - 0) * 2 + 5 = y + 4.
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=0.0)).eval()
    with torch.no_grad():
        net[0].weight.fill_(3)
        net[1].weight.fill_(2)
        net[1].bias.fill_(5)
        net[1].running_mean.fill_(1)
        net[1].running_var.fill_(4)
    fold_all_batch_norms(net, torch.ones(1, 1, 2, 2))
    assert net[0].weight.item() == 3 and net[0].bias.item() == 4


def test_equalization_keeps_the_function_and_bounds_relu6():
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU6(), nn.Conv2d(8, 4, 1),
    ).eval()  # fmt: skip
    with torch.no_grad():
        net[0].weight.mul_(torch.logspace(-2, 1, 8).reshape(8, 1, 1, 1))
    x = 4 * torch_networks.pictures(4)
    before = net(x).detach()
    folded = copy.deepcopy(net)
    fold_all_batch_norms(folded, x[:1])
    report = equalize_model(net, x[:1])
    assert [one.layers for one in report.sets] == [("0", "3"), ("3", "5")]
    assert [len(one.factors[0]) for one in report.sets] == [8, 8]
    assert isinstance(net[2], BoundedReLU) and "bound" in dict(net[2].named_buffers())
    expect_same_function(net, before, x)
    spread = []
    for one in (folded, net):
        ranges = one[0].weight.detach().abs().amax((1, 2, 3))
        spread.append(float(ranges.max() / ranges.min()))
    assert spread[1] < spread[0]
    again = equalize_model(net, x[:1])  # the bounds are traced and scaled like parameters
    assert again.iterations >= 1
    expect_same_function(net, before, x)


def test_what_cannot_fold_is_refused_and_nothing_changes():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

        def forward(self, x):
            return self.norms[1](self.conv(self.norms[0](self.conv(x))))

    net = Twice().eval()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UnsupportedOperatorError, match="'conv' is called 2 times"):
        fold_all_batch_norms(net, torch.ones(1, 4, 2, 2))
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(InvalidArgumentError, match="dummy input"):
        fold_all_batch_norms(net)


def test_functional_relu6_is_refused():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.second(nn.functional.relu6(self.first(x)))

    torch.manual_seed(0)
    net = Functional().eval()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UnsupportedOperatorError, match=r"torch\.nn\.ReLU6 module"):
        equalize_model(net, torch.ones(1, 3, 4, 4))
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
