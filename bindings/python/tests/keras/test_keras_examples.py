# SPDX-License-Identifier: Apache-2.0
# The example program of halfstep.keras.
import os
import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLE = pathlib.Path(__file__).resolve().parents[4] / "examples/python/keras_qat.py"
DATA = pathlib.Path("/usr/share/datasets/fashion-mnist")


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
