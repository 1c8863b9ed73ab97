"""Where tensors lie that live between two calls: one block of memory for one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

__all__ = ["Concatenated", "Freed", "Made", "lay_out"]

_LINE = 16  # numbers of a line of the cache: every block begins with one


class Made(NamedTuple):
    """A call makes a tensor of so many numbers."""

    name: Hashable
    numbers: int


class Concatenated(NamedTuple):
    """A call makes a tensor of others, one behind the other.

    Attributes:
        name: Of the tensor.
        numbers: How many it has.
        parts: Where each of the others begins in it.
    """

    name: Hashable
    numbers: int
    parts: Mapping[Hashable, int]


class Freed(NamedTuple):
    """No later call reads a tensor."""

    name: Hashable


Event = Made | Concatenated | Freed


class Layout(NamedTuple):
    """Places of tensors.

    Attributes:
        places: Block and first number of each, by name.
        sizes: Numbers of each block.
    """

    places: dict[Hashable, tuple[int, int]]
    sizes: list[int]


def lay_out(events: Sequence[Event], output: Hashable) -> Layout:
    """Places for the tensors that are made.

    What is concatenated lies in its place in the concatenation from the beginning, unless it lies
    in another one.

    Args:
        events: What happens to the tensors, in turn.
        output: Name of a tensor with a block of its own, which is the first one.

    >>> events = [Made("a", 5), Made("b", 20), Concatenated("ab", 25, {"a": 0, "b": 5})]
    >>> lay_out([*events, Freed("a"), Freed("b"), Made("y", 3)], "y")
    Layout(places={'a': (1, 0), 'b': (1, 5), 'ab': (1, 0), 'y': (0, 0)}, sizes=[3, 32])
    """
    inside = _inside(events)
    counts = {event.name: event.numbers for event in events if not isinstance(event, Freed)}
    whole = {name: _whole(name, inside) for name in counts}
    living = Counter(root for root, _ in whole.values())
    blocks = _Blocks()
    first = blocks.take(counts[output])
    place = {whole[output][0]: first}
    for event in events:
        if event.name not in whole:  # an input
            continue
        root = whole[event.name][0]
        if not isinstance(event, Freed):
            if root not in place:
                place[root] = blocks.take(counts[root])
            continue
        living[root] -= 1
        if not living[root] and place[root] != first:
            blocks.free(place[root])
    blocks.sizes[first] = counts[output]
    return Layout({name: (place[root], at) for name, (root, at) in whole.items()}, blocks.sizes)


def _inside(events: Sequence[Event]) -> dict[Hashable, tuple[Hashable, int]]:
    """In which concatenation a tensor lies, and where."""
    made: set[Hashable] = set()
    inside: dict[Hashable, tuple[Hashable, int]] = {}
    for event in events:
        if isinstance(event, Concatenated):
            for part, at in event.parts.items():
                if part in made:
                    inside.setdefault(part, (event.name, at))
        if not isinstance(event, Freed):
            made.add(event.name)
    return inside


def _whole(name: Hashable, inside: Mapping[Hashable, tuple[Hashable, int]]) -> tuple[Hashable, int]:
    """The largest concatenation that a tensor lies in, perhaps itself, and where."""
    first = 0
    while name in inside:
        name, at = inside[name]
        first += at
    return name, first


class _Blocks:
    """Blocks of memory, each for one tensor after the other.

    >>> blocks = _Blocks()
    >>> blocks.take(20), blocks.take(5)
    (0, 1)
    >>> blocks.free(0)
    >>> blocks.free(1)
    >>> blocks.take(3), blocks.take(40), blocks.sizes
    (1, 0, [48, 16])
    """

    def __init__(self) -> None:
        self._free: list[int] = []
        self.sizes: list[int] = []  # numbers of each block

    def take(self, count: int) -> int:
        size = -(-max(1, count) // _LINE) * _LINE
        # The smallest block that is large enough, or else the largest one, which grows.
        block = min(
            self._free,
            key=lambda i: (self.sizes[i] < size, abs(self.sizes[i] - size)),
            default=len(self.sizes),
        )
        if block == len(self.sizes):
            self.sizes.append(0)
        else:
            self._free.remove(block)
        self.sizes[block] = max(self.sizes[block], size)
        return block

    def free(self, block: int) -> None:
        self._free.append(block)
