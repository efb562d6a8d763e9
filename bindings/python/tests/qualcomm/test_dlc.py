# SPDX-License-Identifier: Apache-2.0
# The DLC that Qualcomm's converter writes holds the simulation's codes and grids.
import subprocess
import sys
import zipfile
import zlib
from struct import unpack_from

import networks
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support import small_models

import halfstep
from halfstep import qualcomm


def parts(path) -> dict[str, bytes]:
    """Return the archive's parts; their checksums are not set, so zipfile would refuse them."""
    raw = path.read_bytes()
    result = {}
    for info in zipfile.ZipFile(path).infolist():
        name, extra = unpack_from("<HH", raw, info.header_offset + 26)
        at = info.header_offset + 30 + name + extra
        data = raw[at : at + info.compress_size]
        result[info.filename] = zlib.decompress(data, -15) if info.compress_type else data
    return result


def has_scales(model: bytes, name: str, scales: np.ndarray) -> bool:
    """Whether the part ``model`` gives a tensor's channels these scales, in order.

    The part is a flatbuffer without a published schema. In front of a tensor's name stand tables,
    one a channel in reverse, that hold the scale and 12 bytes of links, one of them 8 more.
    """
    at = model.index(len(name).to_bytes(4, "little") + name.encode() + b"\0")
    words = iter(np.frombuffer(model[at - 16 * scales.size - 8 : at], "<f4")[::-1])
    return all(any(word == scale for word in words) for scale in scales)


@pytest.mark.parametrize("bits", [(8, 8), (8, 16)], ids=["w8a8", "w8a16"])
def test_dlc_holds_codes_and_grids(bits, tmp_path):
    sim, _ = networks.quantize(small_models.convnet().SerializeToString(), bits)
    sim.export_dlc(tmp_path / "net.dlc", batch_size=2)
    assert [file.name for file in tmp_path.iterdir()] == ["net.dlc"]
    dlc = parts(tmp_path / "net.dlc")
    assert {"dlc.metadata2.3.0", "model", "model.params", "model.params.bin"} <= set(dlc)
    model, codes = dlc["model"], dlc["model.params.bin"]

    # One grid: scale, and offset (minus the zero point) unless it is 0, stand before the name.
    activations = [q.tensor for q in sim.quantizers if not q.tensor.endswith(".weight")]
    assert len(activations) == 5
    for tensor in activations:
        grid = sim.encoding(tensor)
        words = grid.scales.astype("<f4").tobytes()
        if grid.zero_points[0]:
            words += (-grid.zero_points).astype("<i4").tobytes()
        names = [f"{tensor}_q", f"{tensor}_QuantizeLinear"]
        found = [words + len(n).to_bytes(4, "little") + n.encode() in model for n in names]
        assert any(found), tensor

    sim.export_qdq(tmp_path / "net.onnx", int32_bias=True, prequantize_constants=True)
    constants = {
        t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "net.onnx").graph.initializer
    }
    for layer in ("conv1", "conv2", "fc"):
        weight, bias = (constants[f"{layer}.{kind}_q"] for kind in ("weight", "bias"))
        # Qualcomm's layout is [H, W, C, K].
        stored = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight
        assert np.ascontiguousarray(stored).tobytes() in codes, layer
        assert bias.tobytes() in codes, layer
        scales = sim.encoding(f"{layer}.weight").scales
        assert has_scales(model, f"{layer}.weight_q", scales)
        assert not has_scales(model, f"{layer}.weight_q", np.nextafter(scales, 0))


def test_dlc_appears_whole_or_not_at_all(tmp_path):
    sim, _ = networks.quantize(small_models.convnet().SerializeToString(), (8, 8))
    with pytest.raises(qualcomm.FileAccessError, match="no_such"):
        sim.export_dlc(tmp_path / "no_such" / "net.dlc")
    with pytest.raises(qualcomm.InvalidArgumentError, match="batch_size"):
        sim.export_dlc(tmp_path / "net.dlc", batch_size=0)
    (tmp_path / "folder.dlc").mkdir()
    with pytest.raises(qualcomm.FileAccessError, match="folder"):
        sim.export_dlc(tmp_path / "folder.dlc")
    with pytest.raises(halfstep.InvalidStateError):
        halfstep.QuantizationSimModel(sim.model).export_dlc(tmp_path / "net.dlc")
    assert [file.name for file in tmp_path.iterdir()] == ["folder.dlc"]
    (tmp_path / "net.dlc").write_bytes(b"before")
    sim.export_dlc(tmp_path / "net.dlc")
    assert zipfile.is_zipfile(tmp_path / "net.dlc")


@pytest.mark.parametrize("module", ["onnxruntime", "onnxruntime_qnn"])
def test_without_provider_the_extra_is_named(module, tmp_path, monkeypatch):
    for name in ("onnxruntime", "onnxruntime_qnn"):
        text = f"raise ImportError('No module named {name}')" if name == module else ""
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    sim, feed = networks.quantize(small_models.convnet().SerializeToString(), (8, 8))
    sim.export_qdq(tmp_path / "net.onnx")
    for call in (
        lambda: sim.export_dlc(tmp_path / "net.dlc"),
        lambda: qualcomm.run_on_htp(tmp_path / "net.onnx", feed),
    ):
        with pytest.raises(qualcomm.PackageMissingError, match=rf"{module};.*halfstep\[qualcomm\]"):
            call()
    assert not (tmp_path / "net.dlc").exists()


def test_a_crash_is_an_exception_without_provider(tmp_path, monkeypatch):
    (tmp_path / "onnxruntime.py").write_text("import os\nos.kill(os.getpid(), 11)\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "net.onnx").write_bytes(b"")
    with pytest.raises(halfstep.InternalError, match="SIGSEGV"):
        qualcomm.write_dlc(tmp_path / "net.onnx", tmp_path / "net.dlc")


def test_import_is_light_without_provider():
    code = "import sys, halfstep.qualcomm; assert not {'onnxruntime', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
