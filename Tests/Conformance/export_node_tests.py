# SPDX-License-Identifier: Apache-2.0
"""Writes ONNX's backend node tests as files: `export_node_tests.py FOLDER`.

The `onnx` package makes these tests in Python; the Swift conformance test reads files. Set
`HALFSTEP_ONNX_NODE_TESTS` to the folder to run it. The package's data folders that hold files already
(`pytorch-operator`, `pytorch-converted`, `simple`, `light`) can be read directly.
"""

import pathlib
import sys

from onnx import TensorProto, numpy_helper
from onnx.backend.test.loader import load_model_tests


def write(path: pathlib.Path, value, name: str) -> None:
    """Write one tensor; raises for sequences, maps and optionals, which Halfstep has no use for."""
    tensor = value if isinstance(value, TensorProto) else numpy_helper.from_array(value, name)
    path.write_bytes(tensor.SerializeToString())


def main(folder: pathlib.Path) -> None:
    """Write every case that has plain tensors only."""
    written = skipped = 0
    for case in load_model_tests(kind="node"):
        graph = case.model.graph
        values = [*graph.input, *graph.output]
        if not all(value.type.HasField("tensor_type") for value in values):
            skipped += 1
            continue
        target = folder / case.name
        for index, (inputs, outputs) in enumerate(case.data_sets):
            data = target / f"test_data_set_{index}"
            data.mkdir(parents=True, exist_ok=True)
            for kind, tensors, infos in (
                ("input", inputs, graph.input),
                ("output", outputs, graph.output),
            ):
                for position, (tensor, info) in enumerate(zip(tensors, infos, strict=False)):
                    write(data / f"{kind}_{position}.pb", tensor, info.name)
        (target / "model.onnx").write_bytes(case.model.SerializeToString())
        (target / "tolerance.txt").write_text(f"{case.rtol} {case.atol}\n")
        written += 1
    print(f"{written} cases written, {skipped} with other than tensors left out")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
