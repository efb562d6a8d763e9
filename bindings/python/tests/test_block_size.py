# SPDX-License-Identifier: Apache-2.0
# Scales for blocks of input channels.
import json

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import halfstep

#: Input channels; blocks of 4 leave one of 2.
INPUTS, CHANNELS, BLOCK = 10, 6, 4


@pytest.fixture(scope="module")
def weights():
    generator = np.random.default_rng(5)
    # Rows of very different size, so that a scale for all of a channel would show.
    return {
        "conv.weight": generator.standard_normal((INPUTS, INPUTS, 1, 1), np.float32)
        * np.exp2(np.arange(INPUTS, dtype=np.float32) % 5)[None, :, None, None],
        "depthwise.weight": generator.standard_normal((INPUTS, 1, 3, 3), np.float32),
        "linear.weight": generator.standard_normal((INPUTS, CHANNELS), np.float32)
        * np.exp2(np.arange(INPUTS, dtype=np.float32) % 5)[:, None],
    }


@pytest.fixture
def model(weights):
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["a"], "conv"),
        helper.make_node(
            "Conv", ["a", "depthwise.weight"], ["b"], "depthwise", group=INPUTS, pads=[1] * 4
        ),
        helper.make_node("Relu", ["b"], ["c"], "relu"),
        helper.make_node("GlobalAveragePool", ["c"], ["d"], "pool"),
        helper.make_node("Flatten", ["d"], ["e"], "flatten"),
        helper.make_node("MatMul", ["e", "linear.weight"], ["y"], "linear"),
    ]
    graph = helper.make_graph(
        nodes,
        "blocks",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", INPUTS, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", CHANNELS])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return halfstep.Model.load(proto.SerializeToString())


@pytest.fixture(scope="module")
def data():
    # Channels that go together, so that how errors of weights add up matters.
    generator = np.random.default_rng(6)
    sources = generator.standard_normal((12, 3, 5, 5), np.float32)
    mixed = np.einsum("oc,nchw->nohw", generator.standard_normal((INPUTS, 3), np.float32), sources)
    return mixed + 0.05 * generator.standard_normal(mixed.shape, np.float32)


def simulated(model, data, **arguments):
    sim = halfstep.QuantizationSimModel(model, param_bits=4, **arguments)
    sim.compute_encodings(data, progress=False)
    return sim


def test_blocks_run_along_input_channels_and_the_last_may_be_smaller(model, data, weights):
    sim = simulated(model, data, block_size=BLOCK)
    for name, (channels, axis) in {"conv.weight": (0, 1), "linear.weight": (1, 0)}.items():
        grid = sim.encoding(name)
        assert (grid.granularity, grid.axis) == ("per_block", channels)
        assert (grid.block_axis, grid.block_size) == (axis, BLOCK)
        # Symmetric 4 bits hold -8 to 7 steps.
        blocks = range(0, INPUTS, BLOCK)
        parts = [np.take(weights[name], range(s, min(s + BLOCK, INPUTS)), axis) for s in blocks]
        rest = tuple(i for i in range(weights[name].ndim) if i != channels)
        steps = [np.maximum(part.max(rest) / 7, -part.min(rest) / 8) for part in parts]
        wanted = np.stack(steps, 1)
        np.testing.assert_allclose(np.reshape(grid.scales, wanted.shape), wanted, rtol=1e-6)


def test_weights_without_as_many_input_channels_stay_per_channel(model, data):
    assert simulated(model, data, block_size=BLOCK).encoding("depthwise.weight").granularity == (
        "per_channel"
    )
    whole = simulated(model, data, block_size=INPUTS)
    assert whole.encoding("linear.weight").granularity == "per_channel"


def test_per_tensor_configurations_have_no_blocks(model, data):
    sim = simulated(model, data, block_size=BLOCK, config="default")
    assert sim.encoding("linear.weight").granularity == "per_tensor"


def test_onnxruntime_computes_the_exported_blocks(model, data, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    sim = simulated(model, data, block_size=BLOCK)
    sim.export_qdq(tmp_path / "qdq.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        tmp_path / "qdq.onnx", options, providers=["CPUExecutionProvider"]
    )
    got, wanted = session.run(None, {"x": data})[0], sim.run(data)["y"]
    step = sim.encoding("y").scales[0]
    # Sums in another order take values across a border, by a step at most in such a shallow net.
    assert np.abs(got - wanted).max() <= step * 1.001
    assert np.mean(np.abs(got - wanted) > step / 2) < 0.05


def test_encodings_files_hold_blocks(model, data, tmp_path):
    sim = simulated(model, data, block_size=BLOCK)
    sim.export(tmp_path, "net", version="2.0.0")
    entries = json.loads((tmp_path / "net.encodings").read_text())["encodings"]
    entry = next(entry for entry in entries if entry["name"] == "linear.weight")
    assert entry["block_size"] == BLOCK and entry["axis"] == 0
    again = halfstep.QuantizationSimModel(model, param_bits=4, block_size=BLOCK)
    again.load_encodings(tmp_path / "net.encodings")
    np.testing.assert_array_equal(again.run(data)["y"], sim.run(data)["y"])


@pytest.mark.parametrize("method", ["gram", "gradient", "sequential_mse"])
def test_rounding_keeps_to_blocks(model, data, method):
    reference = model.run(data)["y"]
    nearest = simulated(model, data, block_size=BLOCK).run(data)["y"]
    arguments = {"iterations": 2000} if method == "gradient" else {}
    layers = model.adaround(data, method=method, block_size=BLOCK, **arguments)
    assert any(layer.noise_after < 0.9 * layer.noise_before for layer in layers)
    sim = simulated(model, data)  # takes the grids that the model carries
    assert sim.encoding("linear.weight").granularity == "per_block"
    # Descent is judged by layers alone: ten rows decide the last one, and it may stay as it was.
    if method != "gradient":
        errors = [np.square(y - reference).sum() for y in (sim.run(data)["y"], nearest)]
        assert errors[0] < errors[1]


def test_finer_scales_leave_less_noise(model, data):
    reference = model.run(data)["y"]
    noise = [
        np.square(simulated(model, data, block_size=size).run(data)["y"] - reference).sum()
        for size in (None, 1)
    ]
    assert noise[1] < noise[0]


@pytest.mark.parametrize("size", [0, -1, 2**31])
def test_sizes_out_of_range_are_refused(model, data, size):
    for call in (
        lambda: halfstep.QuantizationSimModel(model, block_size=size),
        lambda: model.adaround(data, block_size=size),
        lambda: model.correct_biases(data, block_size=size),
    ):
        with pytest.raises(halfstep.InvalidArgumentError, match="block_size"):
            call()
