# SPDX-License-Identifier: Apache-2.0
# The example program of halfstep.keras, and the lines in its guide.
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[4]
EXAMPLE = ROOT / "examples/python/keras_qat.py"
GUIDE = ROOT / "docs/keras.md"
DATA = pathlib.Path("/usr/share/datasets/fashion-mnist")


def test_the_guides_lines_run(tmp_path, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(code, str(GUIDE), "exec"), scope)
    assert scope["logits"].shape == (64, 10)
    assert [layer.name for layer in scope["equalized"].layers[1:]] == [
        *("conv", "relu", "depthwise", "pool", "logits")
    ]
    loaded = keras.models.load_model("simulation.keras")
    again = loaded.predict(scope["pictures"], verbose=0)
    assert np.array_equal(again, scope["logits"])
    written = re.findall(r"`(net\.[\w.]+)`", GUIDE.read_text())
    assert len(set(written)) == 6 and all((tmp_path / "out" / name).exists() for name in written)


@pytest.mark.skipif(not DATA.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_example(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLE, "--quick", "--out", tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    output = done.stdout
    rows = re.findall(r"^(.+?)  +(0\.\d+)  +[+-]\d", output, re.M)
    table = {name.strip(): float(value) for name, value in rows}
    # Chance is 0.1; 32 batches are not enough for more than a beginning.
    assert table["FP32"] > 0.25, output
    assert table["FP32, batch norms folded"] == table["FP32"]
    # 500 pictures; 0.05 is over two deviations of a difference that chance makes.
    assert table["W8A8"] > table["FP32"] - 0.05
    assert table["W4A8, 1 epochs of QAT"] > max(0.5, table["FP32"])
    assert abs(table["the same in onnxruntime (QDQ)"] - table["W4A8, 1 epochs of QAT"]) < 0.03
    more = float(re.search(r"by more: (\S+) %", output)[1])
    # Float sums in another order move values over borders; the next layers see that, seldom twice.
    assert more < 1
    for name in ("w4a8.onnx", "w4a8.keras", "w4a8.encodings", "w4a8.names.json", "w4a8.qdq.onnx"):
        assert (tmp_path / name).is_file()
