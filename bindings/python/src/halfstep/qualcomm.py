# SPDX-License-Identifier: Apache-2.0
# Hands QDQ models to Qualcomm's own converter and emulator.
"""Qualcomm's converter and its emulator of the Hexagon tensor processor (HTP).

Needs the package ``onnxruntime-qnn`` (``pip install 'halfstep[qualcomm]'``), which carries
Qualcomm's libraries under their own license. They run in a process of their own, so that whatever
happens in them is an exception here.

>>> from halfstep import qualcomm
>>> sim.export_qdq("net_qdq.onnx", int32_bias=True)      # doctest: +SKIP
>>> qualcomm.write_dlc("net_qdq.onnx", "net.dlc")        # doctest: +SKIP
>>> qualcomm.run_on_htp("net_qdq.onnx", {"x": data})     # doctest: +SKIP
{'y': array([...], dtype=float32)}
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import (
    FileAccessError,
    HalfstepError,
    InternalError,
    InvalidArgumentError,
    InvalidGraphError,
    MalformedFileError,
    UnknownNameError,
    UnsupportedOperatorError,
)

if TYPE_CHECKING:
    import numpy as np

__all__ = ["PackageMissingError", "run_on_htp", "write_dlc"]

_WORKER = Path(__file__).with_name("_qualcomm_worker.py")
#: How the provider names what it refuses.
_REFUSED = re.compile(r"\{ name: (.*?), type: (.*?) \}")
_COLORS = re.compile(r"\x1b\[[0-9;]*m")
#: What the worker calls its failures.
_ERRORS: dict[str, type[HalfstepError]] = {
    "argument": InvalidArgumentError,
    "file": FileAccessError,
    "graph": InvalidGraphError,
    "malformed": MalformedFileError,
    "name": UnknownNameError,
}


class PackageMissingError(HalfstepError, ImportError):
    """A package that Qualcomm's tools need is not installed, or not made for this machine."""

    status = 5
    code = "HS_ERR_INVALID_STATE"


def write_dlc(
    qdq_model_path: str | os.PathLike[str],
    dlc_path: str | os.PathLike[str],
    *,
    batch_size: int = 1,
) -> None:
    """Convert a QDQ model to a DLC, the file that Qualcomm's runtime loads.

    The HTP's own compiler checks the network first, so a file that appears is one that it takes.
    Extents are fixed in a DLC.

    Parameters
    ----------
    qdq_model_path : path
        What `QuantizationSimModel.export_qdq` wrote.
    dlc_path : path
        File to write or replace; it appears whole or not at all.
    batch_size : int
        The first extent of inputs that leave it open.

    Raises
    ------
    PackageMissingError
    UnsupportedOperatorError
        If the processor refuses nodes; the message names them.
    InvalidArgumentError
        For the batch size, or if an extent other than the first is open.
    FileAccessError, MalformedFileError, InvalidGraphError
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InvalidArgumentError(f"batch_size: expected a positive integer, got {batch_size!r}")
    target = Path(os.fspath(dlc_path)).absolute()
    try:
        folder = tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise FileAccessError(f"cannot write '{target}': {error.strerror}") from error
    try:
        _work(folder, {"model": _existing(qdq_model_path), "dlc": folder, "batch": batch_size})
        files = sorted(Path(folder).glob("*.dlc"))
        if len(files) != 1:
            raise UnsupportedOperatorError(
                f"model '{os.fspath(qdq_model_path)}': expected one graph for the HTP,"
                f" got {len(files)}"
            )
        with open(files[0], "rb+") as file:
            os.fsync(file.fileno())
        os.replace(files[0], target)
    except OSError as error:
        if isinstance(error, HalfstepError):
            raise
        raise FileAccessError(f"cannot write '{target}': {error.strerror}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_on_htp(
    qdq_model_path: str | os.PathLike[str], inputs: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Run a QDQ model in integers, on Qualcomm's emulator of the HTP.

    No node runs elsewhere: one that the processor refuses is an error.

    Parameters
    ----------
    qdq_model_path : path
        What `QuantizationSimModel.export_qdq` wrote.
    inputs : mapping of str to array
        Every input of the model.

    Returns
    -------
    dict of str to numpy.ndarray

    Raises
    ------
    PackageMissingError
    UnsupportedOperatorError
        If the processor refuses nodes; the message names them.
    UnknownNameError, InvalidArgumentError
        For the inputs.
    FileAccessError, MalformedFileError, InvalidGraphError
    """
    import numpy as np

    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs: expected a mapping, got {type(inputs).__name__}")
    names = list(inputs)
    with tempfile.TemporaryDirectory(prefix="halfstep-htp-") as folder:
        # Positions as names: a tensor's name may hold what a file's cannot.
        np.savez(
            os.path.join(folder, "inputs.npz"),
            **{str(at): np.asarray(inputs[name]) for at, name in enumerate(names)},
        )
        outputs = _work(folder, {"model": _existing(qdq_model_path), "inputs": names})["outputs"]
        with np.load(os.path.join(folder, "outputs.npz")) as values:
            return {name: values[str(at)] for at, name in enumerate(outputs)}


def _existing(path: str | os.PathLike[str]) -> str:
    try:
        with open(path, "rb"):
            return os.path.abspath(os.fspath(path))
    except OSError as error:
        raise FileAccessError(f"cannot read '{os.fspath(path)}': {error.strerror}") from error


def _work(folder: str, job: dict[str, Any]) -> dict[str, Any]:
    """Let the worker do a job in its own process; return its answer or raise its failure."""
    answer = Path(folder, "answer.json")
    Path(folder, "job.json").write_text(json.dumps(job), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # -P: the package's folder must not stand on the path, its modules are named torch and keras.
    done = subprocess.run(
        [sys.executable, "-P", str(_WORKER), folder],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        check=False,
    )
    log = _COLORS.sub("", done.stderr.decode("utf-8", "replace"))
    if not answer.exists():
        last = log.strip().splitlines()[-1:] or ["no message"]
        how = (
            f"signal {signal.Signals(-done.returncode).name}"
            if done.returncode < 0
            else f"status {done.returncode}"
        )
        raise InternalError(
            f"model '{job['model']}': Qualcomm's libraries ended with {how}: {last[0]}"
        )
    result = json.loads(answer.read_text(encoding="utf-8"))
    if "failure" not in result:
        return result
    kind, message = result["failure"], result["message"]
    if kind == "package":
        raise PackageMissingError(
            f"{message}; Qualcomm's tools need the extra: pip install 'halfstep[qualcomm]'"
        )
    refused = list(dict.fromkeys(_REFUSED.findall(log)))
    if refused and kind in ("graph", "other"):
        nodes = ", ".join(f"'{name}' ({operator})" for name, operator in refused)
        raise UnsupportedOperatorError(f"model '{job['model']}': the HTP refuses {nodes}")
    cls = _ERRORS.get(kind, UnsupportedOperatorError)
    raise cls(f"model '{job['model']}': {message}")
