# SPDX-License-Identifier: Apache-2.0
# Rounding and bias correction of Keras models.
import numpy as np
import pytest
import tensorflow as tf
from networks import small

from halfstep.errors import EmptyStatisticsError, UnknownNameError
from halfstep.keras import (
    QuantizationSimModel,
    apply_adaround,
    apply_seq_mse,
    correct_bias,
    fold_all_batch_norms,
)


def noise(model, sim, batch):
    expected = model(batch).numpy()
    return float(((sim.model(batch).numpy() - expected) ** 2).sum() / (expected**2).sum())


@pytest.mark.parametrize("method", [apply_adaround, apply_seq_mse, correct_bias])
def test_rounding_returns_a_model_of_the_same_layers(method):
    model, _ = fold_all_batch_norms(small())
    before = [weight.numpy().copy() for weight in model.weights]
    data = np.random.default_rng(0).normal(0, 1, (64, 16, 16, 3)).astype(np.float32)
    rounded = method(model, data, param_bits=4)
    assert [one.name for one in rounded.model.layers] == [one.name for one in model.layers]
    assert {one.name for one in rounded.layers} == {"conv1", "dw", "conv2", "head"}
    assert all(map(np.array_equal, before, (weight.numpy() for weight in model.weights)))
    nearest = QuantizationSimModel(model, default_param_bw=4)
    nearest.compute_encodings(data)
    sim = QuantizationSimModel(rounded.model, default_param_bw=4)
    sim.compute_encodings(data)
    sim.load_encodings(rounded.encodings)
    if method is correct_bias:
        pairs = zip(model.weights, rounded.model.weights, strict=True)
        assert any((a.numpy() != b.numpy()).any() for a, b in pairs if a.name == "bias")
        return
    # Data that the methods have seen, and each layer is kept only if it does better.
    assert noise(model, sim, data) < noise(model, nearest, data)
    # The weights lie on the grids that came with them.
    for name in ("conv1", "dw", "conv2"):
        kernel = rounded.model.get_layer(name).get_weights()[0]
        layer = sim.model.get_layer(name)
        quantizer = layer.param_quantizers[0]
        np.testing.assert_allclose(quantizer(kernel).numpy(), kernel, rtol=2**-22, atol=0)


def test_the_scheme_and_configuration_are_the_callers():
    model, _ = fold_all_batch_norms(small())
    data = np.random.default_rng(0).standard_t(3, (32, 16, 16, 3)).astype(np.float32)
    for options in ({"quant_scheme": "tf_enhanced"}, {"config": "default"}):
        rounded = apply_adaround(model, data, **options)
        scheme = options.get("quant_scheme", "min_max")
        sim = QuantizationSimModel(
            rounded.model, scheme, default_param_bw=4, config_file=options.get("config")
        )
        sim.compute_encodings(data)
        # The encodings of activations are those that the simulation finds for itself.
        chosen = sim.quantizer("relu2").grid()
        sim.load_encodings(rounded.encodings)
        assert np.array_equal(sim.quantizer("relu2").grid(), chosen)
    plain = QuantizationSimModel(model, "min_max", default_param_bw=4)
    plain.compute_encodings(data)
    wide, narrow = (
        one.quantizer("picture").grid()[0]
        for one in (plain, QuantizationSimModel(model, "tf_enhanced", default_param_bw=4))
        if one is plain or one.compute_encodings(data) is None
    )
    assert narrow < wide
    with pytest.raises(UnknownNameError, match="quant_scheme 'none'"):
        apply_adaround(model, data, quant_scheme="none")


def test_datasets_give_what_arrays_give_and_errors_are_the_engines():
    model, _ = fold_all_batch_norms(small())
    data = np.random.default_rng(0).normal(0, 1, (16, 16, 16, 3)).astype(np.float32)
    dataset = tf.data.Dataset.from_tensor_slices((data, np.zeros(16))).batch(5)
    pair = [apply_adaround(model, one).model.get_weights() for one in (data, dataset)]
    assert all(map(np.array_equal, *pair))
    with pytest.raises(EmptyStatisticsError):
        apply_adaround(model, data[:0])
    with pytest.raises(EmptyStatisticsError, match="no batches"):
        apply_adaround(model, [])
    assert apply_adaround(model, data, activation_bits=None, percentile=99.9).layers
    with pytest.raises(UnknownNameError, match="'none'"):
        apply_adaround(model, data, method="none")
