# SPDX-License-Identifier: Apache-2.0
# Models and comparisons of the Keras tests.
import keras
import numpy as np


def randomized(model: keras.Model, seed: int = 0) -> keras.Model:
    """Give batch norms and biases values other than those of a new model."""
    random = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        for weight in layer.weights if isinstance(layer, keras.layers.BatchNormalization) else ():
            low, high = (0.5, 1.5) if weight.name in ("gamma", "moving_variance") else (-0.2, 0.2)
            weight.assign(random.uniform(low, high, weight.shape))
    return model


#: Networks of keras.applications and the height and width that they run at: the least they take,
#: or 64, so that "same" padding is uneven somewhere.
APPLICATIONS = {
    "MobileNetV2": 64,
    "ResNet50": 64,
    "EfficientNetV2B0": 64,
    "DenseNet121": 64,
    "InceptionV3": 75,
    "Xception": 71,
    "ConvNeXtTiny": 64,
}


def application(name: str) -> tuple[keras.Model, np.ndarray]:
    """Return a network of keras.applications and a batch for it."""
    keras.utils.set_random_seed(0)
    shape = (APPLICATIONS[name], APPLICATIONS[name], 3)
    make = getattr(keras.applications, name)
    model = make(weights=None, input_shape=shape, classes=50, classifier_activation=None)
    batch = np.random.default_rng(1).normal(0, 1, (2, *shape)).astype(np.float32)
    if name.startswith(("EfficientNet", "ConvNeXt")):
        batch = batch * 60 + 128
    return randomized(model), batch


def small() -> keras.Model:
    """Return a network with the kinds of layers that folding and equalization know."""
    layers = keras.layers
    x = source = keras.Input((16, 16, 3), name="picture")
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="conv1")(x)
    x = layers.BatchNormalization(name="bn1")(x)
    x = layers.ReLU(6.0, name="relu1")(x)
    x = layers.DepthwiseConv2D(3, strides=2, padding="same", use_bias=False, name="dw")(x)
    x = layers.BatchNormalization(name="bn2")(x)
    x = layers.ReLU(name="relu2")(x)
    y = layers.Conv2D(8, 1, name="conv2", activation="relu")(x)
    x = layers.Add(name="sum")([x, y])
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return randomized(keras.Model(source, layers.Dense(5, name="head")(x), name="small"))


def error_of_range(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference as a share of the range of what is expected."""
    assert actual.shape == expected.shape
    width = float(expected.max() - expected.min())
    return float(np.abs(actual - expected).max()) / max(width, 1e-12)
