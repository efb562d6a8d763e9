# SPDX-License-Identifier: Apache-2.0
# AIMET places the same quantizers in the same module, with the same ranges.
import importlib.util
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from support.environment import aimet_python  # noqa: E402

from halfstep.torch import QuantizationSimModel  # noqa: E402

SCRIPT = Path(__file__).parents[1] / "aimet" / "simulate_torch.py"


def test_same_quantizers_and_scales_as_aimet(tmp_path):
    python = aimet_python()
    spec = importlib.util.spec_from_file_location("simulate_torch", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    torch.manual_seed(4)
    net = script.layers().eval()
    inputs = torch.randn(16, 3, 12, 12)
    torch.save(net.state_dict(), tmp_path / "state.pth")
    np.save(tmp_path / "inputs.npy", inputs.numpy())
    done = subprocess.run(
        [python, str(SCRIPT), str(tmp_path / "state.pth"), str(tmp_path / "inputs.npy")],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.splitlines()[-1])

    sim = QuantizationSimModel(net, inputs[:1])
    sim.compute_encodings(lambda model: model(inputs))
    ours = {"in": {}, "out": {}, "weight": {}}
    for name, quantizer in sim.named_quantizers():
        if not quantizer.enabled:
            continue
        scales = np.atleast_1d(quantizer.get_encoding()["scale"]).reshape(-1).tolist()
        if name.startswith("input_quantizers"):
            ours["in"]["0"] = scales
        else:
            owner, kind, _ = name.split(".")
            ours["weight" if kind == "param_quantizers" else "out"][owner] = scales
    assert {k: sorted(v) for k, v in ours.items()} == {k: sorted(v) for k, v in theirs.items()}
    for place, modules in theirs.items():
        for name, scales in modules.items():
            # The same kernels of torch on both sides; the grids may differ by an ulp or two.
            np.testing.assert_allclose(ours[place][name], scales, rtol=1e-6, err_msg=name)
