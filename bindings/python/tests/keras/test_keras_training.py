# SPDX-License-Identifier: Apache-2.0
# `sim.model` in the user's own training: fit with callbacks and a pipeline, a loop of one's own.
import keras
import numpy as np
import tensorflow as tf
from networks import small

from halfstep.keras import QuantizationSimModel, fold_all_batch_norms

X = np.random.default_rng(0).normal(0, 1, (32, 16, 16, 3)).astype(np.float32)


def calibrated() -> tuple[QuantizationSimModel, np.ndarray]:
    model, _ = fold_all_batch_norms(small())
    sim = QuantizationSimModel(model, default_param_bw=4)
    sim.compute_encodings(X)
    sim.learn_ranges()
    return sim, model(X).numpy()


def pipeline(targets: np.ndarray) -> tf.data.Dataset:
    data = tf.data.Dataset.from_tensor_slices((X, targets))
    return data.shuffle(32, seed=1).batch(8).prefetch(1)


def test_fit_takes_pipelines_callbacks_and_optimizers(tmp_path):
    sim, targets = calibrated()
    seen = []
    rate = keras.optimizers.schedules.ExponentialDecay(2e-3, 4, 0.9)
    sim.model.compile(
        keras.optimizers.SGD(rate, momentum=0.9, clipnorm=1.0), "mse", metrics=["mae"]
    )
    first = sim.model.evaluate(pipeline(targets), verbose=0, return_dict=True)
    history = sim.model.fit(
        pipeline(targets),
        validation_data=(X, targets),
        epochs=6,
        verbose=0,
        callbacks=[
            keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", save_best_only=True),
            keras.callbacks.EarlyStopping(patience=6),
            keras.callbacks.CSVLogger(tmp_path / "log.csv"),
            keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(epoch)),
        ],
    ).history
    assert seen == list(range(6)) and len((tmp_path / "log.csv").read_text().splitlines()) == 7
    assert min(history["val_loss"]) < first["loss"]
    best = keras.models.load_model(tmp_path / "best.keras")
    assert np.isclose(best.evaluate(X, targets, verbose=0)[0], min(history["val_loss"]), rtol=1e-5)
    # The checkpoint goes on training, with its optimizer's state.
    best.fit(pipeline(targets), epochs=1, verbose=0)
    assert best.optimizer.iterations.numpy() % 4 == 0


def test_a_loop_of_ones_own_trains_in_tf_function():
    sim, targets = calibrated()
    optimizer = keras.optimizers.Adam(1e-3)
    optimizer.build(sim.model.trainable_variables)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(sim.model(x, training=True) - y))
        gradients = tape.gradient(loss, sim.model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, sim.model.trainable_variables, strict=True))
        return loss

    before = {name: one.grid()[0].copy() for name, one in sim.quantizers.items()}
    losses = [float(step(x, y)) for _ in range(8) for x, y in pipeline(targets)]
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    moved = [name for name, one in sim.quantizers.items() if (one.grid()[0] != before[name]).any()]
    assert "conv1/kernel" in moved and "relu1" in moved
    # Eagerly, in tf.function, by predict and in the engine it is the same trained network.
    outputs = sim.model(X, training=False).numpy()
    assert np.array_equal(tf.function(sim.model)(X, training=False).numpy(), outputs)
    # (predict sums batch by batch in another order.)
    name = sim._network.outputs[0]
    scale = sim.quantizer(name).grid()[0]
    assert np.abs(sim.model.predict(X, verbose=0) - outputs).max() <= 1.001 * scale
    assert np.abs(sim.engine().run(X)[name] - outputs).max() <= 1.001 * scale


def test_weights_move_between_simulations():
    sim, targets = calibrated()
    sim.model.compile("adam", "mse")
    sim.model.fit(X, targets, verbose=0)
    other = QuantizationSimModel(sim._original, default_param_bw=4)
    other.compute_encodings(X)
    other.model.set_weights(sim.model.get_weights())
    assert np.array_equal(other.model(X).numpy(), sim.model(X).numpy())
