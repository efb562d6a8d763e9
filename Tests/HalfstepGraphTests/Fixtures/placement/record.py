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
    "lstm": ["h, g, c = LSTM(x, w[1,16,8], r[1,16,4], b[1,32], , i[1,1,4], j[1,1,4]) hidden_size=4", "q = Squeeze(h, a:1)", "m = Mul(g, c)", "y = MatMul(q, v[4,2])", "y2 = Sigmoid(m)"],
    "lstm_plain": ["s = Sigmoid(x)", "h = LSTM(s, w[1,16,8], r[1,16,4]) hidden_size=4", "q = Squeeze(h, a:1)", "k = LSTM(q, u[1,16,4], t[1,16,4]) hidden_size=4", "y = Tanh(k)"],
    "lstm_states": ["e = Sigmoid(z)", "f = Tanh(z)", "h, g, c = LSTM(x, w[1,16,8], r[1,16,4], , , e, f) hidden_size=4", "n = Add(g, c)", "y = Mul(h, h)", "y2 = Sigmoid(n)"],
    "gru": ["e = Sigmoid(z)", "h, g = GRU(x, w[1,12,8], r[1,12,4], b[1,24], , e) hidden_size=4", "y = Mul(h, h)", "y2 = Sigmoid(g)"],
    "gru_shared": ["s = Sigmoid(x)", "h, g = GRU(s, w[1,12,8], r[1,12,4]) hidden_size=4", "y = Mul(s, s)", "y2 = Mul(h, g)"],
    "rnn_fan": ["t = Transpose(x) perm=0,1,2", "h, g = RNN(t, w[1,4,8], r[1,4,4]) hidden_size=4", "k = RNN(t, u[1,4,8], v[1,4,4]) hidden_size=4", "y = Add(h, k)", "y2 = Sigmoid(g)"],
    "masked_softmax": ["l = ReduceMin(x, d:-1)", "a = Add(l, k~-20)", "w = Where(z, x, a)", "p = Softmax(w) axis=-1", "y = MatMul(p, x)"],
    "masked_softmax_axis": ["s = MatMul(x, u[8,8])", "l = ReduceMin(s, d:3)", "a = Add(l, k~-1000)", "w = Where(z, s, a)", "p = Softmax(w) axis=3", "y = MatMul(p, x)"],
    "masked_softmax_weak": ["l = ReduceMin(x, d:-1)", "a = Add(l, k~-19)", "w = Where(z, x, a)", "p = Softmax(w) axis=-1", "y = MatMul(p, x)"],
    "conv_transpose_perm": ["c = Conv(x, w[4,3,1,1])", "t = Transpose(c) perm=0,2,3,1", "y = Relu(t)"],
}
# A second input, where there is one: its type and shape.
MASK = (TensorProto.BOOL, [1, 1, 8, 8])
STATE = (TensorProto.FLOAT, [1, 1, 4])
EXTRA_INPUTS = {
    "dynamic_conv": (TensorProto.FLOAT, [4, 3, 1, 1]), "lstm_states": STATE, "gru": STATE,
    "masked_softmax": MASK, "masked_softmax_axis": MASK, "masked_softmax_weak": MASK,
}
# AIMET knows the pattern with axes as an input only.
OPSETS = {name: 18 for name in NETS if name.startswith("masked_")}
SQUARE = [1, 1, 8, 8]
SEQUENCE = [5, 1, 8]
SHAPES = {name: SQUARE for name in ("attention", "layernorm", "layernorm_op", "rmsnorm")}
SHAPES |= {name: SQUARE for name in NETS if name.startswith("masked_")}
SHAPES |= {name: SEQUENCE for name in NETS if re.match("lstm|gru|rnn", name)}
# Patterns that no built-in configuration names, added to one that is there.
PASSES = {"htp_v73+MaskedSoftmax": ("htp_v73", ["MaskedSoftmax"])}
RUNS = [("default_per_channel", 8, 8), ("default", 4, 16), ("htp_v73", 8, 8), ("htp_v73", 8, 16), ("htp_v66", 8, 16)]
MASKED_RUNS = [("htp_v73+MaskedSoftmax", 8, 8)]


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
    shape = SHAPES.get(name, [1, 3, 8, 8])
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    if name in EXTRA_INPUTS:
        inputs.append(helper.make_tensor_value_info("z", *EXTRA_INPUTS[name]))
    kind = TensorProto.INT64 if name == "argmax" else TensorProto.FLOAT
    outputs = [helper.make_tensor_value_info(o, kind, None) for o in ("y", "y2") if o in produced]
    graph = helper.make_graph(nodes, name, inputs, outputs, list(initializers.values()))
    result = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSETS.get(name, 17))])
    result.ir_version = 8
    # Its MaskedSoftmax wants to know that there are four axes.
    return onnx.shape_inference.infer_shapes(result) if name in OPSETS else result


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
    if name != "default" and name not in PASSES:
        return "default" if name == "default_per_channel" else name
    import aimet_onnx.common.quantsim_config as folder

    folder = list(folder.__path__)[0]
    if name not in PASSES:
        return os.path.join(folder, "default_config.json")
    base, passes = PASSES[name]
    with open(os.path.join(folder, f"htp_quantsim_config_{base.removeprefix('htp_')}.json")) as file:
        configuration = json.load(file)
    configuration["supergroup_pass_list"] += passes
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(configuration, file)
    return file.name


def main():
    cases = []
    for name, lines in NETS.items():
        source = model(name, lines)
        case = {"name": name, "net": lines, "runs": []}
        runs = RUNS + (MASKED_RUNS if name.startswith("masked_") else [])
        for config, parameter_bits, activation_bits in runs:
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
