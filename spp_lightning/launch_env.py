"""The Trainer arguments that a launcher left in the environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def launcher_options() -> dict[str, Any]:
    """Trainer arguments that ``lightning run`` or ``fabric run`` was started with.

    The Trainer does not look for them itself: without them, every process would train on its own.
    Use ``Trainer(**launcher_options(), max_epochs=10)``.

    Returns:
        Those of ``accelerator``, ``devices``, ``strategy``, ``num_nodes`` and ``precision`` that
        the launcher set; nothing if the script was started without a launcher.

    Raises:
        ValueError: If one of the ``LT_*`` environment variables is malformed.

    >>> os.environ.update(LT_DEVICES="0,1", LT_STRATEGY="ddp")
    >>> launcher_options()
    {'devices': [0, 1], 'strategy': 'ddp'}
    >>> del os.environ["LT_DEVICES"], os.environ["LT_STRATEGY"]
    >>> launcher_options()
    {}
    """
    parsers: dict[str, tuple[Callable[[str], Any], str]] = {
        "accelerator": (_name, "a name"),
        "devices": (
            _devices,
            "a count of at least 1, -1, 'auto' or distinct indices such as '0,1'",
        ),
        "strategy": (_name, "a name"),
        "num_nodes": (_count, "a count of at least 1"),
        "precision": (_name, "a name"),
    }
    options = {}
    for key, (parse, rule) in parsers.items():
        variable = f"LT_{key.upper()}"
        if variable in os.environ:
            value = os.environ[variable]
            try:
                options[key] = parse(value)
            except ValueError:
                raise ValueError(f"`{variable}` must be {rule}, got {value!r}.") from None
    return options


def _name(text: str) -> str:
    if not text.strip():
        raise ValueError
    return text.strip()


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise ValueError
    return count


def _devices(text: str) -> int | list[int]:
    if text.strip() == "auto":
        # The launcher starts one process for "auto"; the Trainer would take every GPU.
        return 1
    if "," in text:
        # A comma at the end makes one index a list: "1," is the device 1, "1" is one device.
        indices = [int(part) for part in text.strip().removesuffix(",").split(",")]
        if min(indices) < 0 or len(set(indices)) < len(indices):
            raise ValueError
        return indices
    return -1 if text.strip() == "-1" else _count(text)
