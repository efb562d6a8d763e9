# SPDX-License-Identifier: Apache-2.0
# Lines of the guides run as they stand.
import re

import numpy as np
from support import small_models
from support.environment import REPOSITORY

import halfstep


def test_lines_of_the_rounding_guide_run(network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.onnx").write_bytes(network)
    images = small_models.data(24)
    np.save("images.npy", images)
    text = (REPOSITORY / "docs/rounding.md").read_text()
    scope = {}
    for code in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        exec(compile(code, "docs/rounding.md", "exec"), scope)
    assert any((tmp_path / "rounding").iterdir()) and (tmp_path / "out/net.encodings").is_file()
    assert {scope["sim"].encoding(layer.weight).bits for layer in scope["layers"]} == {4}
    grids = halfstep.QuantizationSimModel(scope["blocks"])
    assert grids.encoding("conv2.weight").granularity == "per_block"
    plain = halfstep.Model.load(network)
    plain.fold_batch_norms()
    changed = {
        name: [
            tensor
            for tensor, value in scope[name].initializers.items()
            if not np.array_equal(value, plain.initializers.get(tensor, value))
        ]
        for name in ("free", "eight")
    }
    assert any("weight" in tensor for tensor in changed["free"])
    assert not any("weight" in tensor for tensor in changed["eight"])
