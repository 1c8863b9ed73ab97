"""What figures depend on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

__all__ = ["RESULTS", "ROOT", "commit_of", "context", "data_of"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def context(*packages: str, device: str = "cpu", **more: Any) -> dict[str, Any]:
    """Device, versions, date, commit and command, for a row of results.

    Args:
        packages: Whose versions count, besides torch's.
        device: ``"cpu"`` or ``"cuda"``.
        more: What else the figures depend on, such as ``data``, ``seed``, and ``threads`` where the
            rows don't say how many.
    """
    about: dict[str, Any] = {"command": command()}
    about["device"] = torch.cuda.get_device_name() if device == "cuda" else processor()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    about["versions"] = versions | {name: version(name) for name in packages}
    return about | more | {"date": date.today().isoformat(), "commit": commit_of(ROOT)}


def command() -> str:
    """The command line of this process, without folders outside the repository."""
    words = [sys.argv[0], *sys.argv[1:]]
    names = [os.path.basename(word) if os.path.isabs(word) else word for word in words]
    script = Path(sys.argv[0]).resolve()
    if script.is_relative_to(ROOT):
        names[0] = str(script.relative_to(ROOT))
    return " ".join(["python", *names])


def commit_of(folder: Path) -> str:
    """A checkout's commit; "a1b2c3d, changed" if files differ from it, results left out."""
    name = _git(folder, "rev-parse", "--short", "HEAD")
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    changed = [x for x in status.splitlines() if "benchmarks/results/" not in x]
    return f"{name}, changed" if changed else name


def processor() -> str:
    """The CPU's name and its number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()


def data_of(folder: Path) -> str:
    """Which CIFAR-10 a folder holds."""
    jpeg = any((folder / "train").glob("*/*.jpg"))
    return "CIFAR-10 (JPEG q75)" if jpeg else "CIFAR-10"


def _git(folder: Path, *words: str) -> str:
    arguments: Sequence[str] = ["git", "-C", str(folder), *words]
    return subprocess.run(arguments, capture_output=True, text=True).stdout.strip()
