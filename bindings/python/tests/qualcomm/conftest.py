# SPDX-License-Identifier: Apache-2.0
# Skips these tests where Qualcomm's provider is not installed; `make test-qnn` has an environment.
import importlib.util
import platform

import pytest

MISSING = next(
    (p for p in ("onnx", "onnxruntime", "onnxruntime_qnn") if importlib.util.find_spec(p) is None),
    None,
)


def pytest_collection_modifyitems(items):
    if MISSING is None:
        return
    reason = (
        f"{MISSING} is not installed (requirements-qnn.txt; wheels exist for Linux and Windows,"
        f" this is {platform.system()} on {platform.machine()})"
    )
    for item in items:
        if item.path.parent.name == "qualcomm" and "without_provider" not in item.name:
            item.add_marker(pytest.mark.skip(reason=reason))
