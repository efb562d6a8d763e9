# SPDX-License-Identifier: Apache-2.0
# Small networks, made with the onnx package, that a test can reason about.
"""Networks of a few layers with seeded weights."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

INPUT = "x"
OUTPUT = "y"
SHAPE = (3, 8, 8)
CLASSES = 4


def convnet(seed: int = 0) -> onnx.ModelProto:
    """Return Conv-BN-ReLU, Conv-BN-ReLU, global average, Gemm; input ``[N, 3, 8, 8]``."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    constants = {
        "conv1.weight": normal(8, 3, 3, 3, scale=0.3) * np.exp(normal(8, 1, 1, 1)),
        "conv1.bias": normal(8, scale=0.1),
        "conv2.weight": normal(8, 8, 3, 3, scale=0.2),
        "conv2.bias": normal(8, scale=0.1),
        "fc.weight": normal(CLASSES, 8, scale=0.5),
        "fc.bias": normal(CLASSES, scale=0.1),
    }
    for name in ("bn1", "bn2"):
        constants |= {
            f"{name}.scale": np.exp(normal(8, scale=0.3)),
            f"{name}.bias": normal(8, scale=0.2),
            f"{name}.mean": normal(8, scale=0.2),
            f"{name}.var": np.exp(normal(8, scale=0.3)),
        }
    nodes = []
    data = INPUT
    for index in (1, 2):
        conv, norm = f"conv{index}", f"bn{index}"
        nodes += [
            helper.make_node(
                "Conv",
                [data, f"{conv}.weight", f"{conv}.bias"],
                [f"{conv}.out"],
                name=conv,
                pads=[1, 1, 1, 1],
            ),
            helper.make_node(
                "BatchNormalization",
                [f"{conv}.out", *(f"{norm}.{part}" for part in ("scale", "bias", "mean", "var"))],
                [f"{norm}.out"],
                name=norm,
            ),
            helper.make_node("Relu", [f"{norm}.out"], [f"relu{index}.out"], name=f"relu{index}"),
        ]
        data = f"relu{index}.out"
    nodes += [
        helper.make_node("GlobalAveragePool", [data], ["pool.out"], name="pool"),
        helper.make_node("Flatten", ["pool.out"], ["flat.out"], name="flatten"),
        helper.make_node(
            "Gemm", ["flat.out", "fc.weight", "fc.bias"], [OUTPUT], name="fc", transB=1
        ),
    ]
    return model_of(nodes, constants, [("N", *SHAPE)], [("N", CLASSES)])


def adder() -> onnx.ModelProto:
    """Return a network with two inputs ``a`` and ``b`` of shape ``[N, 4]``: ReLU(a + b)."""
    nodes = [
        helper.make_node("Add", ["a", "b"], ["sum"], name="add"),
        helper.make_node("Relu", ["sum"], [OUTPUT], name="relu"),
    ]
    return model_of(nodes, {}, [("N", 4), ("N", 4)], [("N", 4)], inputs=("a", "b"))


def unsupported() -> onnx.ModelProto:
    """Return a network with two operators that nobody runs."""
    nodes = [
        helper.make_node("Frobnicate", [INPUT], ["t"], name="first", domain="org.example"),
        helper.make_node("Defenestrate", ["t"], [OUTPUT], name="second", domain="org.example"),
    ]
    return model_of(nodes, {}, [("N", 4)], [("N", 4)], domains=("org.example",))


def model_of(
    nodes: list,
    constants: dict[str, np.ndarray],
    input_shapes: list[tuple],
    output_shapes: list[tuple],
    inputs: tuple[str, ...] = (INPUT,),
    outputs: tuple[str, ...] = (OUTPUT,),
    opset: int = 17,
    domains: tuple[str, ...] = (),
) -> onnx.ModelProto:
    """Return a checked model of nodes in running order."""

    def infos(names, shapes):
        return [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in zip(names, shapes, strict=True)
        ]

    graph = helper.make_graph(
        nodes,
        "test",
        infos(inputs, input_shapes),
        infos(outputs, output_shapes),
        [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    opsets += [helper.make_opsetid(domain, 1) for domain in domains]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model)
    return model


def data(count: int = 16, seed: int = 1) -> np.ndarray:
    """Return inputs of `convnet`, ``[count, 3, 8, 8]``."""
    return np.random.default_rng(seed).standard_normal((count, *SHAPE), np.float32)
