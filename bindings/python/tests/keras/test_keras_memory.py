# SPDX-License-Identifier: Apache-2.0
# The engine reads variables where they are, and no weight is held twice.
import subprocess
import sys

import keras
import numpy as np
import pytest

from halfstep.keras import QuantizationSimModel
from halfstep.keras._builder import memory_of
from halfstep.keras._network import Network

#: Prints by how many bytes the process's peak rises while ResNet50 is equalized, and its weights.
PEAK = """
import gc, sys
import keras, numpy as np
from keras import layers
from halfstep.keras import equalize_model, fold_all_batch_norms

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

change = equalize_model if sys.argv[1] == "equalize" else fold_all_batch_norms
# What is imported and started on the first call is no weight.
change(keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.BatchNormalization()]))
model = keras.applications.ResNet50(weights=None)
gc.collect()
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
result = change(model, in_place=sys.argv[2] == "in_place")
result = result[0] if isinstance(result, tuple) else result
new = {id(v) for v in result.weights} - {id(v) for v in model.weights}
print(
    status("VmHWM") - before,
    sum(4 * int(np.prod(v.shape)) for v in result.weights if id(v) in new),
)
"""


@pytest.mark.parametrize("how", ["copy", "in_place"])
@pytest.mark.parametrize("change", ["fold", "equalize"])
def test_the_peak_is_the_result_and_little_more(change, how, capsys):
    done = subprocess.run([sys.executable, "-c", PEAK, change, how], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, new = (int(word) / 1e6 for word in done.stdout.split())
    with capsys.disabled():
        print(
            f"\n  ResNet50, {change}, {how}: peak {peak:.0f} MB above the model, {new:.0f} MB new"
        )
    # In place, variables are the model's own: only the biases that folding adds are new (0.1 MB).
    assert how == "copy" or new < 1
    # Beside the model and what is new, the largest layer (9 MB) on its way from one to the other.
    assert peak < new + 20


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_variables_are_read_where_they_are():
    x = source = keras.Input((6, 6, 2))
    x = keras.layers.DepthwiseConv2D(3, depth_multiplier=2, name="dw")(x)
    x = keras.layers.Conv2D(3, 2, name="conv")(x)
    x = keras.layers.Dense(5, name="dense")(keras.layers.Flatten()(x))
    model = keras.Model(source, x)
    network = Network(model)
    for parameter in network.parameters.values():
        memory = memory_of(parameter.variable)
        assert address(memory) == address(memory_of(parameter.variable))
        assert address(parameter.constant()) == address(memory)  # kernels as strided views
        assert not memory.flags.writeable
    kernel = network.parameters["conv/kernel"].constant()
    assert kernel.shape == (3, 4, 2, 2)
    assert kernel.strides == (4, 12, 96, 48)
    # What is in ONNX's order already is not copied at all.
    dense = memory_of(model.get_layer("dense").kernel)
    assert address(network.bound().initializers["dense/kernel"]) == address(dense)


def test_a_value_that_was_read_does_not_change_with_its_variable():
    variable = keras.Variable(np.ones((64, 64), np.float32))
    seen = memory_of(variable)
    variable.assign_add(np.ones((64, 64), np.float32))
    keras.optimizers.SGD(1.0).apply_gradients([(keras.ops.ones((64, 64)), variable)])
    assert (seen == 1).all() and (memory_of(variable) == 1).all()
    variable.assign(np.zeros((64, 64), np.float32))
    assert (seen == 1).all() and (memory_of(variable) == 0).all()


def test_a_simulation_shares_weights_until_they_train():
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(64, name="a"), keras.layers.Dense(2, name="b")]
    )
    sim = QuantizationSimModel(model)
    sim.compute_encodings(np.ones((4, 8), np.float32))
    ours = sim.model.get_layer("a").layer.kernel
    assert address(memory_of(ours)) == address(memory_of(model.get_layer("a").kernel))
    before = model.get_layer("a").kernel.numpy()
    sim.model.compile("sgd", "mse")
    sim.model.fit(np.ones((4, 8), np.float32), np.ones((4, 2), np.float32), verbose=0)
    assert not np.array_equal(ours.numpy(), before)
    assert np.array_equal(model.get_layer("a").kernel.numpy(), before)
