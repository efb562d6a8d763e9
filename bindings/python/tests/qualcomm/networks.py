# SPDX-License-Identifier: Apache-2.0
# Networks for the tests on Qualcomm's emulator, quantized and cut into layers.
"""Small networks with seeded weights, and QDQ models cut so that each layer runs alone."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper
from support import small_models

import halfstep

CONFIG = "htp_v73"


class _Builder:
    """Collects nodes and constants of a network."""

    def __init__(self, seed: int) -> None:
        self.nodes: list = []
        self.constants: dict[str, np.ndarray] = {}
        self._rng = np.random.default_rng(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * self._rng.standard_normal(shape)).astype(np.float32)

    def add(self, operator: str, inputs: list[str], output: str, **attributes) -> str:
        self.nodes.append(
            helper.make_node(operator, inputs, [output], name=f"{output}.node", **attributes)
        )
        return output

    def conv(self, name: str, data: str, k: int, c: int, size: int = 1, groups: int = 1, stride=1):
        fan = c // groups * size * size
        spread = np.exp(self.normal(k, 1, 1, 1, scale=0.5))
        self.constants[f"{name}.weight"] = (
            self.normal(k, c // groups, size, size, scale=fan**-0.5) * spread
        )
        self.constants[f"{name}.bias"] = self.normal(k, scale=0.3)
        return self.add(
            "Conv",
            [data, f"{name}.weight", f"{name}.bias"],
            name,
            pads=[size // 2] * 4,
            group=groups,
            strides=[stride, stride],
        )

    def relu6(self, data: str) -> str:
        self.constants |= {"zero": np.float32(0), "six": np.float32(6)}
        return self.add("Clip", [data, "zero", "six"], f"{data}.relu6")


def inverted_residual() -> onnx.ModelProto:
    """Return two blocks of MobileNetV2, the second with an Add; input ``[N, 8, 12, 12]``."""
    net = _Builder(1)
    data = "x"
    for at, c in enumerate((8, 6)):
        wide = net.relu6(net.conv(f"expand{at}", data, 24, c))
        deep = net.relu6(net.conv(f"depthwise{at}", wide, 24, 24, size=3, groups=24))
        narrow = net.conv(f"project{at}", deep, 6, 24)
        data = net.add("Add", [data, narrow], "sum") if at else narrow
    net.add("Relu", [data], "y")
    return small_models.model_of(net.nodes, net.constants, [("N", 8, 12, 12)], [("N", 6, 12, 12)])


def branches() -> onnx.ModelProto:
    """Return Conv, AveragePool and MaxPool side by side, Concat, Gemm; input ``[N, 4, 8, 8]``."""
    net = _Builder(2)
    stem = net.add("Relu", [net.conv("stem", "x", 8, 4, size=3)], "stem.relu")
    parts = [
        net.add("Relu", [net.conv("left", stem, 6, 8, stride=2)], "left.relu"),
        net.add("AveragePool", [stem], "average", kernel_shape=[2, 2], strides=[2, 2]),
        net.add("MaxPool", [stem], "largest", kernel_shape=[2, 2], strides=[2, 2]),
    ]
    joined = net.add("Concat", parts, "joined", axis=1)
    mixed = net.add("Relu", [net.conv("mix", joined, 8, 22)], "mix.relu")
    flat = net.add("Flatten", [mixed], "flat")
    net.constants |= {
        "fc.weight": net.normal(5, 128, scale=0.1),
        "fc.bias": net.normal(5, scale=0.3),
    }
    net.add("Gemm", [flat, "fc.weight", "fc.bias"], "y", transB=1)
    return small_models.model_of(net.nodes, net.constants, [("N", 4, 8, 8)], [("N", 5)])


def quantize(source, bits: tuple[int, int], seed: int = 31, rows: int = 4):
    """Return a calibrated simulation and inputs that lie on its input grid."""
    model = halfstep.Model.load(source)
    model.fold_batch_norms()
    (info,) = model.inputs
    shape = [rows if extent is None else extent for extent in info.shape]
    data = np.random.default_rng(seed).standard_normal(shape, np.float32)
    sim = halfstep.QuantizationSimModel(model, *bits, config=CONFIG)
    sim.compute_encodings([{info.name: data}], progress=False)
    (grid,) = [sim.encoding(q.tensor) for q in sim.quantizers if q.tensor == info.name]
    codes = np.rint(data / grid.scales[0]).clip(
        -grid.zero_points[0], 2 ** bits[1] - 1 - grid.zero_points[0]
    )
    return sim, {info.name: (codes * grid.scales[0]).astype(np.float32)}


def steps(sim) -> dict[str, float]:
    """Return the scale of every activation's grid, by tensor."""
    entries = sim.encodings("1.0.0")["activation_encodings"]
    return {entry["name"]: max(entry["scale"]) for entry in entries}


def cut(model: onnx.ModelProto, tensors: list[str]) -> onnx.ModelProto:
    """Cut a QDQ model at quantized tensors, so that each layer runs from given inputs.

    Readers of a tensor read a pair behind a new input ``<tensor>.given`` instead; what the layer
    computes, after its own pair, becomes the output ``<tensor>.computed``.
    """
    shapes = {
        v.name: v.type
        for v in onnx.shape_inference.infer_shapes(model, data_prop=True).graph.value_info
    } | {v.name: v.type for v in model.graph.output}
    nodes, given = [], {}
    for node in model.graph.node:
        node.input[:] = [given.get(name, name) for name in node.input]
        nodes.append(node)
        if node.op_type != "DequantizeLinear":
            continue
        quantize = next((n for n in nodes if list(n.output) == [node.input[0]]), None)
        name = next(
            (t for t in tensors if quantize and (quantize.input[0] == t or node.output[0] == t)),
            None,
        )
        if name is None:
            continue
        operands = list(node.input[1:])
        domain = node.domain
        kind = shapes[node.output[0]]
        nodes += [
            helper.make_node(
                "QuantizeLinear",
                [f"{name}.given", *operands],
                [f"{name}.codes"],
                name=f"{name}.q",
                domain=domain,
            ),
            helper.make_node(
                "DequantizeLinear",
                [f"{name}.codes", *operands],
                [f"{name}.read"],
                name=f"{name}.dq",
                domain=domain,
            ),
        ]
        given[node.output[0]] = f"{name}.read"
        node.output[0] = f"{name}.computed"
        for values, suffix in ((model.graph.input, "given"), (model.graph.output, "computed")):
            value = helper.make_tensor_value_info(f"{name}.{suffix}", TensorProto.FLOAT, None)
            value.type.CopyFrom(kind)
            values.append(value)
    # The network's outputs have no reader, so their new pairs and inputs go.
    for suffix in (".read", ".codes"):
        read = {name for node in nodes for name in node.input}
        nodes = [n for n in nodes if n.output[0] in read or not n.output[0].endswith(suffix)]
    read = {name for node in nodes for name in node.input}
    written = {name for node in nodes for name in node.output}
    for values, used in ((model.graph.input, read), (model.graph.output, written)):
        kept = [value for value in values if value.name in used]
        del values[:]
        values.extend(kept)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model
