# SPDX-License-Identifier: Apache-2.0
"""Writes the small network and its calibration data that the tests of the C interface use."""

import pathlib

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

generator = np.random.default_rng(20261123)
initializers = []


def constant(name: str, values: np.ndarray) -> str:
    initializers.append(numpy_helper.from_array(values.astype(np.float32), name))
    return name


def normal(name: str, *shape: int) -> str:
    # Channels of different magnitude, so that equalization has something to do.
    values = generator.normal(size=shape) * 2.0 ** generator.integers(-3, 3, (shape[0],) + (1,) * (len(shape) - 1))
    return constant(name, values)


def batch_norm(prefix: str, source: str, channels: int) -> onnx.NodeProto:
    return helper.make_node(
        "BatchNormalization",
        [
            source,
            constant(f"{prefix}.gamma", generator.uniform(0.5, 2, channels)),
            constant(f"{prefix}.beta", generator.normal(size=channels)),
            constant(f"{prefix}.mean", generator.normal(size=channels)),
            constant(f"{prefix}.variance", generator.uniform(0.5, 2, channels)),
        ],
        [prefix],
        name=prefix,
    )


nodes = [
    helper.make_node("Conv", ["input", normal("stem.weight", 8, 3, 3, 3)], ["stem"], name="stem", pads=[1, 1, 1, 1], strides=[2, 2]),
    batch_norm("stem_bn", "stem", 8),
    helper.make_node("Clip", ["stem_bn", constant("zero", np.array(0)), constant("six", np.array(6))], ["stem_act"], name="stem_act"),
    helper.make_node("Conv", ["stem_act", normal("depthwise.weight", 8, 1, 3, 3)], ["depthwise"], name="depthwise", pads=[1, 1, 1, 1], group=8),
    batch_norm("depthwise_bn", "depthwise", 8),
    helper.make_node("Relu", ["depthwise_bn"], ["depthwise_act"], name="depthwise_act"),
    helper.make_node("Conv", ["depthwise_act", normal("project.weight", 8, 8, 1, 1), normal("project.bias", 8)], ["project"], name="project"),
    batch_norm("project_bn", "project", 8),
    helper.make_node("Add", ["project_bn", "stem_act"], ["sum"], name="sum"),
    helper.make_node("GlobalAveragePool", ["sum"], ["pool"], name="pool"),
    helper.make_node("Flatten", ["pool"], ["flat"], name="flat"),
    helper.make_node("Gemm", ["flat", normal("classifier.weight", 4, 8), normal("classifier.bias", 4)], ["output"], name="classifier", transB=1),
]
graph = helper.make_graph(
    nodes,
    "small",
    [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 8, 8])],
    [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", 4])],
    initializers,
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="halfstep-tests")
onnx.checker.check_model(model)
folder = pathlib.Path(__file__).parent
onnx.save(model, folder / "small.onnx")
np.save(folder / "small.npy", generator.normal(size=(20, 3, 8, 8)).astype(np.float32))
