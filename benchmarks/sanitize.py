"""Look for memory errors and undefined behaviour in the CPU kernels, on random shapes.

    python benchmarks/sanitize.py
    python benchmarks/sanitize.py --save

Builds the kernels with a driver that needs no torch (``sanitize.cpp``, ``sanitize_int8*.cpp``) and
runs it with every instruction set of this machine: once under AddressSanitizer and
UndefinedBehaviorSanitizer, once under valgrind's memcheck where there is one, which sees results
that depend on memory nobody wrote. Tensors and the kernels' own buffers have exactly the size that
was asked for, in fresh memory. The results are compared with loops in double precision, and those
of int8 layers with exact sums.

ThreadSanitizer is left out: it doesn't know libgomp's barriers and reports every one of them.

Exits with 1 after any report or difference. ``--save`` writes ``benchmarks/results/sanitize.md``.
It is here and not among the tests since it compiles for a minute and writes a result.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "spp_lightning" / "native"
RESULT = ROOT / "benchmarks" / "results" / "sanitize.md"
SETS = ("base", "avx2", "avx512")
INT8_SETS = (
    *("int8-base", "int8-avx2", "int8-avx_vnni", "int8-avx512_vnni", "int8-amx"),
    *("int8-avx_vnni_emulated", "int8-avx512_vnni_emulated", "int8-amx_emulated"),
)
REDZONE = 1024  # bytes around each block: more than a tile may reach too far
# Int8 outputs are compared bit for bit: no fused multiply-adds that the sources don't ask for.
FLAGS = [
    *("-std=gnu++17", "-g", "-fno-omit-frame-pointer", "-fno-math-errno", "-fopenmp"),
    "-ffp-contract=off",
]
CHECKS = {
    "address,undefined": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "memcheck": ["-O1"],
}


def build(compiler: str, flags: list[str], program: Path) -> None:
    """Compile the kernels and the driver."""
    # The second one: non-temporal stores with AVX2, too.
    macros = ["-DSPP_EXACT_BUFFERS", "-DSPP_STORES_NON_TEMPORAL=1"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        macros.append("-DSPP_X86=1")
    drivers = sorted((ROOT / "benchmarks").glob("sanitize*.cpp"))
    sources = map(str, (*drivers, *sorted(NATIVE.glob("*.cpp"))))
    command = [compiler, *FLAGS, *flags, *macros, f"-I{NATIVE}", *sources, "-o", str(program)]
    subprocess.run(command, check=True)


def version(program: str) -> str:
    """The first line of what a program says about itself."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    return said.stdout.splitlines()[0]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--compiler", default=os.environ.get("CXX", "g++"))
    parser.add_argument("--shapes", type=int, default=2000, help="per instruction set")
    parser.add_argument("--memcheck-shapes", type=int, default=200, help="valgrind takes longer")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/sanitize.md")
    arguments = parser.parse_args()
    environment = {
        **os.environ,
        "OMP_WAIT_POLICY": "passive",
        # Not stack use after return: g++ 12 then keeps AVX-512 vectors where they aren't aligned
        # (its bug 110027), and stops at the first one.
        "ASAN_OPTIONS": f"redzone={REDZONE}:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    rows, passed = [], True
    for name, flags in CHECKS.items():
        before, tool, shapes = [], version(arguments.compiler), arguments.shapes
        if name == "memcheck":
            if shutil.which("valgrind") is None:
                rows.append(f"| {name} | no valgrind here | | | | not run |")
                continue
            before = ["valgrind", "-q", "--error-exitcode=9", f"--redzone-size={REDZONE}"]
            shapes = arguments.memcheck_shapes
            tool = f"{version('valgrind')}, {tool}"
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder, "driver")
            build(arguments.compiler, flags, program)
            start = time.perf_counter()
            run = subprocess.run(
                [*before, str(program), str(shapes), *SETS, *INT8_SETS],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            seconds = time.perf_counter() - start
        print(run.stdout, end="", flush=True)
        ran = [line.split(":")[0] for line in run.stdout.splitlines() if line.endswith(" shapes")]
        good = run.returncode == 0 and bool(ran)
        passed = passed and good
        told = "no report" if good else f"**reports; exit code {run.returncode}**"
        rows.append(
            f"| {name} | {tool}, {' '.join(flags)} | {', '.join(ran)} | {shapes} | {seconds:.0f} s"
            f" | {told} |"
        )
    if arguments.save:
        lines = [
            "# Sanitizers on the CPU kernels",
            "",
            f"`python benchmarks/sanitize.py --save`, {date.today()}, commit {commit or 'unknown'},"
            f" {platform.machine()}. Each shape:",
            "all kernels on 1, 2 and 3 threads, in float32 and bfloat16; a chain of it and a layer",
            "behind it; all gradients, with and without the epilogue, on 1 and 2 threads. Calls",
            "with a tensor that is too short or too long must be refused. Int8 kernels, on 1, 2",
            "and 3 threads, are compared bit for bit.",
            "",
            "| check | tools | instruction sets | shapes each | time | result |",
            "|---|---|---|---|---|---|",
            *rows,
        ]
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text("\n".join(lines) + "\n")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
