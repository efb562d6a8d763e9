# SPDX-License-Identifier: Apache-2.0
# Qualcomm's emulator of the Hexagon tensor processor against the simulation, layer by layer.
import networks
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support import small_models
from support.environment import shared

from halfstep import qualcomm

GOLDEN = ("net_cbrc", "net_cbrc_relu6", "net_dwsep", "net_misc", "model_tiny_resnet/net")
MADE = {
    "convnet": small_models.convnet,
    "inverted_residual": networks.inverted_residual,
    "branches": networks.branches,
}


def source(name: str):
    if name in MADE:
        return MADE[name]().SerializeToString()
    return shared("reference", "golden", f"{name}.onnx")


def step_ratio(model: onnx.ModelProto, tensor: str, step: float) -> float:
    """Output steps per unit of the sum of products, the largest of all channels; 0 if no sum."""
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    quantize = producers[producers[f"{tensor}.computed"].input[0]]
    node = producers[quantize.input[0]]
    if node.op_type in ("Relu", "Clip"):
        node = producers[node.input[0]]
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm"):
        return 0.0
    data, weight = (producers[name] for name in node.input[:2])
    return float(constants[data.input[1]] * constants[weight.input[1]].max() / step)


# What the emulator does otherwise than the simulation, found on single layers with inputs on the
# grid (docs/qualcomm.md): the factor from sum to code has 11 significant bits, so a code of b bits
# is off by up to 2^(b - 11) before rounding, 1/8 of a step at 8 bits: one code at most, and for at
# most 1/8 of values. Ties round up, not to even, which only averages of a few values reach. With
# 16-bit inputs, sums drop low bits as well: up to 2^9 units of the sum. Operators without a sum
# have two such factors at most.
@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (8, 16), (4, 16)], ids=str)
@pytest.mark.parametrize("name", [*MADE, *GOLDEN])
def test_each_layer_equals_the_simulation(name, bits, tmp_path):
    sim, feed = networks.quantize(source(name), bits)
    steps = networks.steps(sim)
    sim.export_qdq(tmp_path / "net.onnx", int32_bias=True, prequantize_constants=True)

    whole = qualcomm.run_on_htp(tmp_path / "net.onnx", feed)
    ours = sim.run(feed, extra_outputs=[t for t in steps if t not in feed and t not in whole])
    for output, values in whole.items():
        off = np.rint(np.abs(values - ours[output]) / steps[output])
        original = sim.model.run(feed)[output]
        ratio = np.square(values - ours[output]).sum() / np.square(ours[output] - original).sum()
        print(
            f"\n  {name} w{bits[0]}a{bits[1]}, end to end: {(off == 1).mean():.1%} of {off.size}"
            f" values one step off, {(off > 1).mean():.1%} more (at most {off.max():.0f});"
            f" {ratio:.2g} of the quantization noise",
            end="",
        )
        # Values that moved move others behind them, towards the noise of quantization itself. Two
        # networks that rounded independently would differ by twice its power.
        assert ratio < 2

    model = networks.cut(onnx.load(tmp_path / "net.onnx"), list(ours))
    onnx.save(model, tmp_path / "cut.onnx")
    given = feed | {f"{tensor}.given": value for tensor, value in ours.items()}
    inputs = {value.name for value in model.graph.input}
    assert len(inputs) >= len(ours)  # each tensor but the network's output is read
    forced = qualcomm.run_on_htp(
        tmp_path / "cut.onnx", {name: value for name, value in given.items() if name in inputs}
    )
    one = more = total = largest = 0
    for tensor, values in ours.items():
        off = np.rint(np.abs(forced[f"{tensor}.computed"] - values) / steps[tensor])
        if bits[1] == 8:
            assert off.max() <= 1, tensor
        else:
            lost = step_ratio(model, tensor, steps[tensor])
            assert off.max() <= (1 + 2**5 + 2**9 * lost if lost else 3), tensor
        largest = max(largest, int(off.max()))
        one, more, total = one + (off == 1).sum(), more + (off > 1).sum(), total + off.size
    print(
        f"\n    layer by layer: {one / total:.1%} of {total} one step, {more / total:.1%} more"
        f" (at most {largest})"
    )
    if bits[1] == 8:
        assert one / total <= 1 / 8
    assert 0 < total


def test_refused_nodes_are_named(tmp_path):
    # Neither a pair before nor behind the Gemm: nothing says which integers it should take.
    sim, feed = networks.quantize(source("branches"), (8, 8))
    sim.export_qdq(tmp_path / "net.onnx", prequantize_constants=True)
    model = onnx.load(tmp_path / "net.onnx")
    nodes = list(model.graph.node)
    (gemm,) = [n for n in nodes if n.op_type == "Gemm"]
    producers = {name: node for node in nodes for name in node.output}
    pair = producers[gemm.input[0]]
    gemm.input[0] = producers[pair.input[0]].input[0]
    onnx.save(model, tmp_path / "broken.onnx")
    before = set(tmp_path.iterdir())
    for call in (
        lambda: qualcomm.run_on_htp(tmp_path / "broken.onnx", feed),
        lambda: qualcomm.write_dlc(tmp_path / "broken.onnx", tmp_path / "net.dlc"),
    ):
        with pytest.raises(qualcomm.UnsupportedOperatorError, match=r"'fc\.weight_Dequant"):
            call()
    assert set(tmp_path.iterdir()) == before


def test_wrong_inputs_are_named(tmp_path):
    sim, feed = networks.quantize(source("convnet"), (8, 8))
    path = tmp_path / "net.onnx"
    sim.export_qdq(path)
    (data,) = feed.values()
    for inputs, error, message in (
        ({}, qualcomm.UnknownNameError, "no value for input 'x'"),
        ({"z": data}, qualcomm.UnknownNameError, "no input 'z', expected x"),
        ({"x": data[0]}, qualcomm.InvalidArgumentError, "expected rank 4, got 3"),
        ({"x": data[:, :2]}, qualcomm.InvalidArgumentError, "axis 1: expected 3, got 2"),
        ({"x": data.astype(np.float64)}, qualcomm.InvalidArgumentError, "double"),
    ):
        with pytest.raises(error, match=message):
            qualcomm.run_on_htp(path, inputs)
    with pytest.raises(TypeError, match="mapping"):
        qualcomm.run_on_htp(path, data)
    with pytest.raises(qualcomm.FileAccessError, match="no_such"):
        qualcomm.run_on_htp(tmp_path / "no_such.onnx", feed)
    (tmp_path / "bad.onnx").write_bytes(b"\x08no model")
    with pytest.raises(qualcomm.MalformedFileError, match=r"bad\.onnx"):
        qualcomm.run_on_htp(tmp_path / "bad.onnx", feed)
