"""The CPU kernels against float64 convolutions: values, gradients, and memory that isn't theirs."""

import math
import subprocess
import sys
import threading

import pytest
import torch
from cases import (
    NORM,
    SIZES,
    Case,
    Tensors,
    cases,
    guarded,
    tensors,
)
from facade import (
    EXACT,
    Kernel,
    assert_writes,
    handle,
    has_pairs,
    output,
    pairs_by,
    prepared,
    set_instruction_set,
)
from facade import gradients as gradients_of
from hypothesis import given, settings
from torch import Tensor
from torch.nn import functional as F

from spp_lightning import native
from spp_lightning.compaction.epilogue import RELU, Clamp, Epilogue, PlaneOp
from spp_lightning.compaction.geometry import Geometry, dense_weight
from spp_lightning.compaction.kernels.cpu import library
from spp_lightning.compaction.kernels.cpu.handle import Handle
from spp_lightning.compaction.spec import ConvSpec

BUILT = native.library() is not None
pytestmark = pytest.mark.skipif(not BUILT, reason="built without the kernels")

THREADS = (1, 2, 3, 5)


def dense(case: Case, t: Tensors, dtype=torch.float64) -> Tensor:
    """What the kernels should give, computed by torch."""
    g = case.geometry
    full = dense_weight(t.weight.to(dtype), t.columns, g)
    bias = None if t.bias is None else t.bias.to(dtype)
    y = F.conv2d(t.x.to(dtype), full, bias, g.stride, g.padding, g.dilation, g.groups)
    if t.residual is not None:
        y = y + t.residual.to(dtype)
    return case.epilogue(y)


def outputs(case: Case, t: Tensors, kernels=EXACT):
    """What each kernel and number of threads gives."""
    made = handle(case, t)
    for kernel in kernels:
        for threads in THREADS:
            yield output(made, t.x, t.residual, kernel, threads)


def error(y: Tensor, expected: Tensor, size: Tensor | None = None) -> float:
    """The greatest difference, by the greatest value, or by that of ``size``."""
    if not y.numel():
        return 0.0
    assert not y.isnan().any()
    scale = float((expected if size is None else size).abs().max())
    return float((y - expected).abs().max()) / max(scale, 1e-3)


def check_forward(case: Case) -> None:
    t = tensors(case)
    expected = dense(case, t)
    first, *others = outputs(case, t)
    assert first.shape == expected.shape
    assert error(first, expected) < 1e-5
    assert all(torch.equal(first, other) for other in others)


def check_bfloat16(case: Case) -> None:
    """Outputs are rounded once, at the end."""
    t = tensors(case._replace(dtype=torch.bfloat16))
    expected = dense(case, t)
    scale = max(float(expected.abs().max()), 1e-3) if expected.numel() else 1.0
    exact = (Kernel.PIXELS,) if case.geometry.is_depthwise else EXACT
    pairs = [(Kernel.PAIRS,)] if has_pairs() else []
    for kernels in (exact, *pairs):
        first, *others = outputs(case._replace(dtype=torch.bfloat16), t, kernels)
        assert first.dtype == torch.bfloat16 and first.shape == expected.shape
        assert not first.isnan().any()
        rounded = 2**-8 * expected.abs() + 1e-5 * scale
        assert bool(((first - expected).abs() <= rounded).all())
        assert all(torch.equal(first, other) for other in others)


def check_backward(case: Case) -> None:
    """Of the convolution alone, and of all that is fused with it."""
    case = case._replace(residual=False, activation="none")  # whose gradients torch computes
    t = tensors(case)
    check_gradients(case._replace(clamp=Clamp(), post=()), t, t.grad, t.grad.double(), False, 1e-6)
    # The kernels' own output, so that both take the same pixels for the greatest.
    y = handle(case, t, Epilogue()).forward(t.x).double().requires_grad_()
    low, high = case.clamp
    out = torch.where((y > low) & (y < high), y, y.detach().clamp(low, high))  # 0 at the limits
    for op in case.post:
        out = op(out)
    given = guarded(
        torch.randn(out.shape, generator=torch.Generator().manual_seed(case.seed + 1)), math.nan
    )
    (expected,) = torch.autograd.grad(out, y, given.double())
    check_gradients(case, t, given, expected, True, 2e-5)


def check_gradients(
    case: Case, t: Tensors, grad: Tensor, conv_grad: Tensor, fused: bool, tolerance: float
) -> None:
    g = case.geometry

    def gradients(x, weight, grad):
        x, weight = (y.double().requires_grad_() for y in (x, weight))
        full = dense_weight(weight, t.columns, g)
        y = F.conv2d(x, full, None, g.stride, g.padding, g.dilation, g.groups)
        return (*torch.autograd.grad(y, (x, weight), grad), grad.sum((0, 2, 3)))

    expected = gradients(t.x, t.weight, conv_grad)
    # Products may cancel each other out; they are rounded by their sizes.
    sizes = gradients(t.x.abs(), t.weight.abs(), conv_grad.abs())
    made, results = handle(case, t), []
    for threads in THREADS:
        of_all = gradients_of(made, t, grad, fused, threads)
        for y, value, size in zip(of_all, expected, sizes, strict=True):
            assert error(y, value, size) < tolerance
        # Each alone is the same, and where one isn't wanted nothing is written.
        for i, y in enumerate(of_all if threads == 1 else ()):
            alone = gradients_of(made, t, grad, fused, threads, [n == i for n in range(3)])
            assert torch.equal(alone[i], y)
            assert all(x.isnan().all() for n, x in enumerate(alone) if n != i)
        results.append(of_all[0])
    assert all(torch.equal(results[0], other) for other in results)


@settings(deadline=None, max_examples=250, derandomize=True)
@given(cases())
def test_outputs_are_a_dense_convolutions_whatever_the_kernel_and_threads(case):
    check_forward(case)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(cases())
def test_bfloat16_is_rounded_once(case):
    check_bfloat16(case)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(cases())
def test_pairs_in_tiles_of_amx_are_rounded_once(case):
    with pairs_by("amx_emulated"):
        check_bfloat16(case)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(cases())
def test_gradients_are_a_dense_convolutions(case):
    check_backward(case)


EVERY = Geometry(4, 9, (3, 3), (1, 1), (1, 1))
SOME = tuple(range(0, 36, 5))
CASES = {
    "read in place": Case(EVERY, (9, 21), 2, SOME),
    "one pixel": Case(EVERY, (1, 1), 1, SOME),
    "one row": Case(EVERY, (1, 67), 2, SOME),
    "one column": Case(EVERY, (67, 1), 2, SOME),
    "stride": Case(EVERY._replace(stride=(2, 3)), (13, 11), 5, SOME),
    "padding wider than the kernel": Case(EVERY._replace(padding=(7, 6)), (2, 3), 2, SOME),
    "padding above and below only": Case(Geometry(3, 5, (3, 1), padding=(4, 0)), (5, 9), 2, (1, 8)),
    "dilation beyond the image": Case(
        EVERY._replace(padding=(9, 9), dilation=(9, 9)), (4, 5), 1, SOME
    ),
    "more columns than a panel": Case(
        Geometry(40, 5, (3, 3), (1, 1), (1, 1)), (7, 9), 2, tuple(range(360))
    ),
    "more columns than a panel, in parts": Case(
        Geometry(70, 33, (3, 3), (2, 2), (1, 1)), (7, 9), 1, tuple(range(630)), residual=True
    ),
    "a filter per group": Case(
        Geometry(6, 6, (3, 3), padding=(1, 1), groups=6), (8, 8), 2, (3, 30)
    ),
    "wide residual and clamp": Case(EVERY, (12, 48), 1, SOME, True, True, Clamp(0.0, 6.0)),
    "pools": Case(
        EVERY,
        (16, 17),
        3,
        SOME,
        clamp=Clamp(0.0),
        post=(PlaneOp("max_pool", (3, 3), (2, 2), ceil_mode=True), NORM),
    ),
    "rows in bands, with a pool": Case(
        Geometry(16, 20, (3, 3), padding=(1, 1)),
        (151, 72),
        1,
        tuple(range(0, 144, 7)),
        clamp=Clamp(0.0),
        post=(PlaneOp("max_pool", (2, 2), (2, 2), ceil_mode=True),),
    ),
    "rows in bands, with a stride": Case(
        Geometry(16, 34, (5, 3), (2, 1), (2, 0), (1, 2)),
        (90, 70),
        1,
        tuple(range(0, 240, 3)),
        residual=True,
    ),
    "norm of one pixel": Case(EVERY, (1, 1), 1, SOME, post=(NORM,)),
    "kernel and pool not square": Case(
        Geometry(3, 7, (1, 5), (1, 2), (0, 2)),
        (6, 30),
        2,
        (0, 4, 9),
        post=(PlaneOp("avg_pool", (2, 4), (3, 1), (1, 2), True, False),),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_instruction_set(case, isa):
    assert library.instruction_set() == isa
    check_forward(case)
    check_bfloat16(case)
    check_backward(case)


@pytest.mark.parametrize("filters", [1, 16, 17, 33, 52])
@pytest.mark.parametrize("columns", [1, 32, 33, 511, 520])
@pytest.mark.parametrize("pixels", [1, 17, 33])
def test_tiles_of_amx_at_their_edges(filters, columns, pixels):
    # A tile has 16 filters, 32 columns or 16 pixels; a panel 512 columns.
    one_row = Geometry(columns, filters, (1, 1))
    with pairs_by("amx_emulated"):
        check_bfloat16(Case(one_row, (1, pixels), 1, tuple(range(columns)), True, True))


def test_pairs_in_tiles_are_those_of_the_manual():
    # First and second columns are added up apart from each other; both sums, once per 32 columns.
    g = Geometry(64, 1, (1, 1))
    x = torch.zeros(1, 64, 1, 2, dtype=torch.bfloat16)
    # The first columns make 0, the second ones 3.
    x[0, :6, 0, 0] = torch.tensor([2.0**24, 1, 1, 1, -(2.0**24), 1], dtype=torch.bfloat16)
    # In turn 2²⁴ + 1, which is 2²⁴, and 1 - 2²⁴ are added.
    x[0, [0, 1, 32, 34], 0, 1] = torch.tensor([2.0**24, 1, 1, -(2.0**24)], dtype=torch.bfloat16)
    weight = torch.ones(1, 64, dtype=torch.bfloat16)
    with pairs_by("amx_emulated"):
        made = Handle(weight, torch.arange(64, dtype=torch.int32), None, ConvSpec(g))
        y = output(made, x, None, Kernel.PAIRS, 1)
    assert y.flatten().tolist() == [3, 1]


def test_what_lay_in_a_panel_of_tiles_before_does_not_matter():
    case = Case(EVERY, (9, 40), 1, SOME, dtype=torch.bfloat16)
    t = tensors(case)
    with pairs_by("amx_emulated"):
        left = output(handle(case, t), torch.full_like(t.x, math.nan), None, Kernel.PAIRS, 1)
        assert left.isnan().all()
        check_bfloat16(case._replace(columns=SOME[:3]))


def test_an_unknown_instruction_set_is_refused():
    best = library.instruction_set()
    assert not set_instruction_set("abacus")
    assert library.instruction_set() == best


@pytest.mark.parametrize("kernel", EXACT)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "post",
    [
        (),
        (PlaneOp("max_pool", (3, 3), (2, 2), (1, 1)),),
        (PlaneOp("avg_pool", (2, 2), (2, 2)),),
        (NORM,),
    ],
    ids=["", "max_pool", "avg_pool", "norm"],
)
def test_what_is_no_number_goes_where_torch_takes_it(post, value, kernel, isa):
    case = Case(EVERY, (10, 19), 2, SOME, clamp=Clamp(-4.0), post=post)
    for pixel in [(0, 0, 0, 0), (1, 3, 9, 18), (0, 2, 4, 15), (1, 1, 5, 0)]:
        t = tensors(case)
        t.x[pixel] = value
        # Kept columns only: a dense layer would multiply it by the zeros of pruned ones, too.
        patches = F.unfold(t.x.double(), 3, padding=1)[:, t.columns.long()]
        expected = (t.weight.double() @ patches + t.bias[:, None]).unflatten(2, case.size)
        expected = expected.clamp(*case.clamp)
        for op in post:
            expected = op(expected)
        assert value == -math.inf or not expected.isfinite().all()
        out = output(handle(case, t), t.x, None, kernel)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.isinf(), expected.isinf())
        finite = expected.isfinite()
        torch.testing.assert_close(out[finite].double(), expected[finite], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_large_outputs_are_those_of_single_images(size, isa):
    """AVX-512 writes them by non-temporal stores where addresses are aligned; not one image."""
    case = Case(Geometry(3, 64, (3, 3), padding=(1, 1)), size, 5, SOME[:5])
    t = tensors(case)
    made = handle(case, t, RELU)
    expected = torch.cat([made.forward(x[None].contiguous()) for x in t.x])
    assert expected.nbytes > 4 * 2**20 > expected[0].nbytes
    for kernel in EXACT:
        for threads in THREADS:
            assert_writes(made, t.x, kernel, threads, expected)


def test_gradients_dont_depend_on_what_was_computed_before(isa):
    case = Case(EVERY, (6, 5), 16, SOME, post=(PlaneOp("max_pool", (3, 3), (2, 2)), NORM))
    t = tensors(case)
    made, every = handle(case, t), (True, True, True)
    pooled = torch.randn_like(made.forward(t.x))
    for fused, grad in ((False, t.grad), (True, pooled)):
        alone = made.backward(grad[:1], t.weight, t.x[:1], every, fused)
        # Memory is kept from call to call: what is left in it is NaN now.
        made.backward(grad * math.nan, t.weight, t.x * math.nan, every, fused)
        made.forward(t.x * math.nan)
        again = made.backward(grad[:1], t.weight, t.x[:1], every, fused)
        assert all(torch.equal(*both) for both in zip(alone, again, strict=True))
        assert all(not y.isnan().any() for y in again)


def test_several_python_threads_run_one_handle():
    case = Case(EVERY, (20, 21), 3, SOME, post=(PlaneOp("max_pool", (2, 2), (2, 2)),))
    t = tensors(case)
    made, inputs = handle(case, t), [t.x + i for i in range(4)]
    expected, wrong = [made.forward(x) for x in inputs], []

    def work(i):
        for n in range(30):
            choice = (EXACT[n % 2], 1 + n % 3)
            out = torch.full_like(expected[i], math.nan)
            made.run(prepared(made, inputs[i], *choice), inputs[i], None, out)
            if not torch.equal(out, expected[i]):
                wrong.append(choice)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# Takes most of what it may allocate beforehand; then nothing is left for the kernels' own memory.
_WITHOUT_MEMORY = """
import itertools, resource
import torch
from spp_lightning.compaction.epilogue import Epilogue, PlaneOp
from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.kernels.cpu.config import Kernel, KernelConfig
from spp_lightning.compaction.kernels.cpu.handle import Handle
from spp_lightning.compaction.spec import ConvSpec

n, pool = 512, PlaneOp("max_pool", (3, 3), (2, 2), (1, 1))  # rows in two windows: no bands
weight, columns = torch.zeros(4, 144), torch.arange(144, dtype=torch.int32)
spec = ConvSpec(Geometry(16, 4, (3, 3), padding=(1, 1)), Epilogue(post=(pool,)))
handle = Handle(weight, columns, None, spec)
torch.set_num_threads(2)
small = torch.zeros(2, 16, 8, 8)
threads = handle.prepare(small.shape, small.dtype, KernelConfig(Kernel.PIXELS, 2))
handle.run(threads, small, None, torch.zeros(threads.out_shape))  # starts the threads
images, grads = torch.zeros(2, 16, n, n), torch.zeros(2, 4, n, n)
pooled, out = torch.zeros(2, 4, n // 2, n // 2), torch.zeros(2, 4, n // 2, n // 2)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, used + 2**20))
kernels = (Kernel.PIXELS, Kernel.CHANNELS, Kernel.WINOGRAD_4, Kernel.WINOGRAD_2)
for kernel, threads, batch in itertools.product(kernels, (1, 2), (1, 2)):
    torch.set_num_threads(threads)
    x, grad = images[:batch], grads[:batch]
    config = KernelConfig(kernel, threads)
    for run in (
        lambda: handle.run(handle.prepare(x.shape, x.dtype, config), x, None, out[:batch]),
        lambda: handle.backward(grad, weight, x, (False, True, False), False),
        lambda: handle.backward(pooled[:batch], weight, x, (False, True, False), True),
    ):
        try:
            run()
        except MemoryError as error:
            print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory as Linux does")
def test_running_out_of_memory_is_an_error():
    command = [sys.executable, "-c", _WITHOUT_MEMORY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    gradient = "There is no memory left for the gradient of a convolution.\n"
    expected = "There is no memory left to compute a convolution.\n" + 2 * gradient
    assert done.stdout == 16 * expected, done.stderr
