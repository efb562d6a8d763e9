# SPDX-License-Identifier: Apache-2.0
# The process in which Qualcomm's libraries run; halfstep.qualcomm starts it as a script.
"""Reads ``job.json`` in a folder, works, and leaves ``answer.json`` there."""

import json
import os
import sys


class Failure(Exception):
    """Something that the caller is to raise."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def packages():
    """Import onnxruntime and Qualcomm's provider."""
    try:
        import onnxruntime
        import onnxruntime_qnn
    except ImportError as error:
        raise Failure("package", f"{error}") from error
    try:
        onnxruntime.register_execution_provider_library(
            "QNNExecutionProvider", onnxruntime_qnn.get_library_path()
        )
        devices = [
            device
            for device in onnxruntime.get_ep_devices()
            if device.ep_name == "QNNExecutionProvider"
        ]
    except Exception as error:  # an older onnxruntime, or a library that does not load here
        raise Failure("package", f"onnxruntime-qnn does not load: {error}") from error
    if not devices:
        raise Failure("package", "onnxruntime-qnn has no device on this machine")
    return onnxruntime, onnxruntime_qnn, devices


def open_extents(onnxruntime, model: str) -> list[tuple[str, list]]:
    """Return names and shapes of the inputs; an open extent is a name, or None without one."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return [(value.name, list(value.shape)) for value in session.get_inputs()]


def fixed_extents(inputs: list[tuple[str, list]], given: dict[str, tuple], batch) -> dict[str, int]:
    """Return a number for each named open extent: that of the arrays, or the batch size."""
    known = [name for name, _ in inputs]
    for name in given:
        if name not in known:
            raise Failure("name", f"no input '{name}', expected {', '.join(known)}")
    extents: dict[str, int] = {}
    for name, shape in inputs:
        if batch is None:
            if name not in given:
                raise Failure("name", f"no value for input '{name}'")
            if len(given[name]) != len(shape):
                raise Failure(
                    "argument",
                    f"input '{name}': expected rank {len(shape)}, got {len(given[name])}",
                )
        for axis, extent in enumerate(shape):
            value = given[name][axis] if batch is None else batch
            if isinstance(extent, int):
                if batch is None and extent != value:
                    raise Failure(
                        "argument", f"input '{name}' axis {axis}: expected {extent}, got {value}"
                    )
                continue
            if batch is not None and axis > 0 and extents.get(extent) is None:
                raise Failure("argument", f"input '{name}': the extent of axis {axis} is open")
            if extent is None:
                raise Failure(
                    "argument", f"input '{name}': the open extent of axis {axis} has no name"
                )
            if extents.setdefault(extent, value) != value:
                raise Failure(
                    "argument",
                    f"input '{name}' axis {axis}: expected {extents[extent]}, got {value}",
                )
    return extents


def work(folder: str) -> dict:
    """Do the job of a folder."""
    with open(os.path.join(folder, "job.json"), encoding="utf-8") as file:
        job = json.load(file)
    onnxruntime, qnn, devices = packages()
    import numpy as np

    feed = {}
    if "inputs" in job:
        with np.load(os.path.join(folder, "inputs.npz")) as values:
            feed = {name: values[str(at)] for at, name in enumerate(job["inputs"])}
    shapes = {name: value.shape for name, value in feed.items()}
    extents = fixed_extents(open_extents(onnxruntime, job["model"]), shapes, job.get("batch"))

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    for name, extent in extents.items():
        options.add_free_dimension_override_by_name(name, extent)
    libraries = os.path.dirname(qnn.get_library_path())
    provider = {"backend_path": os.path.join(libraries, "libQnnHtp.so")}
    if "dlc" in job:
        provider |= {
            "dump_qnn_ir_dlc": "1",
            "dump_qnn_ir_dlc_dir": job["dlc"],
            "qnn_ir_backend_path": os.path.join(libraries, "libQnnIr.so"),
        }
    options.add_provider_for_devices(devices, provider)
    session = onnxruntime.InferenceSession(job["model"], options)
    session.disable_fallback()
    if "dlc" in job:
        return {}
    names = [value.name for value in session.get_outputs()]
    results = session.run(names, feed)
    np.savez(os.path.join(folder, "outputs.npz"), **{str(at): v for at, v in enumerate(results)})
    return {"outputs": names}


def main(folder: str) -> None:
    """Leave an answer in a folder, whatever happens."""
    try:
        answer = work(folder)
    except Failure as failure:
        answer = {"failure": failure.kind, "message": str(failure)}
    except Exception as error:
        kinds = {
            "InvalidProtobuf": "malformed",
            "NoSuchFile": "file",
            "InvalidGraph": "graph",
            "InvalidArgument": "argument",
        }
        kind = kinds.get(type(error).__name__, "other")
        answer = {"failure": kind, "message": f"{type(error).__name__}: {error}"}
    aside = os.path.join(folder, "answer.json.part")
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(answer, file)
    os.replace(aside, os.path.join(folder, "answer.json"))


if __name__ == "__main__":
    main(sys.argv[1])
