# SPDX-License-Identifier: Apache-2.0
# halfstep.fake_quantize.
import numpy as np
import pytest

import halfstep

X = np.random.default_rng(0).standard_normal((4, 6, 5)).astype(np.float32) * 3


def reference(x, scale, zero_point, bits, signed, strict=False):
    """round(x · (1/scale)) half to even, clamped, and back; all in float32 as documented."""
    low = (-(2 ** (bits - 1)) if signed else 0) + strict
    high = 2**bits - 1 + (-(2 ** (bits - 1)) if signed else 0)
    inverse = np.float32(1) / np.float32(scale)
    codes = np.clip(np.rint(x * inverse), low - zero_point, high - zero_point)
    return (codes * np.float32(scale)).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 4, 8, 12, 16])
@pytest.mark.parametrize("signed", [False, True])
def test_per_tensor_equals_the_formula(bits, signed):
    zero_point = 0 if signed else 2 ** (bits - 1)
    scale = 6 / 2**bits
    got = halfstep.fake_quantize(X, scale, zero_point, bits, signed)
    np.testing.assert_array_equal(got, reference(X, scale, zero_point, bits, signed))


def test_ties_go_to_even():
    x = np.float32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    got = halfstep.fake_quantize(x, 1.0, 0, 8, signed=True)
    np.testing.assert_array_equal(got, [-2, -2, 0, 0, 2, 2])


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_per_channel_is_per_tensor_for_each_channel(axis):
    count = X.shape[axis]
    scales = np.linspace(0.01, 0.2, count).astype(np.float32)
    got = np.moveaxis(halfstep.fake_quantize(X, scales, 0, 8, True, axis=axis), axis, 0)
    for index, part in enumerate(np.moveaxis(X, axis, 0)):
        np.testing.assert_array_equal(got[index], reference(part, scales[index], 0, 8, True))


def test_per_block():
    scales = np.linspace(0.01, 0.2, 4 * 3).astype(np.float32)
    got = halfstep.fake_quantize(X, scales, 0, 4, True, axis=0, block_axis=1, block_size=2)
    for channel in range(4):
        for block in range(3):
            rows = slice(2 * block, 2 * block + 2)
            expected = reference(X[channel, rows], scales[3 * channel + block], 0, 4, True)
            np.testing.assert_array_equal(got[channel, rows], expected)


def test_strict_leaves_the_lowest_code_out():
    x = np.float32([-1000.0])
    assert halfstep.fake_quantize(x, 1.0, 0, 8, True)[0] == -128
    assert halfstep.fake_quantize(x, 1.0, 0, 8, True, strict=True)[0] == -127


@pytest.mark.parametrize("view", [X[::2], X[:, ::-1], X.T, np.asfortranarray(X)])
def test_any_layout_comes_in(view):
    got = halfstep.fake_quantize(view, 0.1, 3, 8)
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, reference(view, 0.1, 3, 8, False))


def test_out_is_used_and_may_be_the_input():
    expected = reference(X, 0.1, 0, 8, True)
    out = np.empty_like(X)
    assert halfstep.fake_quantize(X, 0.1, 0, 8, True, out=out) is out
    np.testing.assert_array_equal(out, expected)
    same = X.copy()
    assert halfstep.fake_quantize(same, 0.1, 0, 8, True, out=same) is same
    np.testing.assert_array_equal(same, expected)


def test_overlapping_out_is_no_trap():
    memory = np.concatenate([X.ravel(), np.zeros(1, np.float32)])
    expected = reference(X.ravel(), 0.1, 0, 8, True)
    halfstep.fake_quantize(memory[:-1], 0.1, 0, 8, True, out=memory[1:])
    np.testing.assert_array_equal(memory[1:], expected)


def test_empty_array():
    assert halfstep.fake_quantize(np.zeros((0, 3), np.float32), 1.0, 0).shape == (0, 3)


def test_error_is_at_most_half_a_step_inside_the_range():
    got = halfstep.fake_quantize(X, 0.25, 128, 8)
    # 2**-20: the rounding of the two products, for values below 2**5.
    assert np.abs(got - X).max() <= 0.125 + 2**-20


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"scale": 0.0}, ValueError),
        ({"scale": -1.0}, ValueError),
        ({"scale": float("nan")}, ValueError),
        ({"scale": float("inf")}, ValueError),
        ({"bits": 1}, ValueError),
        ({"bits": 40}, ValueError),
        ({"zero_point": 256}, ValueError),
        ({"zero_point": 2**40}, ValueError),
        ({"zero_point": 0.5}, TypeError),
        ({"zero_point": [0, 0]}, ValueError),
        ({"scale": [1.0, 2.0]}, ValueError),
        ({"scale": [1.0, 2.0], "axis": 0}, ValueError),
        ({"axis": 3}, ValueError),
        ({"array": X.astype(np.float64)}, TypeError),
        ({"array": ["a"]}, TypeError),
        ({"out": np.empty((2, 2), np.float32)}, ValueError),
        ({"out": np.empty(X.shape)}, TypeError),
        ({"out": "nothing"}, TypeError),
        ({"axis": 0, "block_axis": 1, "block_size": 0}, ValueError),
        ({"axis": 0, "block_axis": 0, "block_size": 2}, ValueError),
    ],
)
def test_wrong_arguments_are_refused(arguments, error):
    settings = {"array": X, "scale": 0.1, "zero_point": 0} | arguments
    with pytest.raises(error):
        halfstep.fake_quantize(settings.pop("array"), **settings)
