# SPDX-License-Identifier: Apache-2.0
"""Records where AIMET puts quantizers in small graphs; see README.md."""

import json
import logging
import os
import re
import sys
import tempfile
import warnings

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

warnings.filterwarnings("ignore")
logging.disable(logging.CRITICAL)
from aimet_onnx.common.defs import qtype  # noqa: E402
from aimet_onnx.quantsim import QuantizationSimModel  # noqa: E402

random = np.random.default_rng(7)

# A line is `outputs = Op(inputs) key=value`; a constant is `name[shape]` for floats, `name:1,2` for
# integers, `name~0.5` for one float. A line that starts with `&` makes its constant a Constant node.
NETS = {
    "conv_relu": ["c = Conv(x, w[4,3,1,1], b[4])", "y = Relu(c)"],
    "conv_clip_conv": ["c = Conv(x, w[4,3,1,1])", "k = Clip(c, lo~0, hi~6)", "y = Conv(k, v[2,4,1,1])"],
    "depthwise_relu": ["c = Conv(x, w[3,1,3,3]) group=3 pads=1,1,1,1", "r = Relu(c)", "y = Conv(r, v[2,3,1,1])"],
    "depthwise_clip": ["c = Conv(x, w[3,1,3,3]) group=3", "y = Clip(c, lo~0, hi~6)"],
    "conv_branch": ["c = Conv(x, w[3,3,1,1])", "r = Relu(c)", "y = Add(c, r)"],
    "residual": ["c = Conv(x, w[3,3,1,1])", "a = Add(c, x)", "r = Relu(a)", "y = Conv(r, v[2,3,1,1])"],
    "conv_bn_relu": ["c = Conv(x, w[4,3,1,1])", "n = BatchNormalization(c, s[4], t[4], m[4], v+[4])", "y = Relu(n)"],
    "bn_first": ["n = BatchNormalization(x, s[3], t[3], m[3], v+[3])", "y = Conv(n, w[4,3,1,1])"],
    "grid": ["c = Conv(x, w[4,3,1,1])", "m = MaxPool(c) kernel_shape=2,2", "t = Transpose(m) perm=0,2,3,1", "f = Flatten(t)", "y = Gemm(f, g[196,5], h[5])"],
    "gemm_transb": ["f = Flatten(x)", "g = Gemm(f, w[5,192], b[5]) transB=1", "y = Relu(g)"],
    "concat": ["a = Conv(x, w[2,3,1,1])", "b = Conv(x, v[2,3,1,1])", "r = Relu(b)", "y = Concat(a, r) axis=1"],
    "concat_nested": ["a = Conv(x, w[2,3,1,1])", "b = Conv(x, v[2,3,1,1])", "d = Concat(a, b) axis=1", "e = Sigmoid(x)", "f = Concat(d, e) axis=1", "y = Conv(f, u[2,7,1,1])"],
    "concat_shared": ["a = Conv(x, w[3,3,1,1])", "b = Concat(a, x) axis=1", "c = Mul(a, a)", "d = Conv(b, u[3,6,1,1])", "y = Add(c, d)"],
    "concat_sigmoid": ["a = Sigmoid(x)", "b = Softmax(x) axis=1", "c = Concat(a, b) axis=1", "y = Conv(c, u[2,6,1,1])"],
    "concat_const": ["a = Conv(x, w[3,3,1,1])", "y = Concat(a, k[1,1,8,8]) axis=1"],
    "concat_through_grid": ["a = Conv(x, w[4,3,1,1])", "b = MaxPool(a) kernel_shape=2,2 strides=2,2", "c = Conv(x, v[4,3,2,2]) strides=2,2", "y = Concat(b, c) axis=1"],
    "pools": ["c = Conv(x, w[4,3,1,1])", "a = AveragePool(c) kernel_shape=2,2", "g = GlobalAveragePool(a)", "r = Reshape(g, s:1,4)", "y = Gemm(r, v[4,2])"],
    "resize": ["c = Conv(x, w[4,3,1,1])", "u = Resize(c, , z:f1,1,2,2) mode=nearest", "y = Conv(u, v[2,4,1,1])"],
    "relu_branch_constrained": ["c = Conv(x, w[3,1,3,3]) group=3 pads=1,1,1,1", "r = Relu(c)", "s = Sigmoid(c)", "y = Add(r, s)"],
    "constants": ["a = Add(x, k[3,1,1])", "m = Mul(a, j~0.5)", "d = Div(m, i[1])", "y = Conv(d, w[4,3,1,1])"],
    "constant_nodes": ["& k[3,1,1]", "a = Add(x, k)", "& w[4,3,1,1]", "y = Conv(a, w)"],
    "swish": ["c = Conv(x, w[4,3,1,1])", "s = Sigmoid(c)", "m = Mul(c, s)", "g = GlobalAveragePool(m)", "h = HardSigmoid(g)", "y = Mul(m, h)"],
    "hardswish": ["c = Conv(x, w[4,3,1,1])", "h = HardSwish(c)", "y = Conv(h, v[2,4,1,1])"],
    "prelu": ["c = Conv(x, w[4,3,1,1])", "p = PRelu(c, s[4,1,1])", "q = LeakyRelu(p) alpha=f0.1", "y = Conv(q, v[2,4,1,1])"],
    "conv_transpose": ["c = ConvTranspose(x, w[3,4,2,2]) strides=2,2", "r = Relu(c)", "d = ConvTranspose(r, v[4,2,2,2]) group=2", "y = Relu(d)"],
    "conv_transpose_depthwise": ["c = ConvTranspose(x, w[3,1,2,2]) group=3", "y = Relu(c)"],
    "linear": ["t = Transpose(x) perm=0,2,3,1", "m = MatMul(t, w[3,5])", "a = Add(m, b[5])", "r = Relu(a)", "n = MatMul(r, v[5,2])", "y = Add(c[2], n)"],
    "linear_transposed": ["t = Transpose(x) perm=0,2,3,1", "u = Transpose(w[5,3]) perm=1,0", "m = MatMul(t, u)", "y = Add(m, b[5])"],
    "matmul_no_bias": ["t = Transpose(x) perm=0,2,3,1", "m = MatMul(t, w[3,5])", "y = Relu(m)"],
    "attention": ["q = MatMul(x, w[8,8])", "k = MatMul(x, v[8,8])", "t = Transpose(k) perm=0,1,3,2", "s = MatMul(q, t)", "p = Softmax(s)", "y = MatMul(p, x)"],
    "layernorm_op": ["n = LayerNormalization(x, s[8], t[8])", "y = MatMul(n, w[8,4])"],
    "layernorm": ["m = ReduceMean(x) axes=-1", "c = Sub(x, m)", "q = Pow(c, e~2)", "v = ReduceMean(q) axes=-1", "a = Add(v, p~1e-5)", "r = Sqrt(a)", "d = Div(c, r)", "g = Mul(d, s[8])", "h = Add(g, t[8])", "y = MatMul(h, w[8,4])"],
    "rmsnorm": ["q = Mul(x, x)", "v = ReduceMean(q) axes=-1", "a = Add(v, p~1e-5)", "r = Sqrt(a)", "i = Reciprocal(r)", "d = Mul(x, i)", "g = Mul(d, s[8])", "y = MatMul(g, w[8,4])"],
    "instance_norm": ["n = InstanceNormalization(x, s[3], t[3])", "y = Relu(n)"],
    "shapes": ["c = Conv(x, w[4,3,1,1])", "s = Shape(c)", "e = Gather(s, i:0)", "f = Cast(e) to=1", "r = Reshape(c, s)", "y = Mul(r, f)"],
    "argmax": ["c = Conv(x, w[4,3,1,1])", "y = ArgMax(c) axis=1"],
    "split": ["c = Conv(x, w[4,3,1,1])", "a, b = Split(c) axis=1", "s = Sigmoid(b)", "y = Mul(a, s)"],
    "pad_slice": ["p = Pad(x, q:0,0,1,1,0,0,1,1)", "c = Conv(p, w[4,3,3,3])", "s = Slice(c, a:0, b:2, d:1)", "y = Relu(s)"],
    "identity_weight": ["i = Identity(w[4,3,1,1])", "c = Conv(x, i)", "y = Identity(c)"],
    "shared_weight": ["a = Conv(x, w[3,3,1,1])", "r = Relu(a)", "y = Conv(r, w)"],
    "dynamic_conv": ["a = Sigmoid(z)", "c = Conv(x, a)", "y = Relu(c)"],
    "where_erf": ["e = Erf(x)", "g = Greater(x, k~0)", "y = Where(g, e, j~1)"],
    "conv3d": ["r = Reshape(x, s:1,3,2,4,8)", "c = Conv(r, w[4,3,1,1,1])", "y = Relu(c)"],
    "two_outputs": ["c = Conv(x, w[4,3,1,1])", "y = Relu(c)", "y2 = Conv(y, v[2,4,1,1])"],
    "tanh_relu": ["t = Tanh(x)", "y = Relu(t)"],
    "conv_transpose_perm": ["c = Conv(x, w[4,3,1,1])", "t = Transpose(c) perm=0,2,3,1", "y = Relu(t)"],
}
EXTRA_INPUTS = {"dynamic_conv": ("z", [4, 3, 1, 1])}
RUNS = [("default_per_channel", 8, 8), ("default", 4, 16), ("htp_v73", 8, 8), ("htp_v73", 8, 16), ("htp_v66", 8, 16)]


def constant(token, initializers):
    """Adds the constant that a token describes, if it does, and returns its name."""
    if m := re.fullmatch(r"(\w+)(\+?)\[([\d,]*)\]", token):
        value = random.standard_normal([int(d) for d in m[3].split(",")]).astype(np.float32)
        value = np.abs(value) + 0.1 if m[2] else value
    elif m := re.fullmatch(r"(\w+):(f?)([-\d,.]+)", token):
        value = np.array([float(v) for v in m[3].split(",")], np.float32 if m[2] else np.int64)
    elif m := re.fullmatch(r"(\w+)~(.+)", token):
        value = np.float32(m[2])
    else:
        return token
    initializers[m[1]] = numpy_helper.from_array(np.asarray(value), m[1])
    return m[1]


def attribute(text):
    key, value = text.split("=")
    if value.startswith("f"):
        return key, float(value[1:])
    if value.lstrip("-").isdigit() and key not in ("axes",):
        return key, int(value)
    if re.fullmatch(r"[-\d,]+", value):
        return key, [int(v) for v in value.split(",")]
    return key, value


def model(name, lines):
    initializers, nodes = {}, []
    for line in lines:
        if line.startswith("&"):
            constants = {}
            output = constant(line[2:], constants)
            nodes.append(helper.make_node("Constant", [], [output], f"n{len(nodes)}", value=constants[output]))
            continue
        outputs, op, inputs, rest = re.fullmatch(r"(.+?) = (\w+)\((.*)\)(.*)", line).groups()
        inputs = re.split(r", ?(?![\d])", inputs)
        inputs = [constant(t.strip(), initializers) for t in inputs]
        nodes.append(helper.make_node(op, inputs, outputs.split(", "), f"n{len(nodes)}", **dict(map(attribute, rest.split()))))
    produced = {o for n in nodes for o in n.output}
    shape = [1, 1, 8, 8] if name in ("attention", "layernorm", "layernorm_op", "rmsnorm") else [1, 3, 8, 8]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    if name in EXTRA_INPUTS:
        inputs.append(helper.make_tensor_value_info(EXTRA_INPUTS[name][0], TensorProto.FLOAT, EXTRA_INPUTS[name][1]))
    kind = TensorProto.INT64 if name == "argmax" else TensorProto.FLOAT
    outputs = [helper.make_tensor_value_info(o, kind, None) for o in ("y", "y2") if o in produced]
    graph = helper.make_graph(nodes, name, inputs, outputs, list(initializers.values()))
    result = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    result.ir_version = 8
    return result


def placement(source, config, parameter_bits, activation_bits):
    copy = onnx.ModelProto()
    copy.CopyFrom(source)
    sim = QuantizationSimModel(
        copy, param_type=qtype.int(parameter_bits), activation_type=qtype.int(activation_bits),
        config_file=config)
    leaders, found = {}, {}
    for name, q in sim.qc_quantize_op_dict.items():
        if not q.enabled:
            continue
        axis = q.quant_info.channelAxis if q.quant_info.usePerChannelMode else None
        fixed = q._encoding_min_max_fixed_vals or (None, None)
        leader = leaders.setdefault(id(q), name)
        found[name] = (
            ("p" if name in sim.param_names else "a") + str(q.bitwidth)
            + ("s" if q.use_symmetric_encodings else "")
            + ("" if axis is None else f"/{axis}")
            + ("" if fixed == (None, None) else f"[{fixed[0]:g},{'' if fixed[1] is None else format(fixed[1], 'g')}]")
            + ("" if leader == name else f"={leader}")
        )
    return found


def config_path(name):
    if name != "default":
        return "default" if name == "default_per_channel" else name
    import aimet_onnx.common.quantsim_config as folder

    return os.path.join(list(folder.__path__)[0], "default_config.json")


def main():
    cases = []
    for name, lines in NETS.items():
        source = model(name, lines)
        case = {"name": name, "net": lines, "runs": []}
        for config, parameter_bits, activation_bits in RUNS:
            run = {"run": f"{config} {parameter_bits} {activation_bits}"}
            try:
                run["quantizers"] = placement(source, config_path(config), parameter_bits, activation_bits)
            except Exception as error:  # AIMET refuses some nets; the test knows which.
                run["error"] = f"{type(error).__name__}: {error}"[:200]
            case["runs"].append(run)
            print(name, config, run.get("error", len(run.get("quantizers", {}))), file=sys.stderr)
        cases.append(case)
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "placement.json"), "w") as file:
        file.write("[\n" + ",\n".join(json.dumps(c, separators=(",", ":")) for c in cases) + "\n]\n")


main()
