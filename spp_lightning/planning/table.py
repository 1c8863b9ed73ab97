"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["short_count", "text_table"]


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Lay out cells in columns.

    Args:
        head: Names of the columns.
        rows: The cells of each row.
        left: How many of the first columns are flush left; the others are flush right.

    >>> print(text_table(["layer", "ms"], [["conv1", "12.5"], ["a", "3"]]))
    layer    ms
    conv1  12.5
    a         3
    """
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]
    return "\n".join(lines)


def short_count(count: float) -> str:
    """A large count with three digits and a unit: thousands, millions, billions.

    >>> short_count(999), short_count(12_345), short_count(1_814_073_344)
    ('999', '12.3 k', '1.81 G')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g}"
