# SPDX-License-Identifier: Apache-2.0
# Fixtures that several test files use.
import pytest


@pytest.fixture(scope="session")
def network() -> bytes:
    """The bytes of `small_models.convnet`."""
    from support import small_models

    return small_models.convnet().SerializeToString()
