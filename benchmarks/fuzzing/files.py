"""Damaged and crafted files, loaded and run by a process that is watched.

A crafted file has the right checksum. Loading must end with a network or a ValueError, soon, within
a bound of memory, and without running code or writing a file. Running a network that was loaded may
fail like any Python code, but may not crash, write a file, or change the network or its input.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from fuzzing.case import Failure
from fuzzing.craft import Change, draw_changes
from fuzzing.watched import serve

__all__ = ["FileCase", "check", "draw", "smaller"]

PATIENCE = 60  # seconds: a process that says nothing for so long hangs
NETWORKS = 4


@dataclass(frozen=True)
class FileCase:
    """A network's file, and what is changed in it."""

    network: int
    changes: tuple[Change, ...]


def draw(seed: int) -> FileCase:
    """A random case."""
    return FileCase(seed % NETWORKS, draw_changes(seed))


def smaller(case: FileCase) -> Iterator[FileCase]:
    """Cases with a change less."""
    for i in range(len(case.changes)):
        if len(case.changes) > 1:
            yield replace(case, changes=case.changes[:i] + case.changes[i + 1 :])


class _Worker:
    """The watched process, started anew when it is gone."""

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def ask(self, case: FileCase) -> tuple[str, str]:
        """What became of a case: a word, and in what way it is wrong, if it is."""
        if self._process is None or not self._process.is_alive():
            self._start()
        assert self._pipe is not None and self._process is not None
        self._pipe.send((case.network, case.changes))
        loaded = False
        while self._pipe.poll(PATIENCE):
            try:
                word, failure = self._pipe.recv()
            except EOFError:
                self._process.join()
                number = -(self._process.exitcode or 0)
                name = signal.Signals(number).name if number > 0 else str(-number)
                stage = "running" if loaded else "loading"
                return "crashed", f"{stage} a file ended the process: {name}"
            if word != "loaded":
                return word, failure
            loaded = True
        self.stop()
        if loaded:  # how long a network runs is not promised
            return "ran for too long", ""
        return "hung", f"loading a file took more than {PATIENCE} seconds"

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other,), daemon=True)
        self._process.start()
        other.close()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


_worker = _Worker()
atexit.register(_worker.stop)


def check(case: FileCase) -> str:
    """Load the file of a case and run its network in the watched process.

    Returns:
        What became of it: refused, ran, failed when it ran.

    Raises:
        Failure: If it did what no file may do.
    """
    word, failure = _worker.ask(case)
    if failure:
        raise Failure(failure)
    return word
