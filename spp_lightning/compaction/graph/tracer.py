"""The tracer: torch.fx's, for nested inputs, and with modules that are called as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from spp_lightning.compaction.epilogue import local_response_norm
from spp_lightning.compaction.graph.in_place import InPlaceProxy
from spp_lightning.compaction.graph.inputs import items_of
from spp_lightning.compaction.graph.query import Node
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.layers.column_linear import ColumnLinear

__all__ = ["Tracer"]


class Tracer(fx.Tracer):
    """Traces a network for its inputs.

    A list, tuple or dict of tensors is taken apart by :func:`items_of`. An input that isn't given
    and is None, a bool or text by default has its default for ever. A module that can't be traced
    is called as it is.

    Args:
        given: The inputs by name.

    Attributes:
        failures: Why modules can't be traced, by their names.
        takes_list: Whether a list of tensors is among the inputs.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__(autowrap_functions=(local_response_norm,))
        self._given = given
        self.failures: dict[str, str] = {}
        self.takes_list = False
        self._tensors_read: dict[str, Any] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one call of the graph."""
        return isinstance(m, (ColumnConv2d, ColumnLinear)) or super().is_leaf_module(
            m, module_qualified_name
        )

    def proxy(self, node: Node) -> fx.Proxy:
        """The proxy of a node."""
        return InPlaceProxy(node, self)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Trace through a module; where that fails, call it as it is."""
        before, stack = {*self.graph.nodes}, self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # whatever a module may raise that can't be traced
            for node in reversed(self.graph.nodes):
                if node not in before:
                    self.graph.erase_node(node)
            for key, proxy in list(self._tensors_read.items()):
                if proxy.node not in before:
                    del self._tensors_read[key]
            self.module_stack = stack
            path = self.path_of_module(m)
            self.failures[path] = f"{type(error).__name__}: {error}"
            return self.create_proxy("call_module", path, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """An attribute of a module; the proxies of parameters are remembered."""
        self._tensors_read = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """The inputs as proxies, nested as they are given."""
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        return function, [self._input(x) if isinstance(x, fx.Proxy) else x for x in args]

    def _input(self, proxy: fx.Proxy) -> Any:
        node = proxy.node
        name = str(node.target)
        if name in self._given:
            return self._nested(proxy, self._given[name])
        if name.startswith("*"):
            self.graph.erase_node(node)
            return {} if name.startswith("**") else ()
        default = node.args[0] if node.args else None
        if node.args and (default is None or isinstance(default, (bool, str))):
            self.graph.erase_node(node)
            return default
        return proxy

    def _nested(self, proxy: fx.Proxy, value: Any) -> Any:
        """A proxy of a list, tuple or dict as a list, tuple or dict of proxies."""
        if isinstance(value, dict) and all(isinstance(key, (str, int)) for key in value):
            keys: Any = tuple(value)
            values = list(value.values())
        elif type(value) in (list, tuple):
            keys, values = len(value), list(value)
        else:
            return proxy
        if not any(isinstance(x, (Tensor, list, tuple, dict)) for x in values):
            return proxy
        self.takes_list = self.takes_list or isinstance(value, list)
        items: Any = self.create_proxy("call_function", items_of, (proxy, keys), {})
        nested = [self._nested(items[i], x) for i, x in enumerate(values)]
        return (
            dict(zip(value, nested, strict=True))
            if isinstance(value, dict)
            else type(value)(nested)
        )
