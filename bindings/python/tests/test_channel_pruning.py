# SPDX-License-Identifier: Apache-2.0
# Channel pruning: AIMET's costs, random networks in onnxruntime, data, errors.
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import halfstep


class Builder:
    """A network of random weights, one operator after another."""

    def __init__(self, seed, shape):
        self.random = np.random.default_rng(seed)
        self.shape = shape
        self.nodes = []
        self.constants = []

    def constant(self, *shape, scale=1.0):
        name = f"c{len(self.constants)}"
        values = scale * self.random.standard_normal(shape)
        self.constants.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def node(self, op, *inputs, **attributes):
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def conv(self, x, inputs, outputs, kernel=3, groups=1):
        scale = (inputs // groups * kernel * kernel) ** -0.5
        weight = self.constant(outputs, inputs // groups, kernel, kernel, scale=scale)
        pads = [kernel // 2] * 4
        return self.node("Conv", x, weight, self.constant(outputs), pads=pads, group=groups)

    def model(self, output):
        self.nodes[-1].output[0] = output = "y" if output == self.nodes[-1].output[0] else output
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *self.shape])
        y = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", "K"])
        graph = helper.make_graph(self.nodes, "net", [x], [y], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString()


def residual(seed):
    """A residual network with depthwise layers, gates and concatenations at random."""
    net = Builder(seed, (3, 8, 8))
    width = 8
    x = net.node("Relu", net.conv("x", 3, width))
    for _ in range(4):
        kind = net.random.integers(4)
        if kind == 0:
            middle = int(net.random.integers(4, 12))
            y = net.node("Relu", net.conv(x, width, middle))
            x = net.node("Relu", net.node("Add", x, net.conv(y, middle, width, 1)))
        elif kind == 1:
            y = net.node("Clip", net.conv(x, width, width, 3, width))
            x = net.node("Add", net.conv(y, width, width, 1), x)
        elif kind == 2:
            gate = net.conv(net.node("GlobalAveragePool", x), width, width, 1)
            x = net.node("Mul", net.node("Sigmoid", gate), x)
        else:
            extra = int(net.random.integers(3, 8))
            x = net.node("Concat", x, net.conv(x, width, extra), axis=1)
            width += extra
    x = net.node("Flatten", net.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]))
    weight = net.constant(5, width * 16, scale=(width * 16) ** -0.5)
    return net.model(net.node("Gemm", x, weight, net.constant(5), transB=1))


def chain():
    """AIMET's network for its cost calculator."""
    net = Builder(0, (1, 28, 28))
    x = net.node("Relu", net.conv("x", 1, 32, 5))
    x = net.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = net.node("Relu", net.conv(x, 32, 64, 5))
    x = net.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = net.node("Flatten", x)
    x = net.node("Relu", net.node("Gemm", x, net.constant(1024, 3136), transB=1))
    return net.model(net.node("Gemm", x, net.constant(10, 1024), transB=1))


def run(model, x):
    session = onnxruntime.InferenceSession(model.to_bytes(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_costs_are_those_of_aimets_tests():
    model = halfstep.Model.load(chain())
    compressor = halfstep.ModelCompressor(
        model, "channel_pruning", importance="magnitude", reconstruct=False
    )
    macs = [627_200, 10_035_200, 3_211_264, 10_240]
    assert [cost.macs for cost in compressor.costs] == macs
    assert [cost.parameters for cost in compressor.costs] == [800, 51_200, 3_211_264, 10_240]
    # AIMET's number for the second layer at 0.5: its 32 inputs are the first layer's outputs.
    _, stats = compressor.compress({compressor.layers[0].weight: 0.5})
    assert stats.macs == (sum(macs), 8_552_704)


@pytest.mark.parametrize("seed", range(12))
def test_random_networks_run_alike_in_onnxruntime(seed):
    model = halfstep.Model.load(residual(seed))
    rng = np.random.default_rng(seed)
    data = rng.standard_normal((24, 3, 8, 8), np.float32)
    x = rng.standard_normal((3, 3, 8, 8), np.float32)
    compressor = halfstep.ModelCompressor(model, "channel_pruning", data=data)
    smaller, stats = compressor.compress(ranks=compressor.select(0.6))
    assert stats.mac_ratio <= 0.6
    # Two engines' float sums over a few hundred terms.
    expected = run(smaller, x)
    np.testing.assert_allclose(smaller.run(x)["y"], expected, rtol=0, atol=1e-4 * np.ptp(expected))
    # Channels by data do better than by weights, on pictures that nothing was learned from.
    plain = halfstep.ModelCompressor(
        model, "channel_pruning", importance="magnitude", reconstruct=False
    )
    other, _ = plain.compress(ranks=compressor.select(0.6))
    fresh = rng.standard_normal((64, 3, 8, 8), np.float32)
    target, ours, theirs = (m.run(fresh)["y"] for m in (model, smaller, other))
    assert np.square(ours - target).sum() < np.square(theirs - target).sum()
    for layer in stats.layers:
        assert layer.noise is None or layer.noise[1] <= layer.noise[0]


def test_identity_greedy_choice_and_multiplicity():
    model = halfstep.Model.load(residual(1))
    x = np.random.default_rng(0).standard_normal((4, 3, 8, 8), np.float32)
    compressor = halfstep.ModelCompressor(
        model, "channel_pruning", importance="magnitude", reconstruct=False, multiplicity=2
    )
    same, stats = compressor.compress(1.0)
    np.testing.assert_array_equal(same.run(x)["y"], model.run(x)["y"])
    assert stats.mac_ratio == 1
    expected = model.run(x)["y"]

    def score(candidate):
        return -float(np.square(candidate.run(x)["y"] - expected).mean())

    scores = compressor.evaluate(score, num_candidates=4)
    sizes = compressor.select_greedy(0.6, scores)
    _, stats = compressor.compress(ranks=sizes)
    assert stats.mac_ratio < 0.9
    for layer in stats.layers:
        assert layer.rank is None or layer.rank % 2 == 0 or layer.rank == layer.maximum_rank


def test_errors_say_what_is_missing():
    model = halfstep.Model.load(residual(2))
    compressor = halfstep.ModelCompressor(model, "channel_pruning")
    with pytest.raises(halfstep.EmptyStatisticsError, match="calibration data"):
        compressor.compress(0.5)
    with pytest.raises(halfstep.EmptyStatisticsError, match="calibration data"):
        compressor.select(0.5)
    with pytest.raises(halfstep.InvalidArgumentError, match="importance"):
        halfstep.ModelCompressor(model, "channel_pruning", importance="luck")
    assert any("output" in reason for reason in compressor.refusals.values())
    data = np.ones((6, 3, 8, 8), np.float32)
    with pytest.raises(halfstep.CancelledError):
        halfstep.ModelCompressor(model, "channel_pruning", data=data).compress(
            0.5, progress=lambda done, total: False
        )
