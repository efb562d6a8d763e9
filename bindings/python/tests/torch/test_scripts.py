# SPDX-License-Identifier: Apache-2.0
# Whole programs: one in AIMET's style, with its imports changed, and the example.
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("halfstep.torch.folding")

from support.environment import aimet_python

import halfstep
from halfstep.torch import load_checkpoint

HERE = pathlib.Path(__file__).resolve().parent
EXAMPLE = HERE.parents[3] / "examples/python/torch_qat.py"
GUIDE = HERE.parents[3] / "docs/pytorch.md"
DATA = pathlib.Path("/usr/share/datasets/fashion-mnist")

IMPORTS = """
from aimet_torch.quantsim import QuantizationSimModel
from aimet_torch.batch_norm_fold import fold_all_batch_norms
from aimet_torch.cross_layer_equalization import equalize_model
from aimet_torch.bn_reestimation import reestimate_bn_stats
"""


def test_the_guides_lines_run(tmp_path, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(code, str(GUIDE), "exec"), scope)
    sim, logits = scope["sim"], scope["logits"]
    assert logits.shape == (64, 10) and bool(logits.isfinite().all())
    assert sim.model.conv.param_quantizers["weight"].bits == 8
    assert sim.model.depthwise.param_quantizers["weight"].bits == 4
    assert sim.model.input_quantizers[0].get_max().item() == pytest.approx(3, abs=0.03)
    written = re.findall(r"`(net\.[\w.]+)`", GUIDE.read_text().partition("## Coming")[0])
    assert len(set(written)) == 3 and all((tmp_path / "out" / name).exists() for name in written)
    assert (tmp_path / "out/net.qdq.onnx").is_file()
    assert load_checkpoint(tmp_path / "sim.pkl").model.conv.param_quantizers["weight"].bits == 4


def run(python, *arguments, **environment):
    done = subprocess.run(
        [python, "-W", "ignore", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def accuracies(output):
    return {
        name: float(value) for name, value in re.findall(r"^(fp32|ptq|qat) (\S+)$", output, re.M)
    }


def check(result, folder):
    assert result["fp32"] > 0.9
    # 512 pictures; 0.04 is four deviations of the difference that chance makes at 0.95.
    assert result["qat"] > result["fp32"] - 0.04
    assert (folder / "network.onnx").is_file() and (folder / "network.pth").is_file()


def test_aimet_style_script(tmp_path):
    check(accuracies(run(sys.executable, HERE / "aimet_style.py", tmp_path)), tmp_path)
    encodings = json.loads((tmp_path / "network.encodings").read_text())
    weights = {entry["name"]: entry for entry in encodings["param_encodings"]}
    assert weights["conv1.weight"]["bw"] == 4 and len(weights["conv1.weight"]["scale"]) == 8


def test_the_same_script_runs_with_aimet(tmp_path):
    script = (HERE / "aimet_style.py").read_text()
    changed, count = re.subn(r"from halfstep\.torch import \([^)]*\)\n", "", script)
    assert count == 1
    changed = changed.replace("from torch import nn\n", "from torch import nn\n" + IMPORTS, 1)
    (tmp_path / "script.py").write_text(changed)
    check(accuracies(run(aimet_python(), tmp_path / "script.py", tmp_path)), tmp_path)


def test_the_script_and_the_guide_run_beside_aimet(tmp_path):
    """In AIMET's environment, whose torch is newer, only the imports differ."""
    code = "import onnxscript, onnx"
    done = subprocess.run([aimet_python(), "-c", code], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"AIMET's environment lacks a package: {done.stderr.splitlines()[-1]}")
    package = pathlib.Path(halfstep.__file__).parent
    (tmp_path / "path").mkdir()
    (tmp_path / "path/halfstep").symlink_to(package)  # alone, without the torch beside it
    path = {"PYTHONPATH": str(tmp_path / "path")}
    check(accuracies(run(aimet_python(), HERE / "aimet_style.py", tmp_path, **path)), tmp_path)
    (lines,) = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.M | re.S)
    (tmp_path / "guide.py").write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{lines}")
    run(aimet_python(), tmp_path / "guide.py", **path)
    assert (tmp_path / "out/net.qdq.onnx").is_file()


@pytest.mark.skipif(not DATA.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_example(tmp_path):
    pytest.importorskip("onnxruntime")
    output = run(sys.executable, EXAMPLE, "--quick", "--out", tmp_path)
    rows = re.findall(r"^(.+?)  +(0\.\d+)  +[+-]\d", output, re.M)
    table = {name.strip(): float(value) for name, value in rows}
    # Chance is 0.1; 32 batches are not enough for more than a beginning.
    assert table["FP32"] > 0.25, output
    assert table["W8A8"] > table["FP32"] - 0.05
    assert table["W4A8, 1 epochs of QAT"] > 0.5
    assert abs(table["the same in onnxruntime (QDQ)"] - table["W4A8, 1 epochs of QAT"]) < 0.03
    more = float(re.search(r"by more: (\S+) %", output)[1])
    # Float sums in another order move values over borders; the next layers see that, seldom twice.
    assert more < 1
    for name in ("w4a8.onnx", "w4a8.pth", "w4a8.encodings", "w4a8_qdq.onnx"):
        assert (tmp_path / name).is_file()


@pytest.mark.skipif(not DATA.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_compression_example(tmp_path):
    example = EXAMPLE.with_name("torch_compress.py")
    output = run(
        sys.executable,
        example,
        "--quick",
        "--networks",
        "resnet",
        "--ratio",
        "0.6",
        "--out",
        tmp_path,
    )
    rows = re.findall(r"^(.+?)  +(0\.\d+)  (\d\.\d+)  [+-]\d", output, re.M)
    table = [(name.strip(), float(value), float(share)) for name, value, share in rows]
    assert [name for name, *_ in table] == [
        *("FP32", "one epoch more"),
        *("pruned by magnitude", "and one epoch", "pruned for data", "and one epoch"),
        *("plain SVD", "and one epoch", "SVD for data", "and one epoch"),
        *("pruned and SVD for data", "and one epoch", "and W8A8"),
    ]
    accuracy = [value for _, value, _ in table]
    # 32 batches: far above chance (0.1), little lost to methods for data, more after training on.
    assert accuracy[0] > 0.25 and accuracy[8] > accuracy[0] - 0.15, output
    assert accuracy[10] > max(accuracy[2], accuracy[0] - 0.15), output
    assert accuracy[11] > accuracy[0] - 0.05 and accuracy[12] > accuracy[11] - 0.05, output
    # A target that scores choose is met to a thousandth, others are limits.
    assert all(share == 1 for *_, share in table[:2]) and all(s <= 0.601 for *_, s in table[2:])
    for name in ("resnet-plain-SVD.html", "resnet-pruned-for-data.html", "resnet-w8a8.onnx"):
        assert (tmp_path / name).is_file()


@pytest.mark.skipif(not DATA.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_rounding_example(tmp_path):
    script = EXAMPLE.with_name("torch_adaround.py")
    methods = ["nearest", "gram"]
    output = run(
        sys.executable, script, "--quick", "--out", tmp_path, "--bits", 3, "--methods", *methods
    )
    rows = dict(re.findall(r"^W3A8 +(\w+) +(0\.\d+)", output, re.M))
    assert list(rows) == methods, output
    # 500 pictures: 0.06 is four deviations of the difference that chance makes near 0.5.
    assert float(rows["gram"]) > float(rows["nearest"]) - 0.06
    assert (tmp_path / "gram_w3.encodings").is_file()
