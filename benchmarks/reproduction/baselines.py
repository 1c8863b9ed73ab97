"""Trained baselines among the results: the rows of a schedule start from them on any machine."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from reproduction.training import ROOT, Run

__all__ = ["keep", "restore"]

FOLDER = ROOT / "benchmarks" / "results" / "baselines"


def keep(run: Run, folder: Path = FOLDER) -> Path:
    """Write the weights and the record of a finished baseline, without its optimizer, 0.4 MB.

    Returns:
        The file.
    """
    content = torch.load(run.final, map_location="cpu", weights_only=True)
    small = {
        "state_dict": content["state_dict"],
        "callbacks": {"Record": content["callbacks"]["Record"]},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = _path(run, folder)
    torch.save(small, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)
    return path


def restore(run: Run, folder: Path = FOLDER) -> bool:
    """Put a baseline where its run would leave it, unless one is there.

    Returns:
        Whether there is one now.
    """
    path = _path(run, folder)
    if not run.final.is_file() and path.is_file():
        run.folder.mkdir(parents=True, exist_ok=True)
        temporary = run.final.with_suffix(".tmp")
        temporary.write_bytes(path.read_bytes())
        os.replace(temporary, run.final)
    return run.final.is_file()


def _path(run: Run, folder: Path) -> Path:
    return folder / f"{run.schedule.name}_{run.precision}_seed{run.seed}.ckpt"
