# SPDX-License-Identifier: Apache-2.0
# A traced graph as Python source that runs on a module, and that can be copied and pickled.
"""The code of a graph, apart from the module whose parameters and submodules it names."""

from __future__ import annotations

import importlib
import types
from typing import Any, NamedTuple

from torch import fx, nn
from torch.utils import _pytree as pytree


class _Imported(NamedTuple):
    """Stands for a module of Python's in a pickle."""

    name: str


class _Tree(NamedTuple):
    """Stands for how arguments or results are nested in a pickle: numbers in the same order."""

    numbered: Any


#: What a graph calls the module that it runs on, if an operator wants the module itself.
ITSELF = "module_itself"


class Program:
    """The source of a graph, compiled; it never changes, so that copies are the same object.

    Parameters
    ----------
    graph : torch.fx.Graph
        Its targets are names in the module that the program will run on.
    title : str
        For tracebacks.
    """

    def __init__(self, graph: fx.Graph, title: str) -> None:
        self._title = title
        code = graph.python_code("self")
        #: Python source of a function ``forward(self, ...)``.
        self.source = code.src.replace("self._in_spec", "_in_spec")
        self.source = self.source.replace("self._out_spec", "_out_spec")
        self.source = self.source.replace(f"self.{ITSELF}", "self")
        self._names = dict(code.globals)
        info = getattr(graph._codegen, "pytree_info", None)
        if info is not None:
            self._names |= {"_in_spec": info.in_spec, "_out_spec": info.out_spec}
        self._compile()

    def _compile(self) -> None:
        names = dict(self._names)
        exec(compile(self.source, f"<simulation of {self._title}>", "exec"), names)
        #: The compiled function; its first argument is the module.
        self.run = names["forward"]

    def __getstate__(self) -> dict[str, Any]:
        names = {key: _portable(value) for key, value in self._names.items()}
        return {"_title": self._title, "source": self.source, "_names": names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._names = {key: _usable(value) for key, value in self._names.items()}
        self._compile()

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self


def _portable(value: Any) -> Any:
    if isinstance(value, types.ModuleType):
        return _Imported(value.__name__)
    if isinstance(value, pytree.TreeSpec):
        return _Tree(pytree.tree_unflatten(range(value.num_leaves), value))
    return value


def _usable(value: Any) -> Any:
    if isinstance(value, _Imported):
        return importlib.import_module(value.name)
    if isinstance(value, _Tree):
        return pytree.tree_structure(value.numbered)
    return value


class SimulatedModule(nn.Module):
    """A network with quantizers: the modules of the original, with its names, around a graph.

    It runs the traced graph; the modules of the original hold parameters, buffers, mode and
    quantizers, and keep their names, so that state dicts of the original fit (``strict=False``).
    Batch norms and dropouts follow the mode. It can be trained, copied, pickled and compiled; the
    original's other methods are not there.

    Attributes
    ----------
    channels_last : bool
        Whether convolutions run channels-last where no gradients are recorded and everything is
        float32 on a CPU: the default, since it is faster. Sums are then made in another order, so
        that a value near a border may round to the other side. Shapes, formats and types of results
        stay.
    """

    def __init__(self, original: nn.Module, program: Program, refresh: Any) -> None:
        super().__init__()
        self._original_name = type(original).__name__
        # The same dictionaries, so that a tensor replaced in one is replaced in both.
        for held in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[held] = original.__dict__[held]
        self.training = original.training
        self._program = program
        self._before_forward = refresh
        self.channels_last = True

    @property
    def code(self) -> str:
        """The graph as Python source."""
        return self._program.source

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network with quantizers."""
        self._before_forward()
        return self._program.run(self, *args, **kwargs)

    def _get_name(self) -> str:
        return f"Simulated{self._original_name}"


class InPlaceForward:
    """Takes the place of a module's `forward`: runs its graph with quantizers.

    Parameters
    ----------
    module : torch.nn.Module
        The module, of its own class, with quantizers as submodules.
    program : Program
        Its graph.
    refresh : callable
        Called before each run.
    """

    def __init__(self, module: nn.Module, program: Program, refresh: Any) -> None:
        self.module, self.program, self.refresh = module, program, refresh

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's graph."""
        self.refresh()
        return self.program.run(self.module, *args, **kwargs)

    def install(self) -> None:
        """Let the module run the graph from now on."""
        self.module.__dict__["forward"] = self


def uninstall(module: nn.Module) -> None:
    """Let a module run its own code again."""
    if isinstance(module.__dict__.get("forward"), InPlaceForward):
        del module.__dict__["forward"]
