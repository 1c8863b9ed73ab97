"""Bounded tables: nothing may grow with the number of input shapes that a network sees."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["MOST_SHAPES", "ShapeTable"]

MOST_SHAPES = 32

T = TypeVar("T")


class ShapeTable(Generic[T]):
    """What was prepared for input shapes; of more than 32, the ones used last.

    Several threads may use one table.

    >>> table = ShapeTable[int](2)
    >>> for key in "abac":
    ...     _ = table.get(key) or table.put(key, ord(key))
    >>> [table.get(key) for key in "abc"]
    [97, None, 99]
    """

    def __init__(self, most: int = MOST_SHAPES) -> None:
        self._entries: OrderedDict[Hashable, T] = OrderedDict()
        self._last: tuple[Hashable, T | None] = (None, None)  # most calls ask for it again
        self._most = most

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> T | None:
        """The entry of a key, which becomes the one used last; None without one."""
        last = self._last
        if last[0] == key:
            return last[1]
        try:
            found = self._entries[key]
            self._entries.move_to_end(key)
        except KeyError:  # there is none, or another thread has just put it out
            return None
        self._last = (key, found)
        return found

    def put(self, key: Hashable, value: T) -> T:
        """Add an entry, and put out the one that wasn't used for longest; returns ``value``."""
        self._entries[key] = value
        self._last = (key, value)
        while len(self._entries) > self._most:
            self._entries.popitem(last=False)
        return value

    def pop(self, key: Hashable) -> None:
        """Remove the entry of a key, if there is one."""
        self._last = (None, None)
        self._entries.pop(key, None)
