# SPDX-License-Identifier: Apache-2.0
# The engine computes what Keras computes.
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers, ops
from networks import error_of_range, randomized

from halfstep.errors import InvalidArgumentError, UnsupportedOperatorError
from halfstep.keras._network import Network

# What the issue asks for. Both sides sum in float32 in different orders: over at most a few
# thousand terms a layer the error is some 1e-6 of the range.
TOLERANCE = 1e-4


def compare(model: keras.Model, *inputs: np.ndarray) -> None:
    network = Network(model)
    given = list(inputs) if len(inputs) > 1 else inputs[0]
    expected = keras.tree.flatten(model(given, training=False))
    actual = network.bound().run(dict(zip(network.inputs, inputs, strict=True)))
    for name, want in zip(network.outputs, expected, strict=True):
        assert error_of_range(actual[name], want.numpy()) < TOLERANCE


PICTURE, SIGNAL, VOLUME, TOKENS, VECTOR = (11, 13, 4), (15, 4), (7, 6, 5, 3), (6, 8), (12,)
CASES = [
    (PICTURE, lambda: layers.Conv2D(6, 3, strides=2, padding="same", activation="silu")),
    (PICTURE, lambda: layers.Conv2D(6, (2, 3), dilation_rate=2, padding="same")),
    (PICTURE, lambda: layers.Conv2D(8, 3, groups=2, use_bias=False, activation="softmax")),
    (SIGNAL, lambda: layers.Conv1D(6, 3, padding="causal", dilation_rate=2)),
    (SIGNAL, lambda: layers.Conv1D(6, 4, strides=3, padding="same", activation="tanh")),
    (VOLUME, lambda: layers.Conv3D(4, 3, strides=2, padding="same")),
    (PICTURE, lambda: layers.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=2)),
    (SIGNAL, lambda: layers.DepthwiseConv1D(3, padding="same", activation="relu")),
    (PICTURE, lambda: layers.SeparableConv2D(6, 3, padding="same", depth_multiplier=2)),
    (SIGNAL, lambda: layers.SeparableConv1D(6, 3, activation="relu")),
    (PICTURE, lambda: layers.Conv2DTranspose(5, 3, strides=2, padding="same")),
    (PICTURE, lambda: layers.Conv2DTranspose(5, 4, strides=3)),
    (PICTURE, lambda: layers.Conv2DTranspose(5, 2, strides=3, padding="same")),
    (PICTURE, lambda: layers.Conv2DTranspose(5, 3, dilation_rate=2, use_bias=False)),
    (SIGNAL, lambda: layers.Conv1DTranspose(5, 3, strides=2, padding="same")),
    (VOLUME, lambda: layers.Conv3DTranspose(4, 2, strides=2)),
    (PICTURE, lambda: layers.DepthwiseConv2D((3, 5), dilation_rate=(2, 1), padding="same")),
    (PICTURE, lambda: layers.Conv2D(6, (4, 2), strides=(2, 3), padding="same")),
    (VECTOR, lambda: layers.Dense(7, activation="gelu")),
    (PICTURE, lambda: layers.Dense(7, activation="softplus")),
    (PICTURE, lambda: layers.BatchNormalization(scale=False)),
    (VECTOR, lambda: layers.BatchNormalization(center=False)),
    (TOKENS, lambda: layers.LayerNormalization()),
    (TOKENS, lambda: layers.LayerNormalization(axis=(1, 2), center=False)),
    (PICTURE, lambda: layers.Normalization(mean=[0.1, 0.2, 0.3, 0.4], variance=[1, 2, 3, 4])),
    (PICTURE, lambda: layers.Rescaling(0.5, 1.5)),
    (PICTURE, lambda: layers.MaxPooling2D(3, strides=2, padding="same")),
    (PICTURE, lambda: layers.AveragePooling2D(3, strides=2, padding="same")),
    (SIGNAL, lambda: layers.MaxPooling1D(2)),
    (SIGNAL, lambda: layers.AveragePooling1D(3, padding="same")),
    (VOLUME, lambda: layers.MaxPooling3D(2)),
    (VOLUME, lambda: layers.AveragePooling3D(2)),
    (PICTURE, lambda: layers.GlobalMaxPooling2D()),
    (SIGNAL, lambda: layers.GlobalMaxPooling1D()),
    (VOLUME, lambda: layers.GlobalAveragePooling3D()),
    (VOLUME, lambda: layers.MaxPooling3D(3, strides=2, padding="same")),
    (VOLUME, lambda: layers.UpSampling3D((1, 2, 2))),
    (PICTURE, lambda: layers.Normalization(mean=[0.1] * 4, variance=[2.0] * 4, invert=True)),
    (PICTURE, lambda: layers.GlobalAveragePooling2D(keepdims=True)),
    (SIGNAL, lambda: layers.GlobalAveragePooling1D()),
    (PICTURE, lambda: layers.ZeroPadding2D(((1, 2), (3, 0)))),
    (SIGNAL, lambda: layers.ZeroPadding1D((1, 2))),
    (VOLUME, lambda: layers.ZeroPadding3D(1)),
    (PICTURE, lambda: layers.Cropping2D(((1, 2), (3, 0)))),
    (SIGNAL, lambda: layers.Cropping1D((1, 2))),
    (VOLUME, lambda: layers.Cropping3D(1)),
    (PICTURE, lambda: layers.UpSampling2D((2, 3))),
    (PICTURE, lambda: layers.UpSampling2D(2, interpolation="bilinear")),
    (SIGNAL, lambda: layers.UpSampling1D(2)),
    (PICTURE, lambda: layers.Resizing(20, 7)),
    (PICTURE, lambda: layers.Resizing(7, 29, interpolation="nearest")),
    (PICTURE, lambda: layers.ReLU(6.0)),
    (PICTURE, lambda: layers.ReLU(0.5, negative_slope=0.1)),
    (PICTURE, lambda: layers.LeakyReLU(0.3)),
    (PICTURE, lambda: layers.ELU(0.7)),
    (PICTURE, lambda: layers.PReLU("uniform", shared_axes=[1, 2])),
    (PICTURE, lambda: layers.Softmax()),
    (PICTURE, lambda: layers.Flatten()),
    (PICTURE, lambda: layers.Reshape((13, -1))),
    (VECTOR, lambda: layers.Reshape((1, 1, 12))),
    (PICTURE, lambda: layers.Permute((3, 1, 2))),
    (VECTOR, lambda: layers.RepeatVector(3)),
    (PICTURE, lambda: layers.Dropout(0.5)),
    (PICTURE, lambda: layers.RandomFlip()),
    (SIGNAL, lambda: layers.GlobalMaxPooling1D(keepdims=True)),
    (VOLUME, lambda: layers.GlobalMaxPooling3D()),
    ((12, 6, 4), lambda: layers.AdaptiveAveragePooling2D((3, 2))),
    ((12, 6, 4), lambda: layers.AdaptiveMaxPooling2D(6)),
    (SIGNAL, lambda: layers.AdaptiveAveragePooling1D(5)),
    (PICTURE, lambda: layers.LayerNormalization(axis=-1, scale=False)),
    (TOKENS, lambda: layers.LSTM(5, return_sequences=True)),
    (TOKENS, lambda: layers.GRU(5)),
]


@pytest.mark.parametrize(("shape", "make"), CASES)
def test_layers_give_the_same_outputs(shape, make):
    model = randomized(keras.Sequential([keras.Input(shape), make()]))
    batch = np.random.default_rng(0).normal(0, 1, (3, *shape)).astype(np.float32)
    compare(model, batch)


@pytest.mark.parametrize(
    "kind",
    "relu relu6 sigmoid tanh softmax log_softmax elu selu celu softplus softsign silu gelu mish"
    " hard_sigmoid hard_silu hard_tanh hard_shrink soft_shrink tanh_shrink exponential leaky_relu"
    " log_sigmoid linear sparse_plus sparse_sigmoid squareplus hard_swish swish".split(),
)
def test_activations_give_the_same_outputs(kind):
    body = [layers.Conv2D(4, 1), layers.Activation(kind)]
    model = keras.Sequential([keras.Input((5, 5, 3)), *body])
    compare(model, np.random.default_rng(0).normal(0, 3, (2, 5, 5, 3)).astype(np.float32))


@pytest.mark.parametrize(
    "merge", ["Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum", "Concatenate"]
)
def test_merging_layers_give_the_same_outputs(merge):
    one, two = keras.Input((5, 6, 3)), keras.Input((5, 6, 3))
    ends = [layers.Conv2D(3, 1)(one), two]
    model = keras.Model([one, two], getattr(layers, merge)()(ends))
    random = np.random.default_rng(0)
    compare(model, *(random.normal(0, 1, (2, 5, 6, 3)).astype(np.float32) for _ in range(2)))


def test_operations_between_layers_give_the_same_outputs():
    source = keras.Input((6, 8))
    x = layers.Dense(8)(source)
    x = ops.relu(x) * 2.0 + ops.sigmoid(source)
    x = x - ops.mean(x, axis=-1, keepdims=True)
    x = ops.concatenate([x[:, 1:4], ops.square(x[:, :2])], axis=1)
    x = ops.matmul(x, ops.transpose(x, (0, 2, 1))) / 3.0
    x = ops.clip(ops.reshape(x, (-1, 25)), -1.0, 2.0)
    model = keras.Model(source, x)
    compare(model, np.random.default_rng(0).normal(0, 1, (2, 6, 8)).astype(np.float32))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention_gives_the_same_outputs(dropout):
    one, two = keras.Input((6, 8)), keras.Input((5, 8))
    attention = layers.MultiHeadAttention(2, 4, value_dim=3, dropout=dropout)
    model = keras.Model([one, two], attention(one, two))
    random = np.random.default_rng(0)
    inputs = [random.normal(0, 1, (2, n, 8)).astype(np.float32) for n in (6, 5)]
    compare(model, *inputs)


def test_embedding_gives_the_same_outputs():
    source = keras.Input((7,), dtype="int32")
    model = keras.Model(source, layers.Embedding(10, 4)(source))
    compare(model, np.random.default_rng(0).integers(0, 10, (3, 7)).astype(np.int32))


def test_sizes_that_are_not_fixed_are_padded_as_tensorflow_does():
    source = keras.Input((None, None, 3))
    model = keras.Model(source, layers.Conv2D(4, 3, strides=2, padding="same")(source))
    for size in ((8, 9), (11, 6)):
        compare(model, np.random.default_rng(0).normal(0, 1, (1, *size, 3)).astype(np.float32))


def test_nested_models_and_shared_layers_keep_their_names():
    inner = keras.Sequential([keras.Input((8,)), layers.Dense(8, name="fc")], name="inner")
    source = keras.Input((8,))
    shared = layers.Dense(8, name="shared")
    model = keras.Model(source, shared(inner(shared(source))))
    network = Network(model)
    assert list(network.layers) == ["shared", "inner/fc", "shared:1"]
    assert list(network.parameters) == [
        "shared/kernel",
        "shared/bias",
        "inner/fc/kernel",
        "inner/fc/bias",
    ]
    compare(model, np.random.default_rng(0).normal(0, 1, (2, 8)).astype(np.float32))


def test_one_error_names_all_layers_that_cannot_be_described():
    source = keras.Input((6, 8))
    x = layers.ConvLSTM1D(4, 1, return_sequences=True, name="memory")(source[..., None])
    x = layers.GroupNormalization(2, name="groups")(x)
    with pytest.raises(
        UnsupportedOperatorError, match=r"'memory' \(ConvLSTM1D\).*'groups' \(GroupNormalization\)"
    ):
        Network(keras.Model(source, layers.Dense(2)(x)))


def test_subclassed_and_unbuilt_models_are_refused():
    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(UnsupportedOperatorError, match=r"'own' \(Own\) is a subclassed model"):
        Network(Own(name="own"))
    with pytest.raises(InvalidArgumentError, match="'raw' is not built"):
        Network(keras.Sequential([layers.Dense(2)], name="raw"))
    with pytest.raises(TypeError, match="expected a keras.Model, got int"):
        Network(3)


def test_importing_halfstep_does_not_import_tensorflow():
    code = "import halfstep, sys; print({'tensorflow', 'keras', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


class Custom(layers.Layer):
    def call(self, x):
        return x * 2.0


@pytest.mark.parametrize(
    ("shape", "make", "what"),
    [
        ((8, 6), lambda: Custom(name="odd"), r"\(Custom\): no such layer"),
        ((4, 9, 9), lambda: layers.MaxPooling2D(data_format="channels_first", name="odd"), "first"),
        ((8, 8, 4), lambda: layers.Conv2D(3, 1, dtype="mixed_float16", name="odd"), "float16"),
        ((8, 8, 4), lambda: layers.BatchNormalization(axis=1, name="odd"), "axis 1"),
        ((8, 8, 4), lambda: layers.Resizing(4, 4, "bicubic", name="odd"), "'bicubic'"),
        ((8,), lambda: layers.Embedding(5, 2, mask_zero=True, name="odd"), "mask_zero: masks are"),
        ((8, 6), lambda: layers.Masking(name="odd"), "masks are not simulated: cut or pad"),
        (
            (8, 6),
            lambda: layers.TimeDistributed(layers.Dense(3), name="odd"),
            "call the layer itself",
        ),
        ((8, 6), lambda: layers.Lambda(lambda x: x * 2, name="odd"), "functions of keras.ops"),
        ((8, 6), lambda: layers.RNN(layers.GRUCell(3), name="odd"), "LSTM and GRU"),
        ((8, 6), lambda: layers.Activation("sparsemax", name="odd"), "activation 'sparsemax'"),
        ((9, 9, 4), lambda: layers.AdaptiveMaxPooling2D(4, name="odd"), "windows of one size"),
        ((8, 8, 4), lambda: layers.ReLU(threshold=1.0, name="odd"), "threshold"),
        ((8, 6), lambda: layers.Softmax(axis=(1, 2), name="odd"), "several axes"),
        ((8, 6), lambda: layers.LayerNormalization(axis=1, name="odd"), "axis"),
        ((8, 8, 4), lambda: layers.Resizing(4, 4, antialias=True, name="odd"), "antialias"),
    ],
)
def test_errors_name_the_layer_and_what_is_wrong_with_it(shape, make, what):
    model = keras.Sequential([keras.Input(shape), make()])
    with pytest.raises(UnsupportedOperatorError, match=f"layer 'odd'.*{what}"):
        Network(model)
