# SPDX-License-Identifier: Apache-2.0
# Channel pruning of live modules: the engine's function, AIMET's names, ordinary layers.
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import onnxruntime
import pytest
import torch
from compression_data import SHAPE, Closeness, pictures
from torch import nn

import halfstep
from halfstep.torch import (
    AutomaticSelectionParameters,
    ChannelPruningParameters,
    CompressionScheme,
    CostMetric,
    GreedySelectionParameters,
    ModelCompressor,
    ModuleCompRatioPair,
    QuantizationSimModel,
    SpatialSvdParameters,
)
from halfstep.torch._network import Network


class Residual(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.downsample(x))


class Net(nn.Module):
    """Coupled residual blocks, depthwise and grouped layers, PReLU, a concatenation, a product."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.block1 = Residual(12, 12, 1)
        self.block2 = Residual(12, 16, 2)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.slope = nn.PReLU(16)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.side = nn.Conv2d(16, 8, 1)
        self.up = nn.ConvTranspose2d(32, 10, 2, 2)
        self.fc1 = nn.Linear(10 * 16, 20, bias=False)
        self.fc2 = nn.Linear(20, 5)

    def forward(self, x):
        x = self.block2(self.block1(torch.relu(self.stem(x))))
        y = self.slope(self.depthwise(x))
        x = torch.cat([torch.relu(self.grouped(y)), self.side(x)], 1)
        x = nn.functional.max_pool2d(torch.relu(self.up(x)), 4)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for _ in range(4):
            model(pictures(32))
    return model.eval()


def manual(ratios, samples=320, importance="reconstruction", data=None, **settings):
    pairs = [ModuleCompRatioPair(module, ratio) for module, ratio in ratios.items()]
    kind = ChannelPruningParameters
    data = [pictures(32, seed=2)] if data is None else data
    params = kind.ManualModeParams(pairs)
    return kind(data, samples, False, kind.Mode.manual, params, importance=importance, **settings)


def automatic(choice, ignore=(), samples=320, **settings):
    kind = ChannelPruningParameters
    params = kind.AutoModeParams(choice, list(ignore))
    return kind([pictures(32, seed=2)], samples, True, kind.Mode.auto, params, **settings)


def compress(model, parameters, evaluate=lambda *_: 0.5, **settings):
    return ModelCompressor.compress_model(
        model,
        evaluate,
        1,
        settings.pop("shape", SHAPE),
        settings.pop("scheme", CompressionScheme.channel_pruning),
        CostMetric.mac,
        parameters,
        **settings,
    )


@pytest.mark.parametrize("target", [0.8, 0.5])
@pytest.mark.parametrize("importance", ["reconstruction", "magnitude"])
def test_module_computes_what_the_engine_computes(net, target, importance, tmp_path):
    parameters = automatic(AutomaticSelectionParameters(target), importance=importance)
    small, stats = compress(net, parameters, report=tmp_path / "r.html")
    assert float(stats.mac_compression_ratio) <= target
    x = pictures(8, seed=3)
    # The engine alone, with the numbers that were chosen.
    compressor = halfstep.ModelCompressor(
        Network(net, torch.zeros(SHAPE)).bound(net),
        "channel_pruning",
        data=pictures(32, seed=2).numpy(),
        importance=importance,
    )
    kept = {layer.weight: layer.rank for layer in stats.engine.layers if layer.rank}
    smaller, other = compressor.compress(ranks=kept)
    with torch.no_grad():
        actual = small(x).numpy()
    session = onnxruntime.InferenceSession(smaller.to_bytes(), providers=["CPUExecutionProvider"])
    theirs = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    # Sums in another order, layer after layer.
    for expected in (next(iter(smaller.run(x.numpy()).values())), theirs):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.ptp(expected))
    shapes = {name: value.shape for name, value in smaller.initializers.items()}
    for name, value in small.state_dict().items():
        if name in shapes and value.dim() > 0:
            assert tuple(value.shape) == shapes[name], name
    assert (other.macs, other.parameters) == (stats.engine.macs, stats.engine.parameters)
    assert [type(m) for m in small.modules()] == [type(m) for m in net.modules()]
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") >= len(stats.per_layer_stats) and "block1.conv1" in page


def test_layers_know_their_numbers_and_coupled_ones_lose_the_same(net):
    # AIMET names the layer that reads: the first block's input is the stem's and its own output.
    small, stats = compress(net, manual({net.block1.conv1: 0.5, net.fc2: 0.5, net.side: 0.5}))
    assert small.stem.out_channels == small.block1.conv1.in_channels == 6
    assert small.block1.conv2.out_channels == small.block1.bn2.num_features == 6
    assert small.block2.conv1.in_channels == small.block2.downsample.in_channels == 6
    assert small.block1.conv1.out_channels == 12 == small.block1.bn1.num_features
    # What the side branch reads goes through the depthwise layer into the grouped one: each of its
    # four groups keeps as many.
    groups = small.depthwise.groups
    assert groups == small.depthwise.in_channels == small.depthwise.out_channels == 8
    assert small.slope.num_parameters == 8 and small.grouped.groups == 4
    assert small.grouped.in_channels == 8 and small.grouped.weight.shape[1] == 2
    assert small.fc1.out_features == small.fc2.in_features == 10
    assert [(s.name, s.compression_ratio) for s in stats.per_layer_stats] == [
        ("block1.conv1", 0.5),
        ("fc2", 0.5),
        ("side", 0.5),
    ]
    assert torch.isfinite(small(pictures(2))).all()
    # A layer that reads two units gives its ratio to both.
    small, _ = compress(net, manual({net.up: 0.5}))
    assert small.up.in_channels == 12 + 4 and small.side.out_channels == 4
    assert small.grouped.out_channels == 12


def test_ratio_one_is_the_identity_and_zeroed_channels_go_without_a_trace(net):
    x = pictures(4, seed=9)
    same, stats = compress(net, manual({net.block1.conv1: 1.0, net.fc2: 1.0}))
    assert torch.equal(same(x), net(x)) and stats.mac_compression_ratio == "1.000000"
    with torch.no_grad():
        net.block1.conv2.weight[:, 1::3] = 0
        net.fc2.weight[:, :5] = 0
        ratios = {net.block1.conv2: 8 / 12, net.fc2: 15 / 20}
        small, stats = compress(net, manual(ratios, samples=0, importance="magnitude"))
        # Sums over fewer terms, in another order.
        torch.testing.assert_close(small(x), net(x), rtol=0, atol=1e-5)
        # Nor does a fit to data change what is right already.
        fitted, _ = compress(net, manual(ratios))
        torch.testing.assert_close(fitted(x), net(x), rtol=0, atol=1e-5)
    assert small.block1.conv1.out_channels == 8 and small.fc1.out_features == 15
    kept = {(c.name, c.axis): c.kept for c in stats.engine.constants}
    assert kept["block1.conv2.weight", 1] == (0, 2, 3, 5, 6, 8, 9, 11)
    assert kept["block1.bn1.running_mean", 0] == kept["block1.conv1.weight", 0]
    assert kept["fc2.weight", 1] == tuple(range(5, 20)) == kept["fc1.weight", 0]


def test_data_helps_and_a_given_loader_goes_before(net):
    score = Closeness(net)
    ratios = {net.block1.conv2: 0.5, net.block2.conv2: 0.5, net.fc2: 0.5}
    _, plain = compress(net, manual(ratios, samples=0, importance="magnitude"), score)
    _, fitted = compress(net, manual(ratios, importance="magnitude"), score)
    _, best = compress(net, manual(ratios), score)
    scores = [float(s.compressed_model_accuracy) for s in (plain, fitted, best)]
    assert scores[0] < scores[1] < 0 and scores[0] < scores[2] < 0
    for layer in best.engine.layers:
        assert layer.noise is None or layer.noise[1] <= layer.noise[0]
    # 320 samples are 32 pictures in AIMET's counting: the second batch is not read.
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(
            torch.cat([pictures(32, seed=2), pictures(64, seed=8)]), torch.zeros(96)
        ),
        batch_size=32,
    )
    _, same = compress(net, manual(ratios, data=loader), score)
    assert same.compressed_model_accuracy == best.compressed_model_accuracy
    _, given = compress(net, manual(ratios, data=[]), score, data=pictures(32, seed=2))
    assert given.compressed_model_accuracy == best.compressed_model_accuracy


def test_greedy_choice_names_readers_saves_and_runs_in_processes(net, tmp_path):
    path = tmp_path / "scores.json"

    def run(**settings):
        score = Closeness(net)
        greedy = GreedySelectionParameters(
            0.7, 4, saved_eval_scores_dict=settings.pop("path", None)
        )
        parameters = automatic(greedy, ignore=[net.block1.conv1], multiplicity=2)
        small, stats = compress(net, parameters, score, **settings)
        return small, stats, score

    small, stats, score = run(path=path)
    scores = stats.compression_ratio_selection_stats.eval_scores_dictionary
    # The layer that is ignored keeps what it reads, and so do all that read the same.
    assert "block1.conv1" not in scores and "block1.conv2" in scores and "fc2" in scores
    assert small.stem.out_channels == 12 and small.block2.conv1.in_channels == 12
    assert all(list(curve) == [0.25, 0.5, 0.75] for curve in scores.values())
    assert score.calls.count(None) == 2
    assert float(stats.mac_compression_ratio) < 0.75
    for layer in stats.engine.layers:
        assert layer.channels is None or layer.channels % 2 == 0
    _, repeated, score = run(path=path)
    assert score.calls == [None, None]
    assert repeated.mac_compression_ratio == stats.mac_compression_ratio
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        _, parallel, _ = run(executor=pool)
    found = parallel.compression_ratio_selection_stats.eval_scores_dictionary
    assert found == scores and parallel.mac_compression_ratio == stats.mac_compression_ratio


def test_trainer_sees_each_reading_layer_and_what_it_trains_stays(net):
    class Trainer:
        def __init__(self):
            self.calls = []

        def train_model(self, model, layer, train_flag=True):
            if not train_flag:
                assert layer is model
                return
            self.calls.append(layer.name)
            assert model.get_submodule(layer.name) is layer.module
            with torch.no_grad():
                model.fc2.bias += 1

    trainer = Trainer()
    parameters = manual({net.fc2: 0.5, net.block1.conv2: 0.5})
    small, stats = compress(net, parameters, trainer=trainer)
    assert trainer.calls == ["block1.conv2", "fc2"]
    assert small.fc2.in_features == 10 and small.block1.conv2.in_channels == 6
    assert float(stats.mac_compression_ratio) < 1
    once, _ = compress(net, parameters)
    # Fits may move the bias, but not by 2.
    assert (small.fc2.bias - once.fc2.bias).mean() > 1.5


def test_result_trains_on_exports_splits_and_quantizes(net, tmp_path):
    small, _ = compress(net.train(), automatic(AutomaticSelectionParameters(0.6)))
    assert small.training and all(p.requires_grad for p in small.parameters())
    x, y = pictures(32, seed=6), torch.arange(32) % 5
    optimizer = torch.optim.Adam(small.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(small(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in small.parameters()) and losses[-1] < 0.9 * losses[0]
    small.eval()
    path = tmp_path / "small.onnx"
    x = pictures(2, seed=4)
    torch.onnx.export(small, (x,), str(path), dynamo=True, verbose=False, external_data=False)
    y = next(iter(halfstep.Model.load(path).run(x.numpy()).values()))
    np.testing.assert_allclose(small(x).detach().numpy(), y, rtol=0, atol=1e-4 * np.ptp(y))
    # Spatial SVD after pruning, as AIMET's guide has it, and both of it in a simulation.
    kind = SpatialSvdParameters
    params = kind.AutoModeParams(AutomaticSelectionParameters(0.8), [])
    split, stats = compress(
        small,
        kind(kind.Mode.auto, params),
        scheme=CompressionScheme.spatial_svd,
        data=pictures(32, seed=2),
    )
    assert float(stats.mac_compression_ratio) <= 0.8
    sim = QuantizationSimModel(split, x)
    sim.compute_encodings(lambda m: m(pictures(8)))
    noise = (sim.model(x) - split(x)).square().mean() / split(x).square().mean()
    assert noise < 0.05


class Fixed(nn.Module):
    """A program that says how many channels there are, and one that picks some by position."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 12, 3, padding=1)
        self.c = nn.Conv2d(12, 16, 3, padding=1)
        self.d = nn.Conv2d(16, 8, 3, padding=1)
        self.e = nn.Conv2d(4, 6, 1)
        self.fc = nn.Linear(6 * 64, 10)

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.a(x))))
        x = self.c(x.view(-1, 12, 64)[..., :64].view(-1, 12, 8, 8))
        x = self.d(torch.relu(x))
        return self.fc(torch.relu(self.e(x[:, :4] * x[:, 4:])).view(-1, 384))


def test_what_a_program_fixes_stays_and_the_rest_is_pruned():
    torch.manual_seed(1)
    model = Fixed().eval()
    data = torch.randn(32, 3, 8, 8)
    kind = ChannelPruningParameters

    def parameters(params, mode):
        return kind([data], 320, False, mode, params)

    small, stats = compress(
        model,
        parameters(kind.AutoModeParams(AutomaticSelectionParameters(0.7), []), kind.Mode.auto),
        shape=(1, 3, 8, 8),
    )
    assert float(stats.mac_compression_ratio) <= 0.7
    assert small.c.in_channels == 12 and small.e.in_channels == 4 and small.fc.in_features == 384
    assert small.b.in_channels < 8 or small.d.in_channels < 16
    refusals = stats.engine.refusals
    assert "12" in refusals["c.weight"] and "384" in refusals["fc.weight"]
    assert any("Slice" in reason for reason in refusals.values())
    assert torch.isfinite(small(data)).all()
    for name, reason in (("c", "12"), ("fc", "384"), ("e", "one by one")):
        pairs = [ModuleCompRatioPair(model.get_submodule(name), 0.5)]
        with pytest.raises(halfstep.UnsupportedOperatorError, match=reason):
            compress(
                model,
                parameters(kind.ManualModeParams(pairs), kind.Mode.manual),
                shape=(1, 3, 8, 8),
            )


def test_errors_name_what_is_wrong(net):
    def fails(error, match, parameters, **settings):
        before = {name: value.clone() for name, value in net.state_dict().items()}
        with pytest.raises(error, match=match):
            compress(net, parameters, **settings)
        assert all(torch.equal(before[n], v) for n, v in net.state_dict().items())

    fails(NotImplementedError, "stem.*stay", manual({net.stem: 0.5}))
    fails(NotImplementedError, "groups", manual({net.depthwise: 0.5}))
    fails(NotImplementedError, "bn1", manual({net.block1.bn1: 0.5}))
    fails(ValueError, "one ratio", manual({net.block1.conv1: 0.5, net.block2.conv1: 0.75}))
    fails(ValueError, "above 0", manual({net.fc2: -1.0}))
    fails(ValueError, "at best", automatic(AutomaticSelectionParameters(0.001)))
    fails(ValueError, "calibration data", manual({net.fc2: 0.5}, samples=0))
    fails(ValueError, "importance", manual({net.fc2: 0.5}, importance="luck"))
    fails(ValueError, "spatial svd", manual({net.fc2: 0.5}), scheme="spatial_svd")
    fails(
        halfstep.CancelledError,
        "cancelled",
        manual({net.fc2: 0.5}),
        progress=lambda done, total: False,
    )
    spatial = SpatialSvdParameters
    fails(
        ValueError,
        "channel pruning",
        spatial(spatial.Mode.manual, spatial.ManualModeParams([])),
    )
    with pytest.raises(ValueError, match="num_reconstruction_samples"):
        manual({net.fc2: 0.5}, samples=-1)
