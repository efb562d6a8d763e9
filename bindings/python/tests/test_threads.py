# SPDX-License-Identifier: Apache-2.0
# Several Python threads: the GIL is released, one handle is shared without harm.
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support import small_models

import halfstep


@pytest.fixture
def model(network):
    model = halfstep.Model.load(network)
    model.fold_batch_norms()
    return model


def progress_elsewhere(action) -> int:
    """Count what another thread gets done while `action` runs.

    The switch interval is set so high that the other thread advances only where the GIL is
    released, not where it is taken away.
    """
    count = 0
    stop = threading.Event()
    ready = threading.Event()

    def spin():
        nonlocal count
        ready.set()
        while not stop.is_set():
            count += 1
            time.sleep(0)  # lets go of the GIL, so that the main thread can go on

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=spin)
    thread.start()
    ready.wait()
    sys.setswitchinterval(1000)
    try:
        before = count
        action()
        return count - before
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()


def test_gil_is_released_while_running(model):
    x = small_models.data(4096)
    model.run(x[:1])
    assert progress_elsewhere(lambda: model.run(x)) > 10


def test_gil_is_released_while_calibrating(model):
    sim = halfstep.QuantizationSimModel(model, quant_scheme="sqnr")
    x = small_models.data(2048)
    assert progress_elsewhere(lambda: sim._handle.calibrate({"x": x}, 2048, None)) > 10


def test_gil_is_released_while_fake_quantizing():
    # Many calls, since a single one is over before the other thread gets a core: with 2 cores the
    # engine's threads take both.
    x = np.ones((64, 1024, 64), np.float32)
    out = np.empty_like(x)

    def quantize_often():
        for _ in range(100):
            halfstep.fake_quantize(x, 0.1, 0, out=out)

    assert progress_elsewhere(quantize_often) > 10


def test_held_gil_would_be_noticed():
    """The measure itself: an action that keeps the GIL lets the other thread do nothing."""
    assert progress_elsewhere(lambda: sum(range(3_000_000))) <= 1


def test_one_model_in_many_threads(model):
    x = small_models.data(16)
    expected = model.run(x)["y"]
    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(lambda _: model.run(x)["y"], range(64)):
            np.testing.assert_array_equal(result, expected)


def test_one_simulation_in_many_threads(model):
    sim = halfstep.QuantizationSimModel(model)
    x = small_models.data(16)
    sim.compute_encodings(x, progress=False)
    expected, encodings = sim.run(x)["y"], sim.encodings_json()

    def work(index: int):
        if index % 4 == 0:
            sim.compute_encodings([x], progress=False)
        elif index % 4 == 1:
            return sim.encodings_json() == encodings
        elif index % 4 == 2:
            return len(sim.quantizers) > 0 and sim.encoding("x").bits == 8
        return np.array_equal(sim.run(x)["y"], expected)

    with ThreadPoolExecutor(8) as pool:
        assert all(result in (True, None) for result in pool.map(work, range(64)))
    assert sim.encodings_json() == encodings


def test_models_in_parallel(network):
    x = small_models.data(8)

    def work(_):
        own = halfstep.Model.load(network)
        own.fold_batch_norms()
        own.equalize()
        return own.run(x)["y"]

    with ThreadPoolExecutor(4) as pool:
        first, *rest = pool.map(work, range(16))
    for other in rest:
        np.testing.assert_array_equal(first, other)


def test_using_an_object_in_its_own_callback_is_an_error_not_a_deadlock(model):
    sim = halfstep.QuantizationSimModel(model)

    def progress(completed, total):
        sim.run(small_models.data(1))

    with pytest.raises(halfstep.InvalidStateError, match="callback"):
        sim.compute_encodings(small_models.data(), progress=progress)
    sim.compute_encodings(small_models.data(), progress=False)


def test_ctrl_c_ends_a_calibration(model):
    """A signal that arrives while the library works is seen after the batch."""
    sim = halfstep.QuantizationSimModel(model)
    sim.compute_encodings(small_models.data(), progress=False)
    before = sim.encodings_json()
    timer = threading.Timer(0.05, lambda: signal.raise_signal(signal.SIGINT))
    started = time.perf_counter()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        while time.perf_counter() - started < 30:
            sim.compute_encodings(small_models.data(2048), progress=False, batch_size=1)
    timer.join()
    assert sim.encodings_json() == before or time.perf_counter() - started < 30


def test_thread_count():
    before = halfstep.thread_count()
    assert before >= 1
    try:
        halfstep.set_thread_count(1)
        assert halfstep.thread_count() == 1
        with pytest.raises(halfstep.InvalidArgumentError, match="-1"):
            halfstep.set_thread_count(-1)
    finally:
        halfstep.set_thread_count(0)
    assert halfstep.thread_count() == before
