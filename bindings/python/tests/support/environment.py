# SPDX-License-Identifier: Apache-2.0
# Where the tests find what the repository does not hold: shared data, the AIMET environment.
"""Locations outside the repository, and the reasons that tests print when they are missing."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[4]
LOADER = Path(__file__).resolve().parents[1] / "aimet" / "load_encodings.py"


def shared(*parts: str) -> Path:
    """Return a path in the shared reference folder; skip the calling test if it is absent."""
    root = Path(os.environ.get("HALFSTEP_SHARED") or REPOSITORY.parent / "shared")
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is absent (set HALFSTEP_SHARED)")
    return path


def aimet_python() -> str:
    """Return the interpreter of the AIMET environment; skip the calling test if there is none."""
    python = os.environ.get("HALFSTEP_AIMET_PYTHON") or str(
        REPOSITORY / ".build/venv-aimet/bin/python"
    )
    if not Path(python).exists():
        pytest.skip(
            f"{python} is absent (install tests/requirements-aimet.txt, set HALFSTEP_AIMET_PYTHON)"
        )
    return python


def load_in_aimet(jobs: list[dict], folder: Path) -> list[dict]:
    """Let AIMET load encodings; jobs and reports are those of `tests/aimet/load_encodings.py`."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs, default=str))
    done = subprocess.run(
        [aimet_python(), str(LOADER), str(file)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    if done.returncode != 0:
        raise AssertionError(
            f"load_encodings.py failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])
