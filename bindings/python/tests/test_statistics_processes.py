# SPDX-License-Identifier: Apache-2.0
# Calibration spread over processes: the same bytes, however the data is split, shuffled and cut.
import multiprocessing

import numpy as np
import pytest
from support import small_models, torchvision_models
from support.environment import REPOSITORY

import halfstep

SCHEMES = ("min_max", "sqnr", "percentile", "mse", "entropy")


def observe(content: bytes, scheme: str, batches: list[np.ndarray]) -> bytes:
    """What one process does: calibrate on its share, hand the statistics back."""
    sim = halfstep.QuantizationSimModel(
        halfstep.Model.load(content), quant_scheme=scheme, percentile=99.9
    )
    for batch in batches:
        sim.observe(batch)
    return sim.statistics()


def cut(data: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    return np.split(data, np.cumsum(sizes))[: len(sizes)]


def encodings_of(content: bytes, scheme: str, statistics: list[bytes]) -> bytes:
    sim = halfstep.QuantizationSimModel(
        halfstep.Model.load(content), quant_scheme=scheme, percentile=99.9
    )
    for part in statistics:
        sim.merge_statistics(part)
    sim.finish_calibration()
    return sim.encodings_json("2.0.0")


def expect_same(content: bytes, data: np.ndarray, splits: list[list[list[np.ndarray]]], scheme):
    """Each split lists, for each process, its batches."""
    alone = encodings_of(content, scheme, [observe(content, scheme, [data])])
    context = multiprocessing.get_context("spawn")
    for split in splits:
        with context.Pool(len(split)) as pool:
            jobs = [(content, scheme, batches) for batches in split]
            statistics = pool.starmap(observe, jobs)
        assert encodings_of(content, scheme, statistics) == alone
        assert encodings_of(content, scheme, statistics[::-1]) == alone


@pytest.mark.parametrize("scheme", SCHEMES)
def test_small_network(scheme):
    model = halfstep.Model.load(small_models.convnet().SerializeToString())
    model.fold_batch_norms()
    data = small_models.data(48)
    shuffled = data[np.random.default_rng(4).permutation(48)]
    splits = [
        [cut(data[:24], [24]), cut(data[24:], [5, 19])],
        [cut(shuffled[:31], [7, 7, 7, 7, 3]), cut(shuffled[31:], [1] * 17)],
    ]
    expect_same(model.to_bytes(), data, splits, scheme)


def test_real_network():
    path = torchvision_models.ensure("mobilenet_v3_small", REPOSITORY / ".build" / "models")
    model = halfstep.Model.load(path)
    model.fold_batch_norms()
    data = torchvision_models.inputs("mobilenet_v3_small", batch=10, seed=3)
    order = np.random.default_rng(5).permutation(10)
    splits = [[cut(data[order[:6]], [4, 2]), cut(data[order[6:]], [1, 3])]]
    expect_same(model.to_bytes(), data, splits, "sqnr")
