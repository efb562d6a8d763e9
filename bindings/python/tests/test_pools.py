# SPDX-License-Identifier: Apache-2.0
# Greedy choice of ratios in pools of workers: the same scores, and clear refusals.
import functools
import importlib
import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

import halfstep


def score(x, expected, model):
    """Minus the squared distance of the outputs; can be pickled."""
    return -float(np.square(next(iter(model.run(x).values())) - expected).mean())


@pytest.fixture
def compressor(network):
    return halfstep.ModelCompressor(halfstep.Model.load(network), "weight_svd")


@pytest.fixture
def callback(network):
    x = np.random.default_rng(1).standard_normal((4, 3, 8, 8), np.float32)
    expected = next(iter(halfstep.Model.load(network).run(x).values()))
    return functools.partial(score, x, expected)


#: Starts Ray, and has a worker compute something.
PROBE = """
import ray
ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100 << 20)
assert ray.get(ray.remote(lambda: 2).remote(), timeout=40) == 2
"""


@pytest.fixture(scope="module")
def ray():
    """Ray on this machine, two workers."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install ray")
    # On some machines, such as those without a network interface, Ray waits for minutes.
    try:
        subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True, timeout=45)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"Ray does not start on this machine: {error}")
    # Workers find this file's functions by name.
    paths = [os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        runtime_env={"env_vars": variables},
    )
    yield ray
    ray.shutdown()


@pytest.fixture
def ray_pool(ray):
    pool = importlib.import_module("ray.util.multiprocessing").Pool(2)
    yield pool
    pool.terminate()


@contextmanager
def spawned_pool():
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        yield pool


@pytest.mark.parametrize(
    "open_pool",
    [
        lambda: ThreadPoolExecutor(2),
        lambda: ProcessPoolExecutor(2, multiprocessing.get_context("spawn")),
        # The engine has used its threads by now: children of a fork start their own.
        lambda: ProcessPoolExecutor(2, multiprocessing.get_context("fork")),
        spawned_pool,
        lambda: multiprocessing.pool.ThreadPool(2),
    ],
    ids=["threads", "processes", "forks", "multiprocessing", "thread-pool"],
)
def test_scores_do_not_depend_on_the_pool(compressor, callback, open_pool):
    scores = compressor.evaluate(callback, num_candidates=5)
    with open_pool() as pool:
        assert compressor.evaluate(callback, num_candidates=5, pool=pool) == scores


def test_scores_in_ray_are_the_same(compressor, callback, ray_pool):
    scores = compressor.evaluate(callback, num_candidates=5)
    assert compressor.evaluate(callback, num_candidates=5, pool=ray_pool) == scores
    ranks = compressor.select_greedy(0.7, scores)
    assert compressor.compress(ranks=ranks)[1].mac_ratio < 0.95


def test_pytorch_modules_are_scored_in_ray(ray_pool):
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from halfstep import torch as faces

    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.Flatten()
    ).eval()
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        callback = functools.partial(module_score, x, net(x))

    def run(**settings):
        kind = faces.SpatialSvdParameters
        mode = kind.AutoModeParams(faces.GreedySelectionParameters(0.75, 4), modules_to_ignore=[])
        _, stats = faces.ModelCompressor.compress_model(
            net,
            callback,
            1,
            (1, 3, 8, 8),
            faces.CompressionScheme.spatial_svd,
            faces.CostMetric.mac,
            kind(kind.Mode.auto, mode),
            **settings,
        )
        return stats.compression_ratio_selection_stats.eval_scores_dictionary

    assert run(executor=ray_pool) == run()


def module_score(x, expected, model, iterations, use_cuda):
    import torch

    with torch.no_grad():
        return -float(((model(x) - expected) ** 2).mean())


def test_what_ray_has_besides_is_refused(compressor, callback, ray):
    actors = ray.util.ActorPool([])
    with pytest.raises(
        halfstep.InvalidArgumentError,
        match="pool: got an ActorPool.*pass ray.util.multiprocessing.Pool",
    ):
        compressor.evaluate(callback, pool=actors)
    with pytest.raises(halfstep.InvalidArgumentError, match="pool: expected .*Pool, got ray"):
        compressor.evaluate(callback, pool=ray)
    remote = ray.remote(score)
    with pytest.raises(
        halfstep.InvalidArgumentError, match="eval_callback: expected a function, got a remote one"
    ):
        compressor.evaluate(remote)


class ActorPool:
    """Ray's interface, without Ray."""

    def submit(self, function, value):
        raise AssertionError("must not be called")

    def get_next(self):
        raise AssertionError("must not be called")


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (ActorPool(), "pool: got an ActorPool, .*pass ray.util.multiprocessing.Pool"),
        (ThreadPoolExecutor, "pool: expected a concurrent.futures.Executor, .*ThreadPoolExecutor"),
        (2, "pool: expected .*, got int"),
        (multiprocessing, "pool: expected .*, got multiprocessing"),
    ],
)
def test_what_is_no_pool_is_refused_before_the_work(compressor, pool, message):
    def callback(model):
        raise AssertionError("must not be called")

    with pytest.raises(halfstep.InvalidArgumentError, match=message):
        compressor.evaluate(callback, pool=pool)


def test_a_failing_callback_ends_the_evaluation(compressor, tmp_path):
    """Errors of workers come through, scores of whole layers before them are kept."""
    lock, calls = threading.Lock(), []

    def callback(model):
        with lock:
            calls.append(model)
            if len(calls) == 6:
                raise RuntimeError("the sixth")
        return 0.5

    path = tmp_path / "scores.json"
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="the sixth"):
        compressor.evaluate(callback, num_candidates=5, pool=pool, path=path)
    saved = halfstep.compression.load_scores(path)
    assert saved[compressor.layers[0].weight] == {0.2: 0.5, 0.4: 0.5, 0.6: 0.5, 0.8: 0.5}
    # Calls that nobody waits for any longer are not started.
    assert len(calls) < 4 * len(compressor.layers)
