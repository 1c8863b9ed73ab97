"""The C++ sources: short functions, and headers that compile when they are opened alone."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parents[1] / "spp_lightning" / "native"
SOURCES = sorted(path for path in NATIVE.iterdir() if path.suffix in (".h", ".cpp"))
HEADERS = [path for path in SOURCES if path.suffix == ".h"]
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
MOST_LINES = 60  # of a function

# Braces that open no function: of a class, a namespace, an initializer.
_OTHER = re.compile(r"^(namespace|struct|class|enum|union|extern)\b|=\s*$|^\}")


def functions(text: str) -> dict[str, int]:
    """How many lines each outermost function takes, by its first line."""
    code = re.sub(r"//[^\n]*|\"(?:\\.|[^\"\\\n])*\"", lambda found: " " * len(found[0]), text)
    lengths: dict[str, int] = {}
    head, opened, inside = "", [], None
    for number, line in enumerate(code.split("\n")):
        if line.startswith("#"):
            continue
        for char in line:
            if char == "{":
                is_function = not _OTHER.search(head.strip()) and "(" in head
                if is_function and inside is None:
                    inside = (len(opened), number, head.strip())
                opened.append(number)
            elif char == "}":
                opened.pop()
                if inside is not None and inside[0] == len(opened):
                    lengths[inside[2]] = number - inside[1] + 1
                    inside = None
            head = "" if char in "{};" else head + char
        head += " "
    assert not opened
    return lengths


def test_functions_are_found_and_measured():
    text = "namespace a {\nstruct B {\n  int f(int x) const {\n    if (x) {\n      g();\n    }\n"
    assert functions(text + "  }\n};\n}\n") == {"int f(int x) const": 5}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_function_is_longer_than_a_screen(path):
    long = {head: n for head, n in functions(path.read_text()).items() if n > MOST_LINES}
    assert not long


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: path.name)
def test_a_header_may_be_included_twice(path):
    first = next(line for line in path.read_text().split("\n") if not line.startswith("//"))
    assert first == "#pragma once"


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_every_header_compiles_alone(tmp_path):
    source = tmp_path / "alone.cpp"
    # One compiler run for all: each in a namespace of its own would not be alone.
    wrong = {}
    for header in HEADERS:
        source.write_text(f'#include "{header.name}"\n')
        command = [COMPILER, "-std=gnu++17", "-fsyntax-only", f"-I{NATIVE}", str(source)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            wrong[header.name] = run.stderr
    assert not wrong


# Multiplies two registers of AMX, emulated, with shapes that the arguments say.
TILES = """
#include "tiles.h"
#include <cstdlib>
int main(int, char** words) {
  spp::base::TileShapes shapes = spp::base::kWholeTiles;
  shapes.rows[0] = std::atoi(words[1]);
  shapes.row_bytes[4] = std::atoi(words[2]);
  if (std::atoi(words[3])) spp::base::_tile_loadconfig(&shapes);
  spp::base::_tile_dpbsud(std::atoi(words[4]), 4, 6);
}
"""


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_emulated_tiles_refuse_what_amx_refuses(tmp_path):
    source, program = tmp_path / "tiles.cpp", tmp_path / "tiles"
    source.write_text(TILES)
    command = [COMPILER, "-std=gnu++17", f"-I{NATIVE}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)

    def told(*numbers):  # rows of tile 0, bytes of a row of tile 4, whether configured, the sums
        words = [str(program), *map(str, numbers)]
        return subprocess.run(words, capture_output=True, text=True).stderr

    assert told(16, 64, 1, 0) == ""
    assert "at most 16 rows of 64 bytes" in told(17, 64, 1, 0)
    assert "at most 16 rows of 64 bytes" in told(16, 68, 1, 0)
    assert "must be configured" in told(16, 64, 0, 0)
    assert "shapes of a product must fit" in told(15, 64, 1, 0)
    assert "shapes of a product must fit" in told(16, 32, 1, 0)
    assert "must be three" in told(16, 64, 1, 4)
