# SPDX-License-Identifier: Apache-2.0
# The same network with the same weights gets the same encodings in Keras and in PyTorch.
import json
import os
import pathlib
import subprocess

import keras
import numpy as np
import onnx
import pytest
from keras import layers
from networks import randomized

import halfstep
from halfstep.keras import QuantizationSimModel, equalize_model, fold_all_batch_norms

#: An interpreter that has PyTorch; `make test-keras` names one.
TORCH_PYTHON = os.environ.get("HALFSTEP_TORCH_PYTHON")
SCRIPT = pathlib.Path(__file__).with_name("torch_encodings.py")

SETTINGS = {
    "plain": ("none", "min_max", 8, None),
    "folded": ("fold", "min_max", 8, None),
    "equalized": ("equalize", "sqnr", 8, "default"),
    "narrow": ("fold", "mse", 4, None),
}


def pictures() -> keras.Model:
    x = source = keras.Input((12, 12, 3), name="picture")
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="conv1")(x)
    x = layers.BatchNormalization(name="bn1")(x)
    x = layers.ReLU(6.0, name="relu1")(x)
    x = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="dw")(x)
    x = layers.BatchNormalization(name="bn2")(x)
    x = layers.ReLU(name="relu2")(x)
    y = layers.ReLU(name="relu3")(layers.Conv2D(8, 1, name="conv2")(x))
    x = layers.MaxPooling2D(2, name="pool")(layers.Add(name="sum")([x, y]))
    x = layers.Conv2DTranspose(6, 2, strides=2, name="up")(x)
    x = layers.GlobalAveragePooling2D(name="average")(x)
    return keras.Model(source, layers.Dense(5, name="head")(x))


def tokens() -> keras.Model:
    x = source = keras.Input((6, 12), name="tokens")
    y = layers.Activation("tanh", name="tanh")(layers.Dense(24, name="fc1")(x))
    y = layers.Dense(12, name="fc2")(layers.LayerNormalization(name="norm")(y))
    x = layers.Multiply(name="gated")([x, layers.Activation("sigmoid", name="sigmoid")(y)])
    return keras.Model(source, layers.Dense(4, name="head")(x))


NETWORKS = {"pictures": pictures, "tokens": tokens}
#: PyTorch's names of Keras's variables.
NAMES = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "bias": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def to_torch(layer, variable) -> np.ndarray:
    """Return a variable's value in PyTorch's layout."""
    value = variable.numpy()
    if isinstance(layer, layers.DepthwiseConv2D):
        return value.transpose(2, 3, 0, 1) if value.ndim == 4 else value
    if value.ndim == 4:  # of transposed convolutions Keras swaps the channels
        return value.transpose(3, 2, 0, 1)
    return value.T if value.ndim == 2 else value


def data(name: str, shape) -> np.ndarray:
    random = np.random.default_rng(len(name))
    return random.normal(0, 1, (16, *shape)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write weights and data, and let PyTorch's side export what it makes of them."""
    if not TORCH_PYTHON:
        pytest.skip("HALFSTEP_TORCH_PYTHON names no interpreter with PyTorch")
    path = tmp_path_factory.mktemp("torch")
    for name, make in NETWORKS.items():
        keras.utils.set_random_seed(0)
        model = randomized(make())
        values = {
            f"{layer.name}.{NAMES[variable.name]}": np.ascontiguousarray(to_torch(layer, variable))
            for layer in model.layers
            for variable in layer.weights
        }
        batch = data(name, model.input_shape[1:])
        turned = np.moveaxis(batch, -1, 1) if batch.ndim == 4 else batch
        np.savez(path / f"{name}.npz", data=np.ascontiguousarray(turned), **values)
    # PyTorch's environment may have a package of its own: this one is meant, and nothing beside it.
    (path / "package").mkdir()
    (path / "package" / "halfstep").symlink_to(pathlib.Path(halfstep.__file__).parent)
    environment = {**os.environ, "PYTHONPATH": str(path / "package")}
    done = subprocess.run(
        [TORCH_PYTHON, str(SCRIPT), str(path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return path


def exported(folder, prefix):
    """Return encodings of parameters by name, and of computed tensors in running order."""
    graph = onnx.load(folder / f"{prefix}.onnx").graph
    written = json.loads((folder / f"{prefix}.encodings").read_text())
    computed = {one["name"]: one for one in written["activation_encodings"]}
    order = [one.name for one in graph.input]
    order += [name for node in graph.node for name in node.output]
    assert computed.keys() <= set(order)
    parameters = {one["name"]: one for one in written["param_encodings"]}
    return parameters, [computed[name] for name in order if name in computed]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_encodings_equal_pytorchs(name, setting, folder, tmp_path):
    change, scheme, bits, config = SETTINGS[setting]
    keras.utils.set_random_seed(0)
    model = randomized(NETWORKS[name]())
    batch = data(name, model.input_shape[1:])
    if change == "fold":
        model, _ = fold_all_batch_norms(model)
    elif change == "equalize":
        model = equalize_model(model)
    sim = QuantizationSimModel(
        model, quant_scheme=scheme, default_param_bw=bits, config_file=config
    )
    sim.compute_encodings([batch[at : at + 4] for at in range(0, 16, 4)])
    sim.export(tmp_path, "ours")
    ours, theirs = exported(tmp_path, "ours"), exported(folder, f"{name}.{setting}")

    renamed = {}
    for key, one in ours[0].items():
        layer, variable = key.split("/")
        renamed[f"{layer}.{NAMES[variable]}"] = one
    assert renamed.keys() == theirs[0].keys()
    assert len(ours[1]) == len(theirs[1]) > 5
    pairs = [(key, renamed[key], theirs[0][key]) for key in renamed]
    pairs += [
        (f"#{i} {a['name']}", a, b)
        for i, (a, b) in enumerate(zip(*(ours[1], theirs[1]), strict=True))
    ]
    for key, a, b in pairs:
        for field in ("bw", "is_sym", "enc_type", "dtype"):
            assert a[field] == b[field], (key, field)
        assert a["offset"] == b["offset"], key
        np.testing.assert_allclose(a["scale"], b["scale"], rtol=1e-6, err_msg=key)
