# SPDX-License-Identifier: Apache-2.0
# Fixtures of the tests, and the files that the docstrings' examples use.
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "tests"))


@pytest.fixture(scope="session")
def network() -> bytes:
    """The bytes of `small_models.convnet`."""
    from support import small_models

    return small_models.convnet().SerializeToString()


@pytest.fixture(autouse=True)
def _files_of_doctests(request, tmp_path, monkeypatch):
    """Docstrings speak of ``net.onnx`` in the current folder."""
    if not isinstance(request.node, pytest.DoctestItem):
        return
    content = request.getfixturevalue("network")
    (tmp_path / "net.onnx").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    np.set_printoptions(legacy=False)
