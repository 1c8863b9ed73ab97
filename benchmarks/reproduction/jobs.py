"""Runs in processes of their own, several at a time, with progress and the time left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from reproduction.rows import BASELINE
from reproduction.training import SAY_EVERY, Run

__all__ = ["JobError", "cores", "finish"]


class JobError(RuntimeError):
    """A run ended without a result."""


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def finish(
    stages: Iterator[list[Run]],
    total_steps: int,
    jobs: int,
    compiled: bool,
    keep: Callable[[dict[str, Any]], None],
) -> list[JobError]:
    """Train runs to their ends; those of a stage begin when the stage before it is over.

    If a run fails, the others go on. Ctrl-C stops all runs. The next call goes on from their last
    checkpoints.

    Args:
        stages: The runs of each stage.
        total_steps: Optimizer steps of all runs, for the progress bar and its time left.
        jobs: How many runs train side by side.
        compiled: Whether they train with ``torch.compile``.
        keep: Called with each finished line, never by two threads at once.

    Returns:
        The errors of the runs that failed.
    """
    lock = threading.Lock()
    stopping = threading.Event()
    failed: list[JobError] = []
    started: set[subprocess.Popen[str]] = set()
    bar = tqdm(total=total_steps, unit="step", smoothing=0, dynamic_ncols=True)

    def one(run: Run) -> None:
        done = 0
        if run.configuration != BASELINE and not run.baseline.final.is_file():
            raise JobError(f"{run.folder.name} can't start: its baseline isn't there")
        run.folder.mkdir(parents=True, exist_ok=True)
        with (run.folder / "log.txt").open("a") as log:
            process = _start(run, log, max(1, cores() // jobs), compiled)
            started.add(process)
            if stopping.is_set():
                process.terminate()
            line = None
            for text in process.stdout or ():
                message = _message(text)
                line = message.get("line", line)
                if "step" in message:
                    with lock:
                        if not done:  # a resumed run: its earlier steps don't count
                            done = message["step"] - SAY_EVERY
                            bar.total -= done
                        bar.update(message["step"] - done)
                    done = message["step"]
            code = process.wait()
            started.discard(process)
        if line is None:
            raise JobError(
                f"{run.folder.name} ended with code {code}; see {run.folder / 'log.txt'}"
            )
        with lock:
            keep(line)
            bar.write(f"{run.folder.name}: {line['accuracy']:.2f} %")

    with bar, ThreadPoolExecutor(jobs) as pool:
        try:
            for stage in stages:
                for future in as_completed([pool.submit(one, run) for run in stage]):
                    error = future.exception()
                    if isinstance(error, JobError):
                        failed.append(error)
                        bar.write(str(error))
                    elif error is not None:
                        raise error
        finally:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(started):
                process.terminate()
    return failed


def _message(text: str) -> dict[str, Any]:
    """The message in a line that a run printed; empty if a library printed the line."""
    try:
        message = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return message if isinstance(message, dict) else {}


def _start(run: Run, log: Any, threads: int, compiled: bool) -> subprocess.Popen[str]:
    folder = Path(__file__).resolve().parents[1]
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "reproduction.training"),
            *(str(run.runs), str(run.data), run.schedule.name, run.precision, str(run.seed)),
            "compiled" if compiled else "eager",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env={"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONPATH": os.pathsep.join(path)},
    )
    assert process.stdin is not None
    with process.stdin:
        json.dump(run.configuration.as_dict(), process.stdin)
    return process
