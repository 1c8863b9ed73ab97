"""The process that loads and runs hostile files: little memory and time, every write seen."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

__all__ = ["serve"]

MAX_BYTES = 2**26  # that a file's tensors may take
MOST_MEMORY = 2**29  # by which loading may raise the process's memory, a structure included
ROOM = 3 * 2**30  # of addresses, beyond what the process has before the first file
SECONDS = 20  # for loading, and for running


class _Events:
    """What Python's audit hooks say while a file is loaded and run."""

    REFUSED = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.dlopen", "pickle.find_class")

    def __init__(self) -> None:
        self.armed, self.seen = False, list[str]()
        sys.addaudithook(self._note)

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event == "open":
            mode, flags = args[1], args[2] or 0
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND)
            if writes or (isinstance(mode, str) and set(mode) & set("wax+")):
                self.seen.append(f"{event} {args[0]!r} to write")
        elif event == "exec" and _is_generated(args[0]):
            self.seen.append(f"exec of {args[0]!r}")
        elif event.startswith(self.REFUSED) and event not in ("os.listdir", "os.scandir"):
            self.seen.append(f"{event} {args!r}")


def _is_generated(code: Any) -> bool:
    """Whether code is of no file, and isn't run by a module of Python or torch that is imported."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return False
        frame = frame.f_back
    name = getattr(code, "co_filename", "<string>")
    return not name.startswith("<frozen") and not os.path.exists(name)


def serve(pipe: Connection) -> None:
    """Load and run files as long as the pipe is open: a word and a failure, or none, for each."""
    sys.dont_write_bytecode = True
    warnings.simplefilter("ignore")
    import torch

    from fuzzing.craft import apply
    from fuzzing.samples import samples

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.spp"
        contents, x = samples(path)
        os.chdir(folder)
        (Path(folder) / "canary").mkdir()
        os.chdir("canary")
        signal.signal(signal.SIGALRM, _stop)
        for content in contents:  # torch imports modules and makes a folder when it is first used
            path.write_bytes(content)
            _run(_load(path), x)
            _run(_load(path).double(), x.double())
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
        events = _Events()
        while True:
            try:
                network, changes = pipe.recv()
            except EOFError:
                return
            path.write_bytes(apply(contents[network], changes))
            events.seen.clear()
            pipe.send(_outcome(path, x, events, pipe))


class _TooLong(BaseException):
    pass


def _stop(*_: object) -> None:
    raise _TooLong


def _load(path: Path) -> Any:
    from spp_lightning.compaction.file.container import load_compact

    return load_compact(path, max_bytes=MAX_BYTES)


def _run(network: Any, x: Any) -> Any:
    import torch

    with torch.no_grad():
        return network(x.clone())


def _outcome(path: Path, x: Any, events: _Events, pipe: Connection) -> tuple[str, str]:
    before = _memory()
    events.armed = True
    signal.alarm(SECONDS)
    try:
        network = _load(path)
    except ValueError:
        network = None
    except _TooLong:
        return "loaded for too long", f"loading took more than {SECONDS} seconds"
    except BaseException as error:
        return "loading failed", f"loading raised {type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        events.armed = False
    if _memory() - before > MOST_MEMORY:
        return "too much memory", f"loading took {_memory() - before} bytes"
    word = "refused"
    if network is not None:
        pipe.send(("loaded", ""))
        word, failure = _run_watched(network, x, events)
        if failure:
            return word, failure
    if events.seen:
        return "did something", f"a file caused {events.seen[:3]}"
    if os.listdir("."):
        return "wrote", f"a file wrote {os.listdir('.')}"
    return word, ""


def _run_watched(network: Any, x: Any, events: _Events) -> tuple[str, str]:
    import torch

    kept = {name: value.clone() for name, value in network.state_dict().items()}
    given, word = x.clone(), "ran"
    events.armed = True
    signal.alarm(SECONDS)
    try:
        with torch.no_grad():
            network(given)
    except _TooLong:
        word = "ran for too long"
    except Exception:
        word = "failed when it ran"
    finally:
        signal.alarm(0)
        events.armed = False
    if not torch.equal(given, x):
        return "wrote", "a network wrote to its input"
    for name, value in network.state_dict().items():
        if value.shape != kept[name].shape or not _same(value, kept[name]):
            return "wrote", f"a network wrote to its tensor {name}"
    return word, ""


def _same(first: Any, second: Any) -> bool:
    import torch

    equal: bool = torch.equal(first.nan_to_num(), second.nan_to_num())
    return equal


def _memory() -> int:
    """The most memory that the process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
