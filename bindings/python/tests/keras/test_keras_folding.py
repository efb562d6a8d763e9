# SPDX-License-Identifier: Apache-2.0
# Folding and equalization of Keras models keep function and names.
import keras
import numpy as np
from keras import layers
from networks import error_of_range, randomized, small

from halfstep.keras import BoundedReLU, equalize_model, fold_all_batch_norms

# Both rewrite weights in float32 once or twice: some 1e-6 of the range; ten times that is room.
TOLERANCE = 1e-5


def test_fold_is_the_one_worked_by_hand():
    # y = gamma (w x + b - mean) / sqrt(variance + epsilon) + beta
    #   = 3 (2 x + 1 - 5) / 2 + 7 = 3 x + 1 with gamma 3, variance 4 - 0.001, mean 5, beta 7.
    norm = layers.BatchNormalization(name="norm")
    dense = layers.Dense(1, name="dense")
    model = keras.Sequential([keras.Input((1,)), dense, norm])
    dense.set_weights([np.array([[2.0]]), np.array([1.0])])
    norm.set_weights([np.array([value]) for value in (3.0, 7.0, 5.0, 3.999)])
    folded, folds = fold_all_batch_norms(model)
    assert [(fold.layer, fold.batch_norm) for fold in folds] == [("dense", "norm")]
    kernel, bias = folded.get_layer("dense").get_weights()
    # One rounding of each of at most four float32 operations.
    np.testing.assert_allclose((kernel[0, 0], bias[0]), (3.0, 1.0), rtol=4 * 2**-23, atol=1e-6)


def test_equalized_layers_have_balanced_ranges_and_bounds_by_channel():
    model = small()
    batch = np.random.default_rng(0).normal(0, 1, (4, 16, 16, 3)).astype(np.float32)
    equalized = equalize_model(model)
    assert isinstance(equalized.get_layer("relu1"), BoundedReLU)
    expected = model(batch, training=False).numpy()
    assert error_of_range(equalized(batch, training=False).numpy(), expected) < TOLERANCE

    def spread(net):
        kernel = np.abs(net.get_layer("dw").get_weights()[0]).max((0, 1, 3))
        return kernel.max() / kernel.min()

    folded, _ = fold_all_batch_norms(model)
    assert spread(equalized) < spread(folded)


def test_equalized_models_can_be_saved_and_equalized_again(tmp_path):
    model = equalize_model(small())
    batch = np.random.default_rng(0).normal(0, 1, (4, 16, 16, 3)).astype(np.float32)
    model.save(tmp_path / "net.keras")
    again = keras.models.load_model(tmp_path / "net.keras")
    expected = model(batch, training=False).numpy()
    assert np.array_equal(again(batch, training=False).numpy(), expected)
    twice = equalize_model(again)
    assert error_of_range(twice(batch, training=False).numpy(), expected) < TOLERANCE


def test_a_batch_norm_behind_a_shared_layer_gets_the_layer_cloned():
    shared = layers.Dense(4, name="shared")
    source = keras.Input((4,))
    plain = shared(source)
    normed = layers.BatchNormalization(name="norm")(shared(plain))
    model = randomized(keras.Model(source, [plain, normed]))
    batch = np.random.default_rng(0).normal(0, 1, (3, 4)).astype(np.float32)
    folded, folds = fold_all_batch_norms(model)
    assert len(folds) == 1
    for actual, expected in zip(folded(batch), model(batch), strict=True):
        assert error_of_range(actual.numpy(), expected.numpy()) < TOLERANCE
