# SPDX-License-Identifier: Apache-2.0
# Folding the batch norms of trained simulations keeps codes and function; errors leave them alone.
import keras
import numpy as np
import pytest
from keras import layers
from networks import randomized, small

from halfstep.errors import InvalidStateError
from halfstep.keras import (
    QuantizationSimModel,
    fold_all_batch_norms_to_scale,
    reestimate_bn_stats,
)


def trained(**options) -> tuple[QuantizationSimModel, np.ndarray]:
    model = small()
    norm = model.get_layer("bn1")
    norm.gamma.assign(norm.gamma * np.where(np.arange(8) % 2, 1.0, -1.0))
    sim = QuantizationSimModel(model, default_param_bw=4, **options)
    batch = np.random.default_rng(0).normal(0, 1, (8, 16, 16, 3)).astype(np.float32)
    sim.compute_encodings(batch)
    sim.learn_ranges()
    sim.model.compile(keras.optimizers.Adam(1e-3), "mse")
    sim.model.fit(batch, model(batch).numpy(), epochs=2, verbose=0)
    reestimate_bn_stats(sim, [batch])
    return sim, batch


def codes(sim: QuantizationSimModel, name: str) -> np.ndarray:
    value = sim._parameters[name].variable.numpy()
    quantizer = sim.quantizer(name)
    return np.rint(quantizer(value).numpy() / quantizer.grid()[0])


def test_codes_and_function_stay():
    sim, batch = trained()
    before = {name: codes(sim, name) for name in ("conv1/kernel", "dw/kernel", "conv2/kernel")}
    signs = np.sign(sim._parameters["bn1/gamma"].variable.numpy())
    assert (signs < 0).any()
    expected = sim.model(batch, training=False).numpy()
    folds = fold_all_batch_norms_to_scale(sim)
    assert [(fold.layer, fold.batch_norm) for fold in folds] == [("conv1", "bn1"), ("dw", "bn2")]
    assert not any(isinstance(x, layers.BatchNormalization) for x in sim.model._flatten_layers())
    # Rounding twice moves a value on a border only.
    assert (codes(sim, "conv1/kernel") == before["conv1/kernel"] * signs).mean() > 0.99
    assert (codes(sim, "dw/kernel") == before["dw/kernel"]).mean() > 0.97
    assert np.array_equal(codes(sim, "conv2/kernel"), before["conv2/kernel"])
    step = sim.quantizer(sim._network.outputs[0]).grid()[0]
    off = np.rint(np.abs(sim.model(batch, training=False).numpy() - expected) / step)
    # Single codes inside may fall the other way, as float sums come in another order.
    assert off.max() <= 2 and (off == 0).mean() > 0.7
    # The engine's simulation of what is exported is the same network.
    engine = sim.engine().run(batch)[sim._network.outputs[0]]
    assert np.abs(engine - sim.model(batch, training=False).numpy()).max() <= 1.001 * step
    # Training can go on.
    sim.model.compile(keras.optimizers.Adam(1e-4), "mse")
    sim.model.fit(batch, expected, epochs=1, verbose=0)


def test_errors_leave_the_simulation():
    sim, batch = trained(config_file="default")
    expected = sim.model(batch, training=False).numpy()
    with pytest.raises(InvalidStateError, match="'conv1/kernel': one range serves"):
        fold_all_batch_norms_to_scale(sim)
    assert np.array_equal(sim.model(batch, training=False).numpy(), expected)
    sim, batch = trained()
    sim.quantizers["bn1/gamma"].enabled = True
    with pytest.raises(InvalidStateError, match="a parameter of batch norm 'bn1'"):
        fold_all_batch_norms_to_scale(sim)


def test_a_batch_norm_in_front_of_a_layer_is_named():
    x = source = keras.Input((4,))
    x = layers.Dense(3, name="behind")(layers.BatchNormalization(name="front")(x))
    sim = QuantizationSimModel(randomized(keras.Model(source, x)))
    sim.compute_encodings(np.random.default_rng(0).normal(0, 1, (8, 4)).astype(np.float32))
    with pytest.raises(InvalidStateError, match="'front' folds into layer 'behind'"):
        fold_all_batch_norms_to_scale(sim)
