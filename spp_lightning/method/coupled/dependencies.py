"""Which channels of a network depend on each other, by Torch-Pruning's dependency graph.

Torch-Pruning follows the network's autograd graph for an example input. It maps the channels of
each operation to those of its neighbours: through additions, concatenations, slices and flattening.
Channels that can be reached from each other in this way can only be removed together.

Source: Fang et al.: DepGraph: Towards Any Structural Pruning, CVPR 2023.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spp_lightning.method.coupled.example import Example

__all__ = ["Dependents", "Side", "Slot", "dependent_channels"]

Side = Literal["in", "out"]
Slot = tuple[str, Side, int]
"""A channel of a layer: the layer's name, whether it reads or writes it, and its index.

A norm's and a depthwise convolution's channels are written, since they read the same ones.
"""


@dataclass
class Dependents:
    """Channels that can only be removed together.

    Attributes:
        slots: The channels of layers, in no certain order.
        obstacles: What else depends on them, in words, such as ``"an output of the network"``.
    """

    slots: list[Slot] = field(default_factory=list)
    obstacles: set[str] = field(default_factory=set)


def dependent_channels(model: nn.Module, example: Example) -> list[Dependents]:
    """Find the channels of a network that can only be removed together.

    Args:
        model: The network. It is run once, as a copy.
        example: An input of it.

    Returns:
        Every channel that a convolution or a linear layer writes is in exactly one of them.

    Raises:
        ImportError: If Torch-Pruning is not installed.
        ValueError: If Torch-Pruning can't follow the network's channels.

    >>> from spp_lightning.method.coupled.example import example_of
    >>> net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 1))
    >>> found = dependent_channels(net, example_of(net, (1, 3, 4, 4)))
    >>> sorted(found[-1].slots)
    [('0', 'out', 1), ('2', 'in', 4), ('2', 'in', 5), ('2', 'in', 6), ('2', 'in', 7)]
    >>> found[0].slots, found[0].obstacles
    ([('2', 'out', 0)], {'an output of the network'})
    """
    walk = _Walk(*_dependency_graph(model, example))
    found: dict[_Place, Dependents] = defaultdict(Dependents)
    for place, root in walk.places():
        dependents = found[root]
        slot = walk.slot(place)
        if isinstance(slot, str):
            dependents.obstacles.add(slot)
        elif slot is not None:
            dependents.slots.append(slot)
    return list(found.values())


def _dependency_graph(model: nn.Module, example: Example) -> tuple[Any, nn.Module]:
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(
            'granularity="coupled-channel" takes the dependencies of channels from Torch-Pruning,'
            ' which is not installed. Install it with `pip install "spp-lightning[coupled]"`.'
        ) from error
    twin = copy.deepcopy(model).eval()
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # it follows gradients
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters outside of layers, which are obstacles here
        graph = torch_pruning.DependencyGraph()
        try:
            graph.build_dependency(twin, example, forward_fn=_outputs, verbose=False)
        except Exception as error:  # whatever the network or Torch-Pruning may raise
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(
                '`granularity` must be another one than "coupled-channel" for this network:'
                f" Torch-Pruning can't follow its channels ({why})."
            ) from error
    return graph, twin


def _outputs(model: nn.Module, example: Example) -> list[Tensor]:
    """The network's outputs, each behind an operation: outputs of layers don't count as such."""
    leaves = tree_leaves(example.run(model))
    return [x * 1 for x in leaves if isinstance(x, Tensor) and x.requires_grad]


_Place = tuple[int, Side, int]  # number of a node, side, channel


class _Walk:
    """A walk over the dependency graph, which unites the channels that depend on each other."""

    def __init__(self, graph: Any, model: nn.Module) -> None:
        from torch_pruning import ops
        from torch_pruning._helpers import _HybridIndex

        self._types = ops.OPTYPE
        self._index: Callable[..., Any] = _HybridIndex
        self._graph = graph
        self._layers = {id(module): name for name, module in model.named_modules()}
        self._parameters = {id(p): name for name, p in model.named_parameters()}
        self._nodes = list(graph.module2node.values())
        self._numbers = {id(node): i for i, node in enumerate(self._nodes)}
        self._parent: dict[_Place, _Place] = {}
        for node in self._nodes:
            if node.type in (self._types.CONV, self._types.DEPTHWISE_CONV, self._types.LINEAR):
                handler = graph.get_pruner_of_module(node.module)
                self._walk(node, handler.prune_out_channels, handler.get_out_channels(node.module))
        for number, node in enumerate(self._nodes):
            if node.type == self._types.CONV and node.module.groups > 1:
                self._tie_conv_groups(number, node.module)

    def _walk(self, node: Any, function: Any, count: int) -> None:
        """Visit all channels that depend on those that a layer writes."""
        start = [i for i in range(count) if self._add(self._place(node, function, i))]
        waiting = [(node, function, start)]
        while waiting:
            node, function, channels = waiting.pop()
            for edge in node.dependencies:
                if not channels or not edge.is_triggered_by(function):
                    continue
                pairs = [self._index(idx=i, root_idx=i) for i in channels]
                for mapping in edge.index_mapping:
                    pairs = pairs if mapping is None else mapping(pairs)
                new = []
                for there, here in pairs:
                    place = self._place(edge.target, edge.handler, there)
                    if self._add(place):
                        new.append(there)
                    if here is not None:
                        self._unite(self._place(node, function, here), place)
                waiting.append((edge.target, edge.handler, new))

    def _tie_conv_groups(self, number: int, conv: Any) -> None:
        """Unite the channels of the same position in each group: the groups must stay alike."""
        sides: tuple[tuple[Side, int], ...]
        sides = ("in", conv.in_channels // conv.groups), ("out", conv.out_channels // conv.groups)
        for side, size in sides:
            for position in range(size):
                first = number, side, position
                if first not in self._parent:
                    continue
                for channel in range(position + size, size * conv.groups, size):
                    self._unite(first, (number, side, channel))

    def _place(self, node: Any, function: Any, channel: int) -> _Place:
        # Where both sides have the same channels, both functions are prune_out_channels.
        side: Side = "in" if function.__name__ == "prune_in_channels" else "out"
        return self._numbers[id(node)], side, channel

    def _add(self, place: _Place) -> bool:
        """Whether a place is visited for the first time."""
        return self._parent.setdefault(place, place) is place

    def _root(self, place: _Place) -> _Place:
        while self._parent[place] != place:
            self._parent[place] = self._parent[self._parent[place]]
            place = self._parent[place]
        return place

    def _unite(self, first: _Place, second: _Place) -> None:
        first, second = self._root(first), self._root(second)
        self._parent[max(first, second)] = min(first, second)

    def places(self) -> Iterator[tuple[_Place, _Place]]:
        """Every place, with the one that stands for all that depend on it."""
        for place in sorted(self._parent):
            yield place, self._root(place)

    def slot(self, place: _Place) -> Slot | str | None:
        """The channel of a layer at a place, or the obstacle there; None of other operations."""
        number, side, channel = place
        node = self._nodes[number]
        if node.type == self._types.OUTPUT:
            return "an output of the network"
        if node.type == self._types.PARAMETER:
            return f"the parameter {self._parameters.get(id(node.module))!r}"
        name = self._layers.get(id(node.module))
        return None if name is None else (name, side, channel)
