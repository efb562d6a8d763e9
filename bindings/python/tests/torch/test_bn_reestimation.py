# SPDX-License-Identifier: Apache-2.0
# Batch-norm re-estimation: against statistics by hand, undoing, errors.
import copy

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from halfstep.errors import (  # noqa: E402
    EmptyStatisticsError,
    InvalidArgumentError,
    NonFiniteValueError,
)
from halfstep.torch.bn_reestimation import reestimate_bn_stats  # noqa: E402


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.ReLU())
    return model.train()


def data(count=4):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(5, 2, 6, 6, generator=generator) * (k + 1), k) for k in range(count)]


def test_statistics_are_averages_over_batches():
    model = network()
    batches = data()
    outputs = [model[0](x).detach().double().transpose(0, 1).flatten(1) for x, _ in batches[:3]]
    handle = reestimate_bn_stats(model, batches, num_batches=3)
    mean = torch.stack([y.mean(1) for y in outputs]).mean(0)
    variance = torch.stack([y.var(1) for y in outputs]).mean(0)
    # A float32 sum of 80 values a channel, below 10.
    torch.testing.assert_close(model[1].running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[1].running_var.double(), variance, rtol=1e-5, atol=1e-5)
    assert model.training and model[1].training and model[1].momentum == 0.1
    handle.remove()
    assert torch.equal(model[1].running_mean, torch.zeros(3))
    assert torch.equal(model[1].running_var, torch.ones(3))
    assert model[1].num_batches_tracked == 0
    model[1].running_mean.fill_(7)
    handle.remove()
    assert model[1].running_mean[0] == 7


def test_other_modules_are_in_evaluation_mode():
    model = network()
    seen = []
    model[2].register_forward_hook(lambda module, *_: seen.append(module.training))
    model[1].register_forward_hook(lambda module, *_: seen.append(module.training))
    with reestimate_bn_stats(model, data(1), forward_fn=lambda m, batch: m(batch[0])):
        assert seen == [True, False]
        assert model[1].running_mean.abs().sum() > 0
    assert model[1].running_mean.abs().sum() == 0


def test_failures_leave_everything_as_it_was():
    model = network()
    state = copy.deepcopy(model.state_dict())

    def unchanged():
        now = model.state_dict()
        return model[2].training and all(torch.equal(now[key], state[key]) for key in state)

    def fails(module, batch):
        module(batch[0])
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        reestimate_bn_stats(model, data(), forward_fn=fails)
    assert unchanged()
    with pytest.raises(EmptyStatisticsError, match="'1' has seen no data"):
        reestimate_bn_stats(model, [])
    with pytest.raises(InvalidArgumentError, match="num_batches"):
        reestimate_bn_stats(model, data(), num_batches=0)
    with pytest.raises(NonFiniteValueError, match="'1'"):
        reestimate_bn_stats(model, [torch.full((2, 2, 4, 4), torch.inf)])
    assert unchanged()
