# SPDX-License-Identifier: Apache-2.0
# The package as such: examples in docstrings, the stub, what a wheel holds.
import ast
import doctest
import importlib
import importlib.resources
import inspect

import pytest
from support import small_models
from support.environment import REPOSITORY

import halfstep

MODULES = (
    "halfstep",
    "halfstep._rounding_methods",
    "halfstep.compression",
    "halfstep.errors",
    "halfstep.model",
    "halfstep.simulation",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name, network, tmp_path, monkeypatch):
    """They speak of a file ``net.onnx`` in the current folder."""
    (tmp_path / "net.onnx").write_bytes(network)
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0 and result.failed == 0


def test_python_of_the_readme_runs(network, tmp_path, monkeypatch):
    (tmp_path / "net.onnx").write_bytes(network)
    monkeypatch.chdir(tmp_path)
    code = (REPOSITORY / "README.md").read_text().split("```python\n")[1].split("```")[0]
    data = small_models.data()
    names = {"calibration_batches": [data[:8], data[8:]], "picture": data[:1]}
    # The test network's names instead of those in the text.
    exec(code.replace('"image"', '"x"').replace('"logits"', '"y"'), names)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"net.onnx", "net.encodings", "net_qdq.onnx"}


def test_everything_public_is_documented():
    for name in halfstep.__all__:
        item = getattr(halfstep, name)
        assert inspect.getdoc(item), name
        if inspect.isclass(item):
            for key, member in vars(item).items():
                if not key.startswith("_") and (callable(member) or isinstance(member, property)):
                    assert inspect.getdoc(member), f"{name}.{key}"


def test_stub_names_what_the_native_module_has():
    folder = importlib.resources.files("halfstep")
    tree = ast.parse((folder / "_core.pyi").read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    core = halfstep._core
    native = {name for name in dir(core) if not name.startswith("__")}
    assert native == set(classes) | functions
    for name, node in classes.items():
        stubbed = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
        there = {key for key in vars(getattr(core, name)) if not key.startswith("__")}
        assert there == stubbed - {"__buffer__"}, name
    assert (folder / "py.typed").is_file()


def test_handles_cannot_be_made_by_hand():
    for cls in (halfstep._core.Model, halfstep._core.Simulation, halfstep._core.Tensor):
        with pytest.raises(TypeError):
            cls()
