"""The file reader under atheris, which looks for inputs that reach new code. Needs atheris.

    pip install atheris
    PYTHONPATH=. python benchmarks/fuzzing/reader.py -max_total_time=600

What atheris makes up is the structure of a file, and its payload, with the right checksum. Anything
but a network or a ValueError is an error.
"""

from __future__ import annotations

import hashlib
import struct
import sys
import tempfile
import warnings
from pathlib import Path

import atheris
import torch

with atheris.instrument_imports(include=["spp_lightning.compaction.file", "json"]):
    from spp_lightning.compaction.file.container import load_compact

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fuzzing.samples import samples

PATH = Path(tempfile.mkdtemp()) / "net.spp"
NUMBERS = struct.Struct("<IQQ")
BEHIND_HEADER = 60
BETWEEN = b"\0"  # a byte that JSON doesn't have


def read(data: bytes) -> None:
    """Read a structure and a payload as a file."""
    structure, _, payload = data.partition(BETWEEN)
    numbers = NUMBERS.pack(2, len(structure), len(payload))
    checksum = hashlib.sha256(numbers + structure + payload).digest()
    PATH.write_bytes(b"\x89SPP\r\n\x1a\n" + numbers + checksum + data.replace(BETWEEN, b"", 1))
    try:
        load_compact(PATH, max_bytes=2**24)
    except ValueError:
        return


def corpus() -> Path:
    """A folder with the samples as such data."""
    folder = Path(tempfile.mkdtemp())
    for i, content in enumerate(samples(PATH)[0]):
        _, size, _ = NUMBERS.unpack_from(content, 8)
        structure, payload = content[BEHIND_HEADER:][:size], content[BEHIND_HEADER + size :]
        (folder / str(i)).write_bytes(structure + BETWEEN + payload)
    return folder


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    atheris.Setup([*sys.argv, str(corpus())], read)
    atheris.Fuzz()
