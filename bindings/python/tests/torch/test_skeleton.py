# SPDX-License-Identifier: Apache-2.0
# Layers on their own are to the engine what they are in the network around them.
import onnx
import pytest
import torch
from support import torchvision_models
from test_compress import SHAPE, Net, compress, manual
from torch import nn
from torch_networks import network, pictures

import halfstep
from halfstep.torch import SpatialSvdParameters, UntraceableModelError, WeightSvdParameters
from halfstep.torch import compress as compressing
from halfstep.torch._skeleton import skeleton


class Rows(nn.Module):
    """Products of tensors of three axes, paddings by name, parameters of other operators."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 8, bias=False)
        self.same = nn.Conv1d(5, 6, 3, padding="same")
        self.uneven = nn.Conv2d(6, 5, (1, 2), padding="same")
        self.slope = nn.PReLU(5)
        self.deep = nn.Conv3d(1, 2, (1, 1, 2))
        self.valid = nn.Conv1d(5, 5, 3, padding="valid")
        self.last = nn.Linear(6, 4)

    def forward(self, x):
        x = self.second(torch.relu(self.norm(self.first(x))))
        x = self.uneven(self.same(x).unsqueeze(-1)).squeeze(-1)
        x = self.slope(x)[:, None, :, :, None].expand(-1, -1, -1, -1, 2)
        x = self.valid(self.deep(x).sum((1, 4)))
        return self.last(x.mean(1))


def resnet18():
    torch.manual_seed(0)
    return torchvision_models._torchvision().models.resnet18(weights=None)


NETWORKS = {
    "paddings": (Net, SHAPE),
    "several": (Net, (4, *SHAPE[1:])),
    "rows": (Rows, (1, 5, 8)),
    "blocks": (network, tuple(pictures().shape)),
    "half": (lambda: Net().half(), SHAPE),
    "double": (lambda: Net().double(), SHAPE),
    "resnet18": (resnet18, (1, 3, 64, 64)),
}


@pytest.mark.parametrize("scheme", ["spatial_svd", "weight_svd"])
@pytest.mark.parametrize("name", NETWORKS)
def test_layers_alone_are_those_of_the_network(name, scheme):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    dummy = torch.zeros(shape, dtype=next(model.parameters()).dtype)
    assert skeleton(model, dummy) is not None
    found = []
    for takes_layers in (True, False):
        backend = compressing._Backend(model, dummy, scheme, takes_layers)
        costs = halfstep.ModelCompressor(backend.engine).costs
        left = [weight for weight in backend.refusals if weight in {c.weight for c in costs}]
        compressor = halfstep.ModelCompressor(backend.engine, scheme, layers_to_ignore=left)
        smaller, stats = compressor.compress(0.5)
        state = backend.swapped(smaller, stats).state_dict()
        found.append(
            (costs, list(backend.layers.items()), list(backend.refusals.items()), stats, state)
        )
    (*ours, state), (*theirs, expected) = found
    assert ours == theirs
    assert list(state) == list(expected)
    # The engine gets the same numbers, so that the same come out.
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_result_is_valid_onnx():
    model = Net().eval()
    found = skeleton(model, torch.zeros(SHAPE))
    document = onnx.load_from_string(found.data)
    onnx.checker.check_model(document, full_check=True)
    names = [node.name for node in document.graph.node]
    assert names[:4] == ["node_conv2d", "node_conv2d_1", "node_conv2d_2", "node_convolution"]
    assert found.calls["twice.weight"] == 2 and "norm1.weight" in found.state
    assert "norm1.weight" not in found.parameters
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_compressing_for_weights_alone_does_not_trace(monkeypatch):
    def network(*_):
        raise AssertionError("traced")

    model = Net().train()
    parameters = manual(WeightSvdParameters, {model.conv2: 0.5, model.fc1: 0.5})
    monkeypatch.setattr(compressing, "Network", network)
    small, stats = compress(model, parameters)
    assert small.training and isinstance(small.conv2, nn.Sequential)
    assert "called 2 times" in stats.engine.refusals["twice.weight"]
    assert "BatchNorm2d" in stats.engine.refusals["norm1.weight"]
    # The copy shares nothing with the module.
    ours = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not ours & {tensor.data_ptr() for tensor in small.state_dict().values()}
    with pytest.raises(AssertionError, match="traced"):
        compress(model, parameters, data=torch.zeros(SHAPE))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)
        self.b = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.a(x) + self.b(x)


class Unread(Pair):
    def forward(self, x):
        self.b(x)
        return self.a(x)


class Remembers(Pair):
    def forward(self, x):
        self.seen = self.a(x)
        return self.seen + self.b(x)


class Computes(Pair):
    def forward(self, x):
        return self.a(x) + torch.conv2d(x, 2 * self.b.weight, self.b.bias)


class Multiplies(Pair):
    def forward(self, x):
        rows = super().forward(x).flatten(2)
        return rows @ torch.ones(rows.shape[-1], 2)


class Scripted(Pair):
    def __init__(self):
        super().__init__()
        self.b = torch.jit.trace(self.b, torch.zeros(1, 3, 8, 8))


class Tied(Pair):
    def __init__(self):
        super().__init__()
        self.b.weight = self.a.weight


class Decides(Pair):
    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.b(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", [Unread, Remembers, Computes, Multiplies, Scripted, Tied, Decides])
def test_what_is_unclear_is_left_to_the_network(kind):
    model = kind().eval()
    assert skeleton(model, torch.zeros(1, 3, 8, 8)) is None
    assert "seen" not in vars(model)


def test_networks_that_cannot_be_traced_are_refused():
    model = Decides()
    with pytest.raises(UntraceableModelError, match="Decides"):
        compress(model, manual(SpatialSvdParameters, {model.a: 0.5}), shape=(1, 3, 8, 8))
    assert model.training


def test_what_the_engine_cannot_run_may_lie_between_layers():
    class Determinant(Pair):
        def forward(self, x):
            return super().forward(x) * torch.linalg.det(x).sum()

    model = Determinant().eval()
    small, _ = compress(model, manual(SpatialSvdParameters, {model.a: 0.5}), shape=(1, 3, 8, 8))
    assert isinstance(small.a, nn.Sequential)
