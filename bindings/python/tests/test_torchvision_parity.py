# SPDX-License-Identifier: Apache-2.0
# Float results of whole networks agree with onnxruntime: as loaded, folded, equalized.
import numpy as np
import onnxruntime
import pytest
from support import torchvision_models
from support.environment import REPOSITORY

import halfstep

MODELS = REPOSITORY / ".build" / "models"


def expect_close(got: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Compare to a fraction of the expected output's range."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    span = float(expected.max() - expected.min())
    worst = float(np.abs(got - expected).max()) / span
    assert worst <= tolerance, f"largest difference is {worst:.2e} of the range"


@pytest.mark.parametrize("name", torchvision_models.MODELS)
def test_network_agrees_with_onnxruntime(name):
    path = torchvision_models.ensure(name, MODELS)
    feed = {torchvision_models.INPUT: torchvision_models.inputs(name, batch=2, seed=21)}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, feed)

    model = halfstep.Model.load(path)
    # 1e-4 of the range: the bound. Up to 121 layers of float32 sums of up to 4608 products
    # in another order; each is good to about 1e-6, and errors of layers add like a random walk.
    expect_close(model.run(feed)[torchvision_models.OUTPUT], expected, 1e-4)
    model.fold_batch_norms()
    expect_close(model.run(feed)[torchvision_models.OUTPUT], expected, 1e-4)
    model.equalize()
    expect_close(model.run(feed)[torchvision_models.OUTPUT], expected, 1e-4)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_model_of_the_default_exporter_agrees(name):
    """Batch norms already folded, ReduceMean for pooling, weights in an external file."""
    path = torchvision_models.ensure(name, MODELS, opset=20, exporter="dynamo")
    feed = {torchvision_models.INPUT: torchvision_models.inputs(name, batch=2, seed=23)}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, feed)
    model = halfstep.Model.load(path)
    expect_close(model.run(feed)[torchvision_models.OUTPUT], expected, 1e-4)
    model.equalize()
    expect_close(model.run(feed)[torchvision_models.OUTPUT], expected, 1e-4)


def test_batch_of_any_size_gives_the_same_rows():
    path = torchvision_models.ensure("mobilenet_v2", MODELS)
    pictures = torchvision_models.inputs("mobilenet_v2", batch=3, seed=22)
    model = halfstep.Model.load(path)
    together = model.run({torchvision_models.INPUT: pictures})[torchvision_models.OUTPUT]
    for index in range(3):
        (alone,) = model.run({torchvision_models.INPUT: pictures[index : index + 1]}).values()
        expect_close(alone[0], together[index], 1e-5)  # another batch may sum in another order
