"""The largest parts of a network that can be made compact, where the whole can't be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.graph.query import set_module
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.layers.column_linear import ColumnLinear

__all__ = ["replace_parts"]

_LAYERS = (nn.Conv2d, nn.Linear, ColumnConv2d, ColumnLinear)

Make = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], nn.Module | None]


def replace_parts(
    network: nn.Module, run: Callable[[], object], make: Make, below: Iterable[str] = ("",)
) -> list[str]:
    """Replace the largest modules of a network that can be made compact.

    Args:
        network: The network, changed in place.
        run: Runs it for the example.
        make: Makes a module compact, given the arguments of its first call; None if it is to stay
            as it is. Raises if it can't: then the modules inside of it are tried.
        below: Names of the modules inside of which to look.

    Returns:
        The names of the modules that were replaced.
    """
    finder = _Finder(network, run, make)
    for name in below:
        finder.look_inside(name)
    return finder.replaced


class _Finder:
    def __init__(self, network: nn.Module, run: Callable[[], object], make: Make) -> None:
        self._network, self._run, self._make = network, run, make
        self._calls = _first_calls(network, run)
        self._seen: set[nn.Module] = set()
        self.replaced: list[str] = []

    def look_inside(self, name: str) -> None:
        """Replace what can be replaced inside of a module."""
        for child, module in self._network.get_submodule(name).named_children():
            path = f"{name}.{child}" if name else child
            if module in self._seen or not _may_be_replaced(module):
                continue
            self._seen.add(module)
            if module not in self._calls or not self._replace(path, module):
                self.look_inside(path)

    def _replace(self, path: str, module: nn.Module) -> bool:
        """Whether a module was replaced, or is to stay as it is."""
        try:
            part = self._make(module, *self._calls[module])
        except Exception:  # whatever a module may raise that can't be traced
            return False
        if part is None:
            return True
        everywhere = self._network.named_modules(remove_duplicate=False)
        names = [name for name, other in everywhere if other is module]
        for name in names:
            set_module(self._network, name, part)
        try:
            with torch.no_grad():
                self._run()
        except Exception:  # the network reads an attribute of the module, or calls a method
            for name in names:
                set_module(self._network, name, module)
            return False
        self.replaced.append(path)
        return True


def _may_be_replaced(module: nn.Module) -> bool:
    return not isinstance(module, (*_LAYERS, CompactNetwork)) and any(
        isinstance(layer, (nn.Conv2d, nn.Linear)) for layer in module.modules()
    )


def _first_calls(
    network: nn.Module, run: Callable[[], object]
) -> dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments with which each module is called first."""
    calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module not in calls:
            calls[module] = tree_map(
                lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs)
            )

    hooks = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in network.modules()
        if _may_be_replaced(module)
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls
