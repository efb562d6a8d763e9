# SPDX-License-Identifier: Apache-2.0
# Small inputs that ask for endless work or memory end in a result or an error.
import contextlib
import multiprocessing
import os
import signal

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import halfstep

#: Far more than any case takes, and far less than what it took before it was mended: for ever.
SECONDS = 60


def model(nodes, constants=(), inputs=(), kind=TensorProto.FLOAT):
    """Build a model whose output is y."""
    graph = helper.make_graph(
        nodes,
        "hostile",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs],
        [helper.make_tensor_value_info("y", kind, None)],
        list(constants),
    )
    return helper.make_model(
        graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)]
    ).SerializeToString()


def constant(name, value):
    return numpy_helper.from_array(np.asarray(value), name)


def empty(name, dims):
    return TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, raw_data=b"")


def in_child(work):
    """Run work in a child that an alarm ends; return its exit status, negative for a signal."""

    def body():
        signal.alarm(SECONDS)
        work()

    child = multiprocessing.get_context("fork").Process(target=body)
    child.start()
    child.join()
    return child.exitcode


def run(bytes_, inputs, want):
    """Return work that runs a model and compares the shape of its answer."""

    def work():
        halfstep.set_thread_count(1)
        (result,) = halfstep.Model.load(bytes_).run(inputs).values()
        assert result.shape == want

    return work


PICTURE = np.ones((1, 1, 3, 3), np.float32)


def window(op, kernel, pads, dilations=(1, 1)):
    node = helper.make_node(
        op, ["x"], ["y"], kernel_shape=kernel, pads=pads, dilations=list(dilations)
    )
    return model([node], inputs=["x"])


CASES = {
    # The number of elements does not fit an integer, on the side where there are none.
    "range far below its start": run(
        model(
            [helper.make_node("Range", ["a", "b", "c"], ["y"])],
            [constant(n, np.float32(v)) for n, v in zip("abc", (1e30, 0, 1), strict=True)],
        ),
        {},
        (0,),
    ),
    # 2⁴⁰ rows of nothing.
    "reduction of an empty tensor": run(
        model([helper.make_node("ReduceMax", ["x"], ["y"], axes=[0])], [empty("x", [1 << 40, 0])]),
        {},
        (1, 0),
    ),
    "gather from an empty tensor": run(
        model(
            [helper.make_node("Gather", ["x", "i"], ["y"], axis=1)],
            [empty("x", [1 << 40, 2, 0]), constant("i", np.zeros(3, np.int64))],
        ),
        {},
        (1 << 40, 3, 0),
    ),
    # 131,000² taps for each of nine results, nine of them on the picture.
    "pooling of padding": run(
        window("MaxPool", [131_000, 131_000], [65_499, 65_499, 65_500, 65_500]),
        {"x": PICTURE},
        (1, 1, 3, 3),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_small_model_ends(case):
    assert in_child(CASES[case]) == 0


@pytest.mark.parametrize("path", ["/dev/zero", "sparse"])
def test_files_without_end_are_refused(path, tmp_path):
    if path == "sparse":
        path = tmp_path / "sparse.onnx"
        path.touch()
        try:
            os.truncate(path, 1 << 43)
        except OSError:
            pytest.skip("no sparse files here")

    def work():
        for load in (halfstep.Model.load, lambda p: small().load_encodings(p)):
            with pytest.raises((halfstep.HalfstepError, MemoryError), match=str(path)):
                load(path)

    assert in_child(work) == 0


def small():
    """Return a simulation of one layer."""
    node = helper.make_node("Relu", ["x"], ["y"])
    return halfstep.QuantizationSimModel(halfstep.Model.load(model([node], inputs=["x"])))


def test_child_of_a_fork_can_use_threads():
    kernel = np.ones((64, 64, 3, 3), np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)
    network = halfstep.Model.load(model([node], [constant("w", kernel)], ["x"]))
    x = np.ones((4, 64, 56, 56), np.float32)
    before = halfstep.thread_count()
    halfstep.set_thread_count(2)
    try:
        want = network.run({"x": x})["y"]

        def work():
            assert np.array_equal(network.run({"x": x})["y"], want)

        assert in_child(work) == 0
        # The parent has let its threads go for the fork and starts new ones.
        assert np.array_equal(network.run({"x": x})["y"], want)
    finally:
        halfstep.set_thread_count(before)


#: Beyond every float.
HUGE = 10**400


def small_model():
    weight = constant("w", np.ones((4, 3, 1, 1), np.float32))
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv")
    return halfstep.Model.load(model([node], [weight], ["x"]))


def simulation():
    return halfstep.QuantizationSimModel(small_model())


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("param_bits", lambda: halfstep.QuantizationSimModel(small_model(), param_bits=HUGE)),
        (
            "activation_bits",
            lambda: halfstep.QuantizationSimModel(small_model(), activation_bits=-HUGE),
        ),
        (
            "percentile",
            lambda: halfstep.QuantizationSimModel(
                small_model(), quant_scheme="percentile", percentile=HUGE
            ),
        ),
        ("bits", lambda: simulation().set_precision("w", 1 << 40)),
        ("minimum", lambda: simulation().set_range("y", -HUGE, 1)),
        ("maximum", lambda: simulation().set_range("y", 0, HUGE)),
        (
            "batch_size",
            lambda: simulation().compute_encodings(
                {"x": np.ones((1, 3, 2, 2), np.float32)}, batch_size=HUGE
            ),
        ),
        ("max_iterations", lambda: small_model().equalize(max_iterations=1 << 31)),
        ("threads", lambda: halfstep.set_thread_count(HUGE)),
        ("bits", lambda: halfstep.fake_quantize([1.0], 1.0, 0, bits=HUGE)),
        (
            "block_size",
            lambda: halfstep.fake_quantize(
                np.ones((2, 2), np.float32), 1.0, 0, axis=0, block_axis=1, block_size=1 << 63
            ),
        ),
        ("axis", lambda: halfstep.fake_quantize(np.ones(2, np.float32), 1.0, 0, axis=1 << 31)),
    ],
)
def test_a_number_beyond_its_place_is_an_error_that_names_the_argument(name, call):
    with pytest.raises(halfstep.InvalidArgumentError, match=f"^'?{name}"):
        call()


EMPTY = {
    "Gemm, no inputs": ("Gemm", (0, 4), (8, 0)),
    "Gemm, no outputs": ("Gemm", (4, 0), (8, 4)),
    "MatMul, no inputs": ("MatMul", (0, 4), (8, 0)),
    "MatMul, no outputs": ("MatMul", (4, 0), (8, 4)),
    "Conv, no outputs": ("Conv", (0, 3, 3, 3), (8, 3, 6, 6)),
    "Conv, no inputs": ("Conv", (4, 0, 3, 3), (8, 0, 6, 6)),
    "Conv, no taps": ("Conv", (4, 3, 0, 3), (8, 3, 6, 6)),
}


@pytest.mark.parametrize("case", EMPTY)
def test_weights_without_elements_end_no_process(case):
    kind, weight, data = EMPTY[case]
    nodes = [helper.make_node(kind, ["x", "w"], ["y"], "layer")]
    bytes_ = model(nodes, [constant("w", np.zeros(weight, np.float32))], ["x"])
    inputs = {"x": np.ones(data, np.float32)}

    def work():
        net = halfstep.Model.load(bytes_)
        calls = [lambda: net.copy().adaround(None), lambda: net.copy().correct_biases(inputs)]
        for method in ("gram", "auto", "gradient", "sequential_mse"):
            for size in (None, 1):
                calls.append(
                    lambda method=method, size=size: net.copy().adaround(
                        inputs, method=method, block_size=size, iterations=5
                    )
                )
        for scheme in ("spatial_svd", "weight_svd", "channel_pruning"):
            for given in (None, inputs):
                calls.append(
                    lambda scheme=scheme, given=given: halfstep.ModelCompressor(
                        net, scheme, data=given
                    ).compress(0.5)
                )
        for call in calls:
            with contextlib.suppress(halfstep.HalfstepError):
                call()

    assert in_child(work) == 0
