"""CompactNetwork: the executor of a list of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from spp_lightning.compaction.graph.between import Call, Gate, GlobalPool, find_calls
from spp_lightning.compaction.graph.heads import FlatLinear, find_heads
from spp_lightning.compaction.graph.join import Row, join
from spp_lightning.compaction.graph.program import REQUIRED, Program, compile_steps
from spp_lightning.compaction.graph.query import is_opaque
from spp_lightning.compaction.graph.steps import Step, steps_of, text_of
from spp_lightning.compaction.graph.stretches import join_instructions

__all__ = ["CompactNetwork"]

_NO_KWARGS: dict[str, Any] = {}


class CompactNetwork(nn.Module):
    """A network that runs a list of steps; no code is generated.

    ``compact()`` and ``load_compact()`` return one. Layers and tensors have the names that they
    have in the network it was made of. Compact layers in a row are computed by one call.

    Args:
        steps: The network; the last step is its output.
        layers: The modules that the steps call, by name.
        tensors: The tensors that the steps read, by name.

    Raises:
        ValueError: If a name is that of an attribute, or of something else in the network.

    >>> import torch
    >>> steps = steps_of(fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU())).graph)
    >>> layers = {"0": nn.Linear(2, 3), "1": nn.ReLU()}
    >>> network = CompactNetwork(steps, layers)
    >>> print(network)
    CompactNetwork(
      (0): Linear(in_features=2, out_features=3, bias=True)
      (1): ReLU()
    )
    input input
    _0 = self.0(input_1)
    _1 = self.1(_0)
    return _1
    >>> network(torch.ones(4, 2)).shape
    torch.Size([4, 3])
    """

    # Defaults of the class: what is an attribute of the class isn't free as a name.
    compact_steps: tuple[Step, ...] = ()
    _rows: tuple[Row, ...] = ()
    _between: tuple[Call | FlatLinear, ...] = ()
    _program: Program = compile_steps([Step("output", "output", "output", (None,))])

    def __init__(
        self,
        steps: Sequence[Step],
        layers: Mapping[str, nn.Module],
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.training = False
        places: dict[str, nn.Module | Tensor] = {**layers, **(tensors or {})}
        # A name inside of a layer comes behind the layer, which brings it along.
        for name in sorted(places, key=lambda name: any(x in layers for x in _above(name))):
            _place(self, name, places[name])
        self._set_steps(steps)

    def _set_steps(self, steps: Sequence[Step]) -> None:
        self.compact_steps = tuple(steps)
        steps, layer_of = self.compact_steps, self.get_submodule
        calls = find_calls(steps, layer_of)
        others = {position for call in calls for position in call.replaced}
        self._rows = join(steps, layer_of, others)
        others |= {position for row in self._rows for position in row.replaced}
        means = {call.result for call in calls if isinstance(call, GlobalPool) and not call.keeps}
        self._between = (*calls, *find_heads(steps, layer_of, means, others))
        self._compile()

    def _compile(self) -> None:
        program = compile_steps(self.compact_steps, self._rows, self._between)
        self._program = join_instructions(program, self.get_submodule)

    @classmethod
    def of(cls, graph: fx.GraphModule) -> CompactNetwork:
        """The network of a ``torch.fx`` graph; it shares the graph's layers and tensors."""
        steps = steps_of(graph.graph)
        layers = [str(step.target) for step in steps if step.kind == "layer"]
        tensors = [str(step.target) for step in steps if step.kind == "tensor"]
        return cls(
            steps,
            {name: graph.get_submodule(name) for name in layers},
            {name: _tensor_of(graph, name) for name in tensors},
        )

    @property
    def joined_layers(self) -> list[list[str]]:
        """Names of the layers that one call computes, call by call."""
        return [
            [str(self.compact_steps[i].target) for i in (*row.layers, row.linear) if i is not None]
            for row in self._rows
        ]

    @property
    def gated_layers(self) -> list[list[str]]:
        """Names of the two layers of each gate, which one call computes."""
        gates = [call for call in self._between if isinstance(call, Gate)]
        return [[str(self.compact_steps[i].target) for i in gate.layers] for gate in gates]

    @property
    def opaque_layers(self) -> list[str]:
        """Names of the modules that torch.fx couldn't trace, and that are called as they are."""
        names = dict.fromkeys(
            str(step.target) for step in self.compact_steps if step.kind == "layer"
        )
        return [name for name in names if is_opaque(self.get_submodule(name))]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the steps.

        Args:
            inputs: Those of the network that was compacted.
            named: Likewise, by name.

        Returns:
            What that network returns.

        Raises:
            TypeError: If an input is missing, or there is none of this name.
        """
        names, _, others, instructions, output = self._program
        if named or len(inputs) != len(names):
            inputs = _bind(self._program, inputs, named)
        slots = [*inputs, *others]
        for run, target, _, pick, kwargs, out, free in instructions:
            if kwargs:
                named = {key: slots[i] for key, i in kwargs}
                slots[out] = run(self, target, pick(slots), named)
            else:
                slots[out] = run(self, target, pick(slots), _NO_KWARGS)
            for i in free:
                slots[i] = None
        return slots[output]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_program"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compile()

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n{text_of(self.compact_steps)}"


def _bind(program: Program, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """All inputs in order, with defaults for those that aren't given."""
    names, count = program.inputs, len(inputs)
    if count > len(names):
        raise TypeError(f"The network takes {len(names)} inputs, got {count}.")
    wrong = [name for name in named if name not in names[count:]]
    if wrong:
        raise TypeError(f"The network has no other input {wrong[0]!r}; its inputs: {names}.")
    defaults = program.defaults[count:]
    values = tuple(
        named.get(name, default) for name, default in zip(names[count:], defaults, strict=True)
    )
    missing = [n for n, value in zip(names[count:], values, strict=True) if value is REQUIRED]
    if missing:
        raise TypeError(f"The network's input {missing[0]!r} is missing.")
    return inputs + values


def _above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _place(network: nn.Module, name: str, value: nn.Module | Tensor) -> None:
    """Register a layer or a tensor under its dotted name."""
    *parents, last = name.split(".")
    parent = network
    for part in parents:
        if part not in parent._modules and not hasattr(parent, part):  # which finds methods
            container = nn.Module()
            container.training = False
            parent.add_module(part, container)
        found = parent._modules.get(part)
        if found is None:
            raise ValueError(f"the name {name!r} isn't free: {part!r} is something else")
        parent = found
    if hasattr(type(parent), last) or getattr(parent, last, value) is not value:
        raise ValueError(f"the name {name!r} isn't free: {last!r} is something else")
    if hasattr(parent, last):
        return  # a tensor of one of the layers
    if isinstance(value, nn.Module):
        parent.add_module(last, value)
    elif isinstance(value, nn.Parameter):
        parent.register_parameter(last, value)
    else:
        parent.register_buffer(last, value)


def _tensor_of(graph: fx.GraphModule, name: str) -> Tensor:
    parent, _, last = name.rpartition(".")
    value = getattr(graph.get_submodule(parent), last)
    if not isinstance(value, Tensor):
        raise ValueError(f"`{name}` must be a tensor, got {type(value).__name__}")
    return value
