# SPDX-License-Identifier: Apache-2.0
# Nothing leaks: not results, not handles, not what failed calls had taken.
import gc
import os

import numpy as np
import pytest
from support import small_models

import halfstep


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(action, repeats: int) -> int:
    """Bytes by which the process grows over `repeats` calls, after some to warm up."""
    for _ in range(repeats // 4):
        action()
    gc.collect()
    before = resident_bytes()
    for _ in range(repeats):
        action()
    gc.collect()
    return resident_bytes() - before


@pytest.fixture(scope="module")
def calibrated(network):
    model = halfstep.Model.load(network)
    model.fold_batch_norms()
    sim = halfstep.QuantizationSimModel(model)
    sim.compute_encodings(small_models.data(), progress=False)
    return sim


def run(sim, network):
    sim.run(small_models.data(64), extra_outputs=["relu1.out"])  # 64 x 8 x 8 x 8 floats: 128 KB


def run_in_float(sim, network):
    sim.model.run(small_models.data(64), extra_outputs=["relu1.out"])


def handles(sim, network):
    model = halfstep.Model.load(network)
    model.fold_batch_norms()
    model.equalize()
    assert model.inspect() and model.initializers and model.inputs and model.to_bytes()
    halfstep.QuantizationSimModel(model).quantizers  # noqa: B018


def failures(sim, network):
    x = small_models.data(64)
    for bad in ({"x": x, "z": x}, {"x": x.astype(np.float64)}, {"x": x[:, :2]}, {"x": "no"}):
        with pytest.raises(halfstep.HalfstepError):
            sim.run(bad)
    with pytest.raises(halfstep.HalfstepError):
        halfstep.Model.load(network[:-100])
    with pytest.raises(ZeroDivisionError):
        sim.compute_encodings(x, progress=lambda *_: 1 / 0, batch_size=32)


def files(sim, network):
    sim.load_encodings(sim.encodings_json())
    sim.statistics()


@pytest.mark.parametrize("action", [run, run_in_float, handles, failures, files])
def test_repetition_does_not_grow_the_process(action, calibrated, network):
    # A leaked result or input would be at least 20 KB a call, 4 MB in all; allocators keep less.
    assert growth(lambda: action(calibrated, network), 200) < 3e6
