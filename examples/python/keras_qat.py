# SPDX-License-Identifier: Apache-2.0
# Trains a small Keras network on Fashion-MNIST, quantizes it, trains it again with quantization.
"""Quantization-aware training in Keras from beginning to end, on real data, in a few CPU minutes.

Trains a small MobileNetV2-style network on the 60,000 pictures of Fashion-MNIST, folds its batch
norms, simulates 8-bit and 4-bit weights, trains the 4-bit simulation for up to two epochs (weights
and ranges) with `fit`, prints the accuracies on all 10,000 test pictures, exports the result, and
checks that onnxruntime computes what the simulation computes.

The pictures come from Debian's package ``dataset-fashion-mnist``. From a shell::

    apt-get install dataset-fashion-mnist
    pip install tensorflow-cpu keras onnx onnxruntime
    python keras_qat.py --out .build/keras-qat
"""

from __future__ import annotations

import argparse
import gzip
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from halfstep.keras import QuantizationSimModel, fold_all_batch_norms

tf.get_logger().setLevel("ERROR")
DATA = Path("/usr/share/datasets/fashion-mnist")
MEAN, DEVIATION = 0.2860, 0.3530  # of the training pictures, scaled to 0...1
CALIBRATION = 512  # pictures that ranges are measured on
BATCH = 128

# --- data --------------------------------------------------------------------------------------

Data = tuple[np.ndarray, np.ndarray]


def read_idx(path: Path) -> np.ndarray:
    """Return the bytes of an IDX file: a big-endian header, then uint8 values."""
    data = gzip.decompress(path.read_bytes())
    rank = data[3]
    shape = np.frombuffer(data, ">i4", rank, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def load(folder: Path, part: str) -> Data:
    """Return pictures ``[N, 28, 28, 1]``, normalized, and their classes ``[N]``."""
    pictures = read_idx(folder / f"{part}-images-idx3-ubyte.gz").astype(np.float32) / 255
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz").astype(np.int32)
    return (pictures[..., None] - MEAN) / DEVIATION, labels


def batches(data: Data) -> tf.data.Dataset:
    """Return batches for training: shuffled, flipped at random, with classes one-hot."""

    def prepare(pictures: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        flips = tf.random.uniform([tf.shape(pictures)[0], 1, 1, 1], seed=2) < 0.5
        return tf.where(flips, tf.reverse(pictures, [2]), pictures), tf.one_hot(labels, 10)

    source = tf.data.Dataset.from_tensor_slices(data)
    return source.shuffle(len(data[0]), seed=1).batch(BATCH).map(prepare).prefetch(2)


# --- network -----------------------------------------------------------------------------------


def norm(name: str) -> layers.BatchNormalization:
    """Return a batch norm whose statistics are settled after some dozens of batches."""
    return layers.BatchNormalization(momentum=0.9, name=name)


def inverted_residual(x: keras.KerasTensor, name: str, outputs: int, stride: int = 1):
    """Add MobileNetV2's block (Sandler et al., 2018, arXiv:1801.04381), expanding four times."""
    inputs = x.shape[-1]
    y = layers.Conv2D(4 * inputs, 1, use_bias=False, name=f"{name}_expand")(x)
    y = norm(f"{name}_expand_bn")(y)
    y = layers.ReLU(6.0, name=f"{name}_expand_relu")(y)
    y = layers.DepthwiseConv2D(
        # Keras's default takes the channels for inputs of each sum and starts far too small.
        3,
        stride,
        "same",
        use_bias=False,
        depthwise_initializer=keras.initializers.RandomUniform(-1 / 3, 1 / 3),
        name=f"{name}_depthwise",
    )(y)
    y = norm(f"{name}_depthwise_bn")(y)
    y = layers.ReLU(6.0, name=f"{name}_depthwise_relu")(y)
    y = layers.Conv2D(outputs, 1, use_bias=False, name=f"{name}_project")(y)
    y = norm(f"{name}_project_bn")(y)
    return layers.Add(name=f"{name}_sum")([x, y]) if stride == 1 and inputs == outputs else y


def network() -> keras.Model:
    """Return a small MobileNetV2: logits ``[N, 10]`` of pictures ``[N, 28, 28, 1]``."""
    source = keras.Input((28, 28, 1), name="pictures")
    x = layers.Conv2D(16, 3, 2, "same", use_bias=False, name="stem")(source)
    x = norm("stem_bn")(x)
    x = layers.ReLU(6.0, name="stem_relu")(x)
    for index, (outputs, stride) in enumerate([(24, 1), (24, 1), (40, 2), (40, 1), (64, 1)], 1):
        x = inverted_residual(x, f"block{index}", outputs, stride)
    x = layers.Conv2D(160, 1, use_bias=False, name="top")(x)
    x = norm("top_bn")(x)
    x = layers.ReLU(6.0, name="top_relu")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(source, layers.Dense(10, name="logits")(x), name="fashion")


# --- training ----------------------------------------------------------------------------------


def train(
    model: keras.Model, data: Data, epochs: int, peak: float, weight_decay: float | None = None
) -> None:
    """Train with `fit`, the learning rate falling from its peak to zero after a short rise."""
    steps = epochs * -(-len(data[0]) // BATCH)
    rise = steps // 5
    rate = keras.optimizers.schedules.CosineDecay(
        peak / 25, steps - rise, warmup_target=peak, warmup_steps=rise
    )
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.05)
    model.compile(keras.optimizers.Adam(rate, weight_decay=weight_decay), loss)
    start = time.perf_counter()
    history = model.fit(batches(data), epochs=epochs, shuffle=False, verbose=0).history["loss"]
    seconds = time.perf_counter() - start
    print(f"  {epochs} epochs: loss {history[-1]:.4f}, {seconds:.0f} s", flush=True)


def logits_of(model: keras.Model, pictures: np.ndarray) -> np.ndarray:
    """Return what a model makes of pictures, ``[N, 10]``."""
    return model.predict(pictures, batch_size=500, verbose=0)


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of pictures whose class is right."""
    return float((logits.argmax(1) == labels).mean())


# --- quantization ------------------------------------------------------------------------------


def simulate(model: keras.Model, data: Data, weight_bits: int) -> QuantizationSimModel:
    """Return a calibrated simulation with the given weights and 8-bit activations."""
    sim = QuantizationSimModel(
        model, quant_scheme="tf_enhanced", default_param_bw=weight_bits, default_output_bw=8
    )
    sim.compute_encodings(data[0][:CALIBRATION], batch_size=64)
    return sim


def check_export(
    sim: QuantizationSimModel, path: Path, test: Data, expected: np.ndarray
) -> tuple[float, float, float]:
    """Run the exported network with QuantizeLinear nodes on all pictures in onnxruntime.

    Returns its accuracy with onnxruntime's integer kernels, and, computed node by node as written,
    the shares of logits that differ from the simulation by one step of their grid and by more. (A
    float sum in another order can move a value across a rounding border.)
    """
    import onnxruntime

    scales, _ = sim.quantizer("logits").grid()
    logits = []
    levels = onnxruntime.GraphOptimizationLevel
    for level in (levels.ORT_ENABLE_ALL, levels.ORT_DISABLE_ALL):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        parts = range(0, len(test[0]), 500)
        runs = [session.run(None, {"pictures": test[0][i : i + 500]})[0] for i in parts]
        logits.append(np.concatenate(runs))
    steps = np.abs(logits[1] - expected) / float(scales)
    one = float(((steps > 0.5) & (steps < 1.5)).mean())
    return accuracy(logits[0], test[1]), one, float((steps > 1.5).mean())


# --- program -----------------------------------------------------------------------------------


def main() -> None:
    """Train, quantize, print the table, export."""
    parser = argparse.ArgumentParser(description="Quantization-aware training on Fashion-MNIST")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four IDX files")
    parser.add_argument("--out", type=Path, default=Path("keras-qat"), help="folder for results")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of float training")
    parser.add_argument("--qat-epochs", type=int, default=2, help="epochs of quantized training")
    parser.add_argument("--quick", action="store_true", help="32 batches, to see that it works")
    arguments = parser.parse_args()
    if not (arguments.data / "train-images-idx3-ubyte.gz").is_file():
        sys.exit(f"keras_qat: no pictures in {arguments.data}; see --help")
    arguments.out.mkdir(parents=True, exist_ok=True)
    training, test = load(arguments.data, "train"), load(arguments.data, "t10k")
    if arguments.quick:
        training = (training[0][:4096], training[1][:4096])
        test = (test[0][:500], test[1][:500])
        arguments.epochs = arguments.qat_epochs = 1

    keras.utils.set_random_seed(0)
    saved = arguments.out / ("float-quick.keras" if arguments.quick else "float.keras")
    if saved.is_file():
        model = keras.models.load_model(saved)
        print(f"float network from {saved}")
    else:
        print("training in float")
        model = network()
        train(model, training, arguments.epochs, 4e-3, weight_decay=1e-2)
        model.save(saved)

    table = []

    def row(name: str, one: keras.Model) -> np.ndarray:
        logits = logits_of(one, test[0])
        table.append((name, accuracy(logits, test[1])))
        return logits

    row("FP32", model)
    folded, _ = fold_all_batch_norms(model)
    row("FP32, batch norms folded", folded)
    row("W8A8", simulate(folded, training, 8).model)
    sim = simulate(folded, training, 4)
    row("W4A8", sim.model)

    print("training W4A8: weights and ranges")
    sim.learn_ranges()
    train(sim.model, training, arguments.qat_epochs, 5e-4)
    expected = row(f"W4A8, {arguments.qat_epochs} epochs of QAT", sim.model)

    sim.export(arguments.out, "w4a8", qdq=True)
    exported, one, more = check_export(sim, arguments.out / "w4a8.qdq.onnx", test, expected)
    table.append(("the same in onnxruntime (QDQ)", exported))

    print(f"\n{'top-1 of ' + format(len(test[0]), ','):32}  {'':6}  less than FP32")
    for name, value in table:
        print(f"{name:32}  {value:.4f}  {100 * (table[0][1] - value):+.2f} points")
    print(f"\nlogits off by one step, node by node: {100 * one:.3f} %; by more: {100 * more:.3f} %")
    print(f"written to {arguments.out}: w4a8.keras, w4a8.onnx, w4a8.encodings, w4a8.qdq.onnx, ...")


if __name__ == "__main__":
    main()
