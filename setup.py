"""Builds the CPU kernels with the system's compiler; without one the package installs without."""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("spp_lightning/native")
# No -ffast-math: it would make the whole process flush denormal numbers to zero.
FLAGS = ["-std=gnu++17", "-O3", "-fno-math-errno", "-fvisibility=hidden"]


class build_kernels(build_ext):
    """Compiles the sources side by side, with OpenMP where the compiler has it."""

    def build_extension(self, ext: Extension) -> None:  # noqa: D102
        if self._compiles("-fopenmp"):
            ext.extra_compile_args.append("-fopenmp")
            ext.extra_link_args.append("-fopenmp")
        if platform.machine().lower() in ("x86_64", "amd64"):
            ext.define_macros.append(("SPP_X86", "1"))
        compile_one = self.compiler.compile

        def compile_all(sources, *args, **kwargs):
            with ThreadPoolExecutor() as pool:
                done = pool.map(lambda source: compile_one([source], *args, **kwargs), sources)
            return [file for files in done for file in files]

        self.compiler.compile = compile_all
        super().build_extension(ext)

    def _compiles(self, flag: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "try.cpp")
            source.write_text("int main() { return 0; }\n")
            command = [
                *self.compiler.compiler_so,
                flag,
                str(source),
                "-o",
                str(Path(folder, "try")),
            ]
            try:
                return subprocess.run(command, capture_output=True).returncode == 0
            except OSError:
                return False


setup(
    ext_modules=[
        Extension(
            "spp_lightning.native.kernels",
            sources=sorted(str(path) for path in NATIVE.glob("*.cpp")),
            depends=sorted(str(path) for path in NATIVE.iterdir() if path.suffix == ".h"),
            language="c++",
            extra_compile_args=FLAGS,
            optional=True,
        )
    ]
    if sys.platform != "win32"
    else [],
    cmdclass={"build_ext": build_kernels},
)
