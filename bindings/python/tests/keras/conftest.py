# SPDX-License-Identifier: Apache-2.0
# Skips these tests where TensorFlow is not installed; `make test-keras` has an environment with it.
import os

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

collect_ignore_glob: list[str] = []
try:
    import tensorflow  # noqa: F401
except ImportError:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _seeded():
    import keras

    keras.utils.set_random_seed(0)
