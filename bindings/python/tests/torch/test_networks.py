# SPDX-License-Identifier: Apache-2.0
# Simulations of torchvision's networks equal the engine's and onnxruntime's, layer by layer.
import numpy as np
import onnx
import onnxruntime
import pytest

torch = pytest.importorskip("torch")

from support import torchvision_models  # noqa: E402

from halfstep.torch import QuantizationSimModel, fold_all_batch_norms  # noqa: E402

#: Networks, and the height and width that they run at: small, since every layer is compared.
NETWORKS = {
    "resnet18": 96,
    "mobilenet_v2": 96,
    "mobilenet_v3_small": 96,
    "efficientnet_b0": 96,
    "squeezenet1_1": 96,
    "densenet121": 64,
    "regnet_y_400mf": 96,
    "shufflenet_v2_x1_0": 96,
    "inception_v3": 128,
    "vit_b_16": 224,
    "swin_t": 64,
}


def build(name):
    if name in torchvision_models.MODELS:
        return torchvision_models.build(name)
    torch.manual_seed(7)
    model = getattr(torchvision_models._torchvision().models, name)(weights=None)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_equals_the_engine_and_onnxruntime(name, tmp_path, capsys):
    model = build(name)
    x = torch.from_numpy(torchvision_models.inputs("resnet18", 2, seed=9, size=NETWORKS[name]))
    if any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()):
        assert fold_all_batch_norms(model, x)
    sim = QuantizationSimModel(model, x, in_place=True)
    assert not sim._part.missing
    sim.compute_encodings(lambda module: module(x))
    engine = sim._engine(keeps_ranges=True)
    source = sim._network.exported.inputs[0]
    output = sim._network.exported.outputs[0]
    enabled = [q.tensor for q in engine.quantizers if q.is_enabled and not q.is_parameter]
    computed = [n for n in enabled if n in sim._part.watched and n != source]
    theirs = engine.run({source: x.numpy()}, extra_outputs=[n for n in computed if n != output])

    # Teacher forcing: each quantizer hands on what the engine's tensor holds, so that each layer of
    # the module computes from the engine's inputs; what it would have handed on is compared.
    got = {}
    for tensor in computed:
        quantizer = sim.quantizer(tensor)

        def forced(module, args, result, tensor=tensor):
            got[tensor] = result.numpy().copy()
            return torch.from_numpy(theirs[tensor].copy())

        quantizer.register_forward_hook(forced)
    sim.model.eval()
    with torch.no_grad():
        sim.model(x)
    moved = total = 0
    for tensor, ours in got.items():
        step = float(sim.quantizer(tensor).get_encoding()["scale"])
        off = np.rint(np.abs(ours - theirs[tensor]) / step)
        assert off.max() <= 1, tensor
        moved, total = moved + int((off == 1).sum()), total + off.size
    # As in test_qdq: sums in another order are up to 1e-6 of the range off, 255 steps a range.
    assert moved / total < 1e-3

    for tensor in computed:
        sim.quantizer(tensor)._forward_hooks.clear()
    with torch.no_grad():
        ours = sim.model(x).numpy()
    # An output that only rearranges values has the grid of the last tensor before it.
    last = output if output in computed else computed[-1]
    step = float(sim.quantizer(last).get_encoding()["scale"])
    whole = np.rint(np.abs(ours - theirs[output]) / step)
    sim.onnx.export(tmp_path / "q.onnx")
    onnx.checker.check_model(str(tmp_path / "q.onnx"))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        str(tmp_path / "q.onnx"), options, providers=["CPUExecutionProvider"]
    )
    runtime = np.rint(np.abs(ours - session.run(None, {source: x.numpy()})[0]) / step)
    with capsys.disabled():
        print(
            f"\n  {name}: layer by layer {moved / total:.2e} of {total} values one step off, none"
            f" more; to the engine end to end {(whole == 1).mean():.1%} one step,"
            f" {(whole > 1).mean():.1%} more (at most {whole.max():.0f}); to onnxruntime"
            f" {(runtime == 1).mean():.1%}, {(runtime > 1).mean():.1%} ({runtime.max():.0f})"
        )
