"""Results as JSON lines: one finished run each, only ever appended."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["append", "read"]


def append(path: Path, line: dict[str, Any]) -> None:
    """Append a line; it is on the disk when this returns.

    A half-written line at the end, which a crash may have left, is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = (json.dumps(line) + "\n").encode()
    with path.open("a+b") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a file; none if there is no file.

    Raises:
        ValueError: If a whole line isn't JSON.
    """
    if not path.is_file():
        return []
    found = []
    for number, text in enumerate(path.read_text().splitlines(keepends=True), 1):
        if not text.endswith("\n"):
            break
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}, line {number}, must be JSON: {error}.") from error
    return found
