"""The Triton kernels against dense convolutions in float64; run as a script, the checks themselves.

No GPU is needed. Triton's interpreter runs the kernels on CPU tensors, but only if an environment
variable is set before triton is imported, and other tests import it; so all cases run in a process
of their own, and each is reported by a test of its own. A second process compiles the kernels for
a GPU, since the interpreter takes things that the compiler doesn't.
"""

import functools
import importlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import traceback
import types
import typing
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

ROOT = Path(__file__).parents[3]
PACKAGE = "spp_lightning.compaction.kernels.gpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of ‖out‖


class Case(typing.NamedTuple):
    """A convolution, and what is kept of it: a share of all columns, or one per group."""

    channels: int = 3
    filters: int = 5
    size: tuple[int, int] = (7, 9)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    keep: float | tuple[float, ...] = 0.5
    batch: int = 2
    dtype: torch.dtype = torch.float32
    last: bool = False  # channels-last, its columns in `channels_last_order`
    bias: bool = True
    residual: bool = False
    clamp: tuple[float, float] = (-math.inf, math.inf)
    window: bool = False  # x and the gradient are windows of larger tensors full of NaN


CASES = {
    "plain": Case(),
    "several tiles": Case(channels=8, filters=19, batch=3),
    "one image, even kernel": Case(batch=1, kernel=(2, 4), padding=(0, 3)),
    "stride": Case(channels=4, stride=(2, 2)),
    "dilation": Case(channels=4, size=(9, 8), stride=(2, 1), padding=(2, 3), dilation=(2, 3)),
    "no padding": Case(padding=(0, 0), bias=False),
    "padding wider than the kernel": Case(size=(2, 3), padding=(4, 3), stride=(2, 3)),
    "1x1": Case(channels=40, kernel=(1, 1), padding=(0, 0), stride=(2, 2)),
    "image of one pixel": Case(size=(1, 1), channels=4),
    "two unequal groups": Case(channels=6, filters=8, groups=2, keep=(0.2, 0.9)),
    "four groups, one empty": Case(channels=8, filters=12, groups=4, keep=(0.9, 0.0, 0.3, 0.5)),
    "as many groups as channels": Case(channels=20, filters=40, groups=20, keep=0.4),
    "no column": Case(keep=0.0),
    "no column, no bias": Case(keep=0.0, bias=False, last=True, channels=4),
    "one column": Case(keep=1e-9),
    "all columns": Case(keep=1.0),
    "no image": Case(batch=0),
    "residual, clamp": Case(filters=19, residual=True, clamp=(-0.5, 1.5)),
    "relu": Case(bias=False, clamp=(0.0, math.inf)),
    "window": Case(channels=4, window=True, stride=(1, 2)),
    "last": Case(channels=8, filters=19, batch=3, last=True),
    "last, stride": Case(channels=8, size=(8, 7), stride=(2, 1), dilation=(1, 2), last=True),
    "last, groups": Case(channels=12, filters=8, groups=4, keep=(0.9, 0.0, 0.3, 0.5), last=True),
    "last, residual, clamp": Case(channels=8, residual=True, clamp=(0.0, 2.0), last=True),
    "last, window": Case(channels=4, window=True, last=True),
    "float16": Case(channels=8, filters=19, dtype=torch.float16, residual=True),
    "float16, last": Case(channels=8, filters=19, dtype=torch.float16, last=True),
    "bfloat16": Case(channels=8, filters=19, dtype=torch.bfloat16),
    "bfloat16, last": Case(channels=8, dtype=torch.bfloat16, last=True, residual=True),
}
OTHERS = [
    "importable without triton",
    "refuses",
    "nan passes the clamp",
    "long sums",
    "table, padding",
]
KERNELS = {  # and the modules that launch them
    "make_table": "tables",
    "forward": "forward",
    "transposed_product": "backward_input",
    "gather_input": "backward_input",
    "make_pixels": "backward_weight",
    "weight_gradient": "backward_weight",
}
LAYOUTS = (("first", "float16"), ("last", "float32"))
COMPILED = [f"{kernel}, {layout}, {dtype}" for layout, dtype in LAYOUTS for kernel in KERNELS]

# Triton builds small libraries of its own.
COMPILERS = [os.environ["CC"]] if "CC" in os.environ else ["clang", "gcc"]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not any(map(shutil.which, COMPILERS)),
    reason="no triton, which has no wheels for this platform, or no C compiler for it",
)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    return report("interpret", TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return report("compile", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))


@needs_triton
@pytest.mark.parametrize("name", [*CASES, *OTHERS])
def test_interpreted(interpreted: dict[str, str], name: str) -> None:
    assert not interpreted[name], interpreted[name]


@needs_triton
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_for_hopper(compiled: dict[str, str], name: str) -> None:
    assert not compiled[name], compiled[name]


def report(mode: str, **variables: str) -> dict[str, str]:
    """Run this file: what is wrong with each case, nothing if nothing is."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    run = subprocess.run(
        [sys.executable, __file__, mode], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@functools.cache
def source() -> Path:
    """The folder that holds the package: of this checkout, or where it is installed without one."""
    if (ROOT / "spp_lightning").is_dir():
        return ROOT
    installed = importlib.util.find_spec("spp_lightning")
    assert installed is not None and installed.origin is not None
    return Path(installed.origin).parents[1]


def load_kernels() -> typing.Any:
    """Import the kernels' package, anew, from this checkout, or as it is installed without one.

    The packages that it is in are left empty: they would import Lightning, which takes longer than
    the tests.
    """
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        del sys.modules[name]
    source()  # before the package is replaced
    for name in ("spp_lightning", "spp_lightning.compaction"):
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = [str(source().joinpath(*name.split(".")))]
    return importlib.import_module(PACKAGE)


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    assert result.shape == expected.shape, (result.shape, expected.shape)
    error = (result.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    return error.item() if result.numel() else 0.0


def check(tk: typing.Any, case: Case) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator).to(case.dtype)
        if case.last and len(shape) == 4:
            values = values.contiguous(memory_format=torch.channels_last)
        if case.window and len(shape) == 4:
            large = torch.empty((shape[0], shape[1] + 2, shape[2] + 4, shape[3] + 4))
            form = torch.channels_last if case.last else torch.contiguous_format
            large = large.to(case.dtype).fill_(math.nan).contiguous(memory_format=form)
            window = large[:, 1:-1, 2:-2, 2:-2]
            values = window.copy_(values)
        return values

    groups, filters = case.groups, case.filters // case.groups
    taps = math.prod(case.kernel)
    per_group = case.channels // groups * taps
    keep = case.keep if isinstance(case.keep, tuple) else (case.keep,) * groups
    shares = torch.tensor(keep).repeat_interleave(per_group)
    kept = torch.rand(groups * per_group, generator=generator) < shares
    kept[per_group // 2] |= case.keep == 1e-9
    columns = kept.nonzero().flatten().int()
    weight = draw(filters, len(columns))
    if case.last:
        order = tk.channels_last_order(columns, case.kernel, groups, case.channels)
        assert torch.equal(order.sort().values, torch.arange(len(columns)))
        columns, weight = columns[order], weight[:, order]
    dense = torch.zeros(groups, per_group, filters, dtype=torch.float64)
    group, column = columns.long() // per_group, columns.long() % per_group
    dense[group, column] = weight.double().T
    dense = dense.mT.reshape(case.filters, case.channels // groups, *case.kernel)
    dense.requires_grad_()
    x = draw(case.batch, case.channels, *case.size)
    bias = draw(case.filters) if case.bias else None
    exact = x.double().requires_grad_()
    geometry = (case.stride, case.padding, case.dilation, groups)
    convolved = F.conv2d(exact, dense, None if bias is None else bias.double(), *geometry)
    residual = draw(*convolved.shape) if case.residual else None
    expected = convolved if residual is None else convolved + residual.double()
    expected = expected.clamp(*case.clamp)

    y = tk.column_conv2d(
        x, weight, columns, bias, case.kernel, *geometry, residual, clamp=case.clamp
    )
    tolerance = TOLERANCE[case.dtype]
    assert y.dtype == case.dtype
    assert relative(y, expected) < tolerance, relative(y, expected)
    if case.last:
        assert y.is_contiguous(memory_format=torch.channels_last)
    else:
        assert y.is_contiguous()

    grad = draw(*convolved.shape)
    convolved.backward(grad.double())
    arguments = (columns, x.shape, case.kernel, *geometry)
    dx = tk.column_conv2d_backward_input(grad, weight, *arguments)
    assert dx.dtype == case.dtype
    assert relative(dx, exact.grad) < tolerance, relative(dx, exact.grad)
    if case.last:
        assert dx.is_contiguous(memory_format=torch.channels_last)
    dw = tk.column_conv2d_backward_weight(grad, x, columns, case.kernel, *geometry)
    assert dw.dtype == case.dtype
    expected = dense.grad.reshape(groups, filters, per_group).mT[group, column].T
    assert relative(dw, expected) < tolerance, relative(dw, expected)


def check_other(tk: typing.Any, name: str) -> None:
    x, weight = torch.randn(1, 2, 5, 5), torch.randn(4, 3)
    columns = torch.tensor([0, 4, 16], dtype=torch.int32)
    geometry = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    if name == "importable without triton":
        modules = dict(sys.modules)
        sys.modules["triton"] = None
        try:
            assert not load_kernels().is_available()
        finally:
            sys.modules.update(modules)
        assert tk.is_available()
    elif name == "refuses":
        with pytest.raises(TypeError, match=r"got torch\.float64"):
            tk.column_conv2d(x.double(), weight.double(), columns, None, *geometry)
        with pytest.raises(TypeError, match=r"one dtype, got torch\.float32 and torch\.float16"):
            tk.column_conv2d(x, weight.half(), columns, None, *geometry)
        with pytest.raises(ValueError, match=r"`kernel_size` must be at most 15, got \(1, 16\)"):
            tk.column_conv2d(x, weight, columns, None, (1, 16), *geometry[1:])
    elif name == "nan passes the clamp":
        x[0, 0, 2, 2] = math.nan  # under (0, 0) and (1, 1) of channel 0
        y = tk.column_conv2d(x, weight, columns, None, *geometry, clamp=(0.0, 1.0))
        assert y[0, 0].isnan().nonzero().tolist() == [[2, 2], [3, 3]]
    elif name == "long sums":  # the weight's gradient from several shares, the input's in chunks
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tk.backward_input, "_CACHED", 2000)
            patch.setattr(tk.backward_weight, "_PROGRAMS", 8)
            check(tk, Case(channels=2, size=(16, 18), batch=8))
    elif name == "table, padding":
        table = tk.column_table(columns, x, (3, 3), (1, 1))
        assert table[:, :4].tolist() == [
            [0, 6, 36, 0],
            [1 | 1 << 15, 2 | 2 << 15, 4 | 2 << 15, 1 << 30],
        ]
        given = tk.column_conv2d(x, weight, columns, None, *geometry, table=table)
        assert torch.equal(given, tk.column_conv2d(x, weight, columns, None, *geometry))
        padded = F.pad(weight, (0, 13))
        assert torch.equal(given, tk.column_conv2d(x, padded, columns, None, *geometry))
        arguments = (columns, x.shape, *geometry)
        dx = tk.column_conv2d_backward_input(given, padded, *arguments)
        assert torch.equal(dx, tk.column_conv2d_backward_input(given, weight, *arguments))


def interpret() -> dict[str, str]:
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    def as_float32(handle: typing.Any) -> typing.Any:
        if handle.dtype != tl.bfloat16:
            return handle
        bits = handle.data.astype(numpy.uint32) << 16
        return interpreter.TensorHandle(bits.view(numpy.float32), tl.float32)

    # The interpreter would multiply bfloat16's bits as if they were integers.
    dot = interpreter.InterpreterBuilder.create_dot
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *others: dot(
        self, as_float32(a), as_float32(b), *others
    )
    # What isn't written stays NaN, and is seen.
    empty = torch.empty

    def nan(*arguments: typing.Any, **options: typing.Any) -> torch.Tensor:
        values = empty(*arguments, **options)
        return values.fill_(math.nan) if values.is_floating_point() else values

    torch.empty = nan
    tk = load_kernels()
    return {
        **{name: failure(check, tk, case) for name, case in CASES.items()},
        **{name: failure(check_other, tk, name) for name in OTHERS},
    }


def compile_all() -> dict[str, str]:
    """Compile every kernel down to machine code for an H100, which takes no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Hopper:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(Hopper())
    tk = load_kernels()
    compiled: dict[str, str] = {}

    class Compiler:
        def __init__(self, kernel: typing.Any, name: str) -> None:
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid: typing.Any) -> typing.Any:
            return self.compile

        def compile(self, *arguments: typing.Any, **options: typing.Any) -> None:
            compile = self.kernel.warmup
            if hasattr(self.kernel, "configs"):
                exact = options.get("PRECISION") == "ieee"  # the last blocks are for that
                blocks = self.kernel.configs[-1 if exact else 0]
                options |= {**blocks.kwargs, "num_warps": blocks.num_warps}
                compile = self.kernel.fn.warmup
            compiled[self.name] = failure(lambda: compile(*arguments, **options, grid=(1,)))

    modules = {kernel: getattr(tk, module) for kernel, module in KERNELS.items()}
    real = {kernel: getattr(module, f"_{kernel}") for kernel, module in modules.items()}
    for layout, dtype in LAYOUTS:
        for kernel, module in modules.items():
            setattr(module, f"_{kernel}", Compiler(real[kernel], f"{kernel}, {layout}, {dtype}"))
        form = torch.channels_last if layout == "last" else torch.contiguous_format
        x = torch.randn(2, 32, 8, 8).to(getattr(torch, dtype)).contiguous(memory_format=form)
        columns = torch.arange(0, 32 * 9, 2, dtype=torch.int32)
        weight = torch.randn(16, len(columns)).to(x.dtype)
        geometry = ((3, 3), (1, 1), (1, 1), (1, 1), 2)
        tk.column_conv2d(x, weight, columns, weight[:, 0].repeat(2), *geometry, residual=x)
        tk.column_conv2d_backward_input(x, weight, columns, x.shape, *geometry)
        tk.column_conv2d_backward_weight(x, x, columns, *geometry)
    return compiled


def failure(function: typing.Any, *arguments: typing.Any) -> str:
    try:
        function(*arguments)
    except Exception:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    print(json.dumps(interpret() if sys.argv[1] == "interpret" else compile_all()))
