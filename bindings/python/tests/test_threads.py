# SPDX-License-Identifier: Apache-2.0
# How the OpenMP threads wait, as libgomp itself says when it is loaded.
import os
import re
import subprocess
import sys

import pytest

PROGRAM = "import halfstep, os; print(os.environ.get('GOMP_SPINCOUNT'))"


def run(settings):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    environment |= settings | {"OMP_DISPLAY_ENV": "VERBOSE"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    found = re.search(r"GOMP_SPINCOUNT = '([^']*)'", result.stderr)
    if not found:
        pytest.skip("the OpenMP runtime is not libgomp")
    return found[1], result.stdout.strip()


def test_threads_wait_briefly_and_the_environment_is_left_alone():
    assert run({}) == ("1000", "None")


def test_the_users_settings_stand():
    assert run({"GOMP_SPINCOUNT": "77"}) == ("77", "77")
    # What libgomp makes of a passive policy.
    assert run({"OMP_WAIT_POLICY": "PASSIVE"}) == ("0", "None")
