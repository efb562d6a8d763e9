# SPDX-License-Identifier: Apache-2.0
# A traced module with its quantizers, beside the engine's simulation of it.
"""One graph of a simulation: usually the whole network, otherwise one of its modules."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Iterator
from typing import Any

from torch import nn

from .. import simulation as engine
from ..errors import HalfstepError
from ._encodings import check_encoding, encoding_of, make_quantizer, set_encoding
from ._network import Network, nodes
from ._simulated import build
from ._watching import Observer, Refresh, ignore
from .quantizer import Quantizer


class Part:
    """A module, its graph in the engine, and the quantizers that stand in the module for it.

    Parameters
    ----------
    original : torch.nn.Module
        Gets quantizers as submodules.
    dummy_input : torch.Tensor, or tuple or dict of them
        Inputs that the module accepts.
    options : dict
        Of the engine's simulation.
    place : str
        Name of the module in the network; empty for the whole network.

    Raises
    ------
    UntraceableModelError
    """

    def __init__(
        self, original: nn.Module, dummy_input: Any, options: dict[str, Any], place: str = ""
    ) -> None:
        self.original, self.options, self.place = original, options, place
        #: Operators of the graph that are not to be quantized.
        self.excluded: tuple[str, ...] = ()
        self.network = Network(original, dummy_input)
        first = self._simulate()
        sites = first.quantizers
        self.roles = {site.tensor: site.is_parameter for site in sites}
        self.program, self.quantizers, self.missing = build(
            original,
            self.network.exported,
            sites,
            lambda site: make_quantizer(site, first),
            in_place=bool(place),
        )
        self.network.release()
        self._share_ranges(sites)
        for name in self._inside_folds():
            if name in self.quantizers:
                self.quantizers[name].enabled = False
        self.watched = tuple(
            name
            for name, is_parameter in self.roles.items()
            if not is_parameter and name in self.quantizers and not self._is_constant(name)
        )
        self.pull(first)
        self.refresh = Refresh(self)

    def name_of(self, tensor: str) -> str:
        """Return what a tensor is called in the whole simulation."""
        return f"{self.place}.{tensor}" if self.place else tensor

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Let errors of the engine say which module they are about."""
        try:
            yield
        except HalfstepError as error:
            if not self.place:
                raise
            raise type(error)(f"module '{self.place}': {error}") from error

    # ---------------------------------------------------------------------------------------------

    def _simulate(self) -> engine.QuantizationSimModel:
        model = self.network.bound(self.original)
        return engine.QuantizationSimModel(model, **self.options, excluded_layers=self.excluded)

    def _inside_folds(self) -> set[str]:
        """Return tensors that nothing quantizes once batch norms are folded into earlier layers.

        Between a layer and its batch norm, as the engine places quantizers in the folded graph.
        """
        model = self.network.bound(self.original)
        folds = [fold for fold in model.fold_batch_norms() if not fold.is_forward]
        if not folds:
            return set()
        # Ranges do not matter here: the quickest are good enough.
        options = self.options | {"quant_scheme": "min_max"}
        placed = {site.tensor for site in engine.QuantizationSimModel(model, **options).quantizers}
        norms = nodes(self.network.exported.data)
        around = [norms[fold.batch_norm] for fold in folds]
        return {name for node in around for name in (*node.inputs, *node.outputs)} - placed

    def _is_constant(self, tensor: str) -> bool:
        if tensor in self.network.exported.state:
            return True
        constants = getattr(self.original, "traced_constants", None)
        return constants is not None and tensor in constants._buffers

    def _share_ranges(self, sites: Iterable[engine.Quantizer]) -> None:
        """Let tensors on one grid share the ends of its range: training moves them as one."""
        for site in sites:
            quantizer, leader = (self.quantizers.get(n) for n in (site.tensor, site.tied_to))
            if quantizer is not None and leader is not None and quantizer is not leader:
                quantizer.minimum, quantizer.maximum = leader.minimum, leader.maximum

    def engine(self, keeps_ranges: bool) -> engine.QuantizationSimModel:
        """Return an engine simulation of the present weights and quantizers.

        Ranges of frozen quantizers are kept; those of others only if asked for.
        """
        sim = self._simulate()
        placed = {site.tensor: site for site in sim.quantizers}
        for name in placed.keys() - self.quantizers.keys():
            sim.set_enabled(name, False)
        for name, quantizer in self.quantizers.items():
            site = placed.get(name)
            if site is None:
                continue
            if (quantizer.bits, quantizer.is_symmetric) != (site.bits, site.is_symmetric):
                sim.set_precision(name, quantizer.bits, quantizer.is_symmetric)
            if quantizer.has_range and (keeps_ranges or quantizer.frozen):
                sim.set_encoding(name, encoding_of(quantizer))
            if not quantizer.enabled:
                sim.set_enabled(name, False)
        for name, quantizer in self.quantizers.items():
            if name in placed and quantizer.frozen:
                sim.set_frozen(name, True)
        return sim

    def pull(
        self, sim: engine.QuantizationSimModel, roles: Container[bool] = (False, True)
    ) -> None:
        """Give every quantizer that is not frozen the engine's grid; of parameters, or others."""
        for site in sim.quantizers:
            quantizer = self.quantizers.get(site.tensor)
            if quantizer is None or quantizer.frozen or not site.has_encoding:
                continue
            if site.is_parameter in roles:
                set_encoding(quantizer, sim.encoding(site.tensor))

    def check(self, sim: engine.QuantizationSimModel) -> None:
        """Raise if a grid that a simulation has loaded does not fit its quantizer.

        Raises
        ------
        EncodingMismatchError
        """
        for site in sim.quantizers:
            quantizer = self.quantizers.get(site.tensor)
            if quantizer is not None and site.has_encoding:
                check_encoding(quantizer, sim.encoding(site.tensor))

    def take(
        self,
        sim: engine.QuantizationSimModel,
        untouched: Iterable[str],
        freeze: bool,
        trains: bool | None,
    ) -> None:
        """Take over encodings that a simulation has loaded, and which quantizers are on.

        Parameters
        ----------
        sim : halfstep.QuantizationSimModel
            The engine's simulation, with the encodings.
        untouched : iterable of str
            Tensors whose quantizers stay as they are.
        freeze : bool
            Whether what is taken over is kept from then on.
        trains : bool, optional
            Whether training moves it.
        """
        kept = set(untouched)
        for site in sim.quantizers:
            quantizer = self.quantizers.get(site.tensor)
            if quantizer is None or site.tensor in kept:
                continue
            if not quantizer.frozen and site.has_encoding:
                set_encoding(quantizer, sim.encoding(site.tensor))
            quantizer.enabled = site.is_enabled
            if not (site.is_enabled and site.has_encoding):
                continue
            if trains is not None and not (site.is_parameter and not trains):
                quantizer.learnable = trains
            # A parameter's range that does not learn would follow the parameter.
            if freeze or (trains is False and site.is_parameter):
                quantizer.frozen = True

    @contextlib.contextmanager
    def watching(self, sim: engine.QuantizationSimModel) -> Iterator[None]:
        """Hand what computed tensors hold to the engine's statistics."""
        enabled = {site.tensor for site in sim.quantizers if site.is_enabled}
        self.refresh.active = False
        try:
            for name, quantizer in self.quantizers.items():
                if self.roles[name] or not quantizer.enabled:
                    continue
                # Activation quantizers that nothing is asked of let values pass, as in the engine.
                watches = name in self.watched and name in enabled
                quantizer.observer = Observer(sim, name) if watches else ignore
            yield
        finally:
            for quantizer in self.quantizers.values():
                quantizer.observer = None
            self.refresh.active = True

    # ---------------------------------------------------------------------------------------------

    def operators_of(self, layer: str) -> list[str]:
        """Return the operators of the graph that a module of the network computes."""
        scopes = self.network.exported.scopes
        if self.place and f"{self.place}.".startswith(f"{layer}."):
            return list(scopes)
        inner = layer.removeprefix(f"{self.place}.") if self.place else layer
        if self.place and inner == layer:
            return []
        return [operator for operator, modules in scopes.items() if inner in modules]

    def exclude(self, operators: Iterable[str]) -> None:
        """Switch off what the engine would not quantize without these operators."""
        self.excluded = tuple(dict.fromkeys((*self.excluded, *operators)))
        placed = {site.tensor for site in self._simulate().quantizers}
        for name, quantizer in self.quantizers.items():
            if name not in placed:
                if quantizer.frozen:
                    quantizer.frozen = False
                quantizer.enabled = False


class Quantizers(dict[str, Quantizer]):
    """Quantizers by tensor."""

    def __call__(self) -> Iterator[Quantizer]:
        """Go through the quantizers."""
        return iter(self.values())


def quantizers(parts: Iterable[Part]) -> dict[str, Quantizer]:
    """Quantizers of several parts, by the names that their tensors have in the whole."""
    return {
        part.name_of(tensor): quantizer
        for part in parts
        for tensor, quantizer in part.quantizers.items()
    }
