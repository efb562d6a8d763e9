# SPDX-License-Identifier: Apache-2.0
# Passes without gradients run channels-last, and nobody notices but the clock.
import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_networks import network, pictures  # noqa: E402

from halfstep.torch import QuantizationSimModel  # noqa: E402

LAST = torch.channels_last
ROW_MAJOR = torch.contiguous_format


class Reshaping(nn.Module):
    """Reads memory in ways that depend on the format: views, a shuffle, permuted results."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 4, 3)
        self.fc = nn.Linear(4 * 6 * 6, 5)

    def forward(self, x):
        y = torch.relu(self.conv1(x))
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        y = self.conv2(y)
        rows = y.view(n, -1)
        return {
            "logits": self.fc(rows),
            "maps": y,
            "last": y.permute(0, 2, 3, 1),
            "tokens": [y.flatten(2), y.flatten(2).transpose(1, 2)],
        }


class Strided(nn.Module):
    """Reads memory as it lies."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.conv(x)
        return y + torch.as_strided(y, y.shape, y.stride())


def simulated(model, **options):
    sim = QuantizationSimModel(model, pictures(), **options)
    sim.compute_encodings([pictures(8, seed=5)])
    sim.model.eval()
    return sim


def reshaping():
    torch.manual_seed(3)
    return Reshaping().eval()


def leaves(value):
    return torch.utils._pytree.tree_leaves(value)


def formats(sim, x):
    """Whether each four-dimensional tensor that a quantizer sees is channels-last."""
    seen = {}

    def see(name):
        def hook(module, args, result):
            if result.dim() == 4:
                seen[name] = not result.is_contiguous() and result.is_contiguous(memory_format=LAST)

        return hook

    hooks = [q.register_forward_hook(see(n)) for n, q in sim.quantizers.items()]
    with torch.no_grad():
        sim.model(x)
    for hook in hooks:
        hook.remove()
    return {name: last for name, last in seen.items() if not sim._roles[name]}


def test_activations_are_channels_last_without_gradients_only():
    sim = simulated(network())
    found = formats(sim, pictures())
    assert not found.pop("x")
    assert found and all(found.values())
    seen = []
    sim.model.stem.register_forward_pre_hook(lambda *_: None)
    sim.quantizer("conv2d_1").register_forward_hook(lambda m, a, r: seen.append(r.is_contiguous()))
    sim.model(pictures())
    assert seen == [True]


@pytest.mark.parametrize("make", [network, reshaping])
def test_values_are_at_most_a_step_away_layer_by_layer(make):
    sim = simulated(make())
    x = pictures(16, seed=8)
    names = [n for n, q in sim.quantizers.items() if n in sim._part.watched and q.enabled]
    with torch.no_grad():
        sim.model.channels_last = False
        plain = capture(sim, names, lambda: sim.model(x))
        sim.model.channels_last = True
        got = capture(sim, names, lambda: sim.model(x), given=plain)
    moved = total = 0
    for name in names:
        step = float(sim.quantizer(name).get_encoding()["scale"])
        off = ((got[name] - plain[name]).abs() / step).round()
        assert off.max() <= 1, name
        moved, total = moved + int((off == 1).sum()), total + off.numel()
    # As in test_networks: sums in another order are up to 1e-6 of the range off, 255 steps a range.
    assert moved / total < 1e-3


def capture(sim, names, run, given=None):
    """What quantizers hand on; with `given`, each layer computes from those values instead."""
    found, hooks = {}, []
    for name in names:

        def hook(module, args, result, name=name):
            found[name] = result.clone(memory_format=ROW_MAJOR)
            return None if given is None else given[name]

        hooks.append(sim.quantizer(name).register_forward_hook(hook))
    run()
    for hook in hooks:
        hook.remove()
    return found


def test_results_have_the_formats_of_the_float_module():
    model = reshaping()
    sim = simulated(model)
    with torch.no_grad():
        expected, got = model(pictures()), sim.model(pictures())
    for ours, theirs in zip(leaves(got), leaves(expected), strict=True):
        assert (ours.shape, ours.stride()) == (theirs.shape, theirs.stride())


@pytest.mark.parametrize("given", [ROW_MAJOR, LAST])
@pytest.mark.parametrize("weights", [ROW_MAJOR, LAST])
def test_who_chose_channels_last_gets_it(given, weights):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    sim = simulated(model)
    x = pictures().contiguous(memory_format=given)
    model.to(memory_format=weights)
    sim.model.to(memory_format=weights)
    with torch.no_grad():
        expected, got = model(x), sim.model(x)
    assert got.stride() == expected.stride()
    assert got.is_contiguous() == (given == weights == ROW_MAJOR)


def test_what_reads_memory_gets_what_it_reads():
    """The engine computes the same from the same graph, without any format."""
    sim = simulated(reshaping())
    x = pictures(6, seed=9)
    with torch.no_grad():
        ours = leaves(sim.model(x))
    engine = sim._engine(keeps_ranges=True)
    exported = sim._network.exported
    theirs = engine.run({exported.inputs[0]: x.numpy()})
    enabled = [n for n in sim._part.watched if sim.quantizer(n).enabled]
    step = max(float(sim.quantizer(n).get_encoding()["scale"]) for n in enabled)
    for value, name in zip(ours, exported.outputs, strict=True):
        off = np.abs(value.numpy() - theirs[name]) / step
        assert off.max() <= 1.01, name


def test_off_means_the_same_bits_as_with_gradients():
    sim = simulated(network())
    x = pictures(6, seed=4)
    sim.model.channels_last = False
    assert not any(formats(sim, x).values())
    with torch.no_grad():
        plain = sim.model(x)
    assert torch.equal(plain, sim.model(x).detach())


def test_the_switch_is_copied_and_pickled():
    sim = simulated(network())
    x = pictures(6, seed=4)
    for chosen in (True, False):
        sim.model.channels_last = chosen
        with torch.no_grad():
            expected = sim.model(x)
            assert torch.equal(expected, sim.model(x))
        for other in (copy.deepcopy(sim), pickle.loads(pickle.dumps(sim))):
            assert other.model.channels_last is chosen
            with torch.no_grad():
                assert torch.equal(other.model(x), expected)


def test_graphs_that_read_strides_stay_as_they_are():
    torch.manual_seed(0)
    sim = simulated(Strided().eval())
    assert "channels_last" not in sim.model.code
    assert not any(formats(sim, pictures()).values())


@pytest.mark.parametrize("kind", ["bfloat16", "autocast", "float64"])
def test_other_types_stay_as_they_are(kind):
    sim = simulated(network())
    x = pictures()
    if kind == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert not any(formats(sim, x).values())
        return
    dtype = getattr(torch, kind)
    sim.model.to(dtype)
    assert not any(formats(sim, x.to(dtype)).values())


def test_statistics_do_not_ask_for_the_format():
    sim = QuantizationSimModel(network(), pictures(), quant_scheme="sqnr")
    name = next(n for n in sim._part.watched if n.startswith("conv2d") and sim.quantizer(n).enabled)
    values = torch.randn(4, 8, 6, 10, generator=torch.Generator().manual_seed(0))
    found = []
    for value in (values, values.contiguous(memory_format=LAST), values.double()):
        engine = sim._engine(keeps_ranges=False)
        with sim._part.watching(engine):
            sim.quantizer(name).observer(value)
        found.append(engine.statistics())
    assert found[0] == found[1] == found[2]
    assert found[0] != sim._engine(keeps_ranges=False).statistics()


def test_an_empty_batch_passes():
    sim = simulated(network())
    with torch.no_grad():
        assert sim.model(pictures()[:0]).shape == (0, 5)
