"""Compact networks in a stock onnxruntime, from Python and from a C++ program."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from networks import pruned
from onnx import numpy_helper
from onnx_sessions import difference, images, nodes_of, run, session_of
from torch import nn

from spp_lightning import ConvNet, compact, export_onnx, native, onnx_library, quantize_compact
from spp_lightning.compaction.epilogue import ACTIVATIONS, Clamp, Epilogue, PlaneOp
from spp_lightning.compaction.layers.column_conv import ColumnConv2d

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
NETWORKS = {
    "ConvNet": (ConvNet, (2, 3, 32, 32)),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), (1, 3, 64, 64)),
    "mobilenet": (lambda: torchvision.models.mobilenet_v3_small(num_classes=10), (1, 3, 64, 64)),
    "resnet18 int8": (lambda: torchvision.models.resnet18(num_classes=10), (1, 3, 64, 64)),
}

pytestmark = pytest.mark.skipif(native.library() is None, reason="the kernels were not built")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Compact networks by name, and their models."""
    folder, made = tmp_path_factory.mktemp("onnx"), {}

    def get(name):
        if name not in made:
            make, shape = NETWORKS[name]
            torch.manual_seed(0)
            fast = compact(pruned(make()), images(*shape))
            if name.endswith("int8"):
                fast = quantize_compact(fast, [images(4, *shape[1:])])
            made[name] = fast, folder / f"{name}.onnx"
            export_onnx(fast, made[name][1], images(*shape))
        return made[name]

    return get


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("threads", [1, 2])
def test_computes_the_same_for_every_batch(name, threads, exported):
    fast, path = exported(name)
    for batch in (0, 1, 3, 8):
        x = images(batch, *NETWORKS[name][1][1:])
        with torch.inference_mode():
            expected = fast(x)
        (found,) = run(path, x, threads=threads)
        if name == "ConvNet":  # has no other operator
            assert torch.equal(found, expected)
        elif batch:
            assert difference(found, expected) < 1e-5


def test_the_model_says_what_it_is_made_of(exported):
    fast, path = exported("ConvNet")
    model = onnx.load(path)
    onnx.checker.check_model(model)
    (node,) = nodes_of(path)
    assert node.op_type == "ColumnChain" and node.name == "conv1+conv2+conv3+ip1"
    assert [node.op_type for node in model.graph.node] == ["ColumnChain"]
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    state = fast.state_dict()
    assert {"conv1.weight", "conv1.columns", "ip1.bias"} <= held.keys() <= state.keys()
    assert all(np.array_equal(values, state[key].numpy()) for key, values in held.items())
    assert len(node.input) == 1 + 3 * 3 + 2  # equal tensors, such as zero biases, are stored once
    joined = nodes_of(exported("resnet18")[1])
    compact_layers = [m for m in exported("resnet18")[0].modules() if type(m) is ColumnConv2d]
    assert sum(node.name.count("+") + 1 for node in joined) == len(compact_layers)


def test_needs_no_optimizer_and_no_example_size(exported, tmp_path):
    fast, path = exported("resnet18")
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        expected = fast(x)
    level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    (found,) = run(path, x, graph_optimization_level=level)
    assert difference(found, expected) < 1e-5
    fixed = tmp_path / "fixed.onnx"
    export_onnx(fast, fixed, x, dynamic_batch=False)
    assert difference(run(fixed, x)[0], expected) < 1e-5
    with pytest.raises(Exception, match=r"Got: 1 Expected: 2"):
        run(fixed, x[:1])


class Tree(nn.Module):
    """Two inputs, two outputs, one layer in two places."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, residual):
        return self.layer(x, residual), torch.sigmoid(self.layer(x[:, :, 1:]))


EPILOGUES = {
    "limits, pool": Epilogue(
        Clamp(-0.5, 2.0), (PlaneOp("max_pool", (3, 3), (2, 2), (1, 1), ceil_mode=True),)
    ),
    "pool, norm": Epilogue(
        Clamp(0.0),
        (
            PlaneOp("avg_pool", (3, 2), (2, 1), (1, 1), count_include_pad=False),
            PlaneOp("local_response_norm", alpha=5e-5),
        ),
    ),
    **{name: Epilogue(activation=name) for name in ACTIVATIONS},
}


@pytest.mark.parametrize("name", EPILOGUES)
def test_every_epilogue_bit_for_bit(name, tmp_path):
    conv = pruned(nn.Conv2d(8, 6, (3, 2), stride=(2, 1), padding=1, groups=2, bias=False))
    layer = ColumnConv2d.of(conv, EPILOGUES[name])
    net, x = Tree(layer).eval(), images(2, 8, 9, 10)
    residual = images(*conv(x).shape, seed=2)
    export_onnx(net, tmp_path / "net.onnx", (x, residual))
    assert layer.bias is None and "forward" not in vars(layer)
    with torch.inference_mode():
        expected = net(x, residual)
    found = run(tmp_path / "net.onnx", x, residual)
    assert torch.equal(found[0], expected[0])
    assert difference(found[1], expected[1]) < 1e-5


def test_threads_are_those_of_the_session(exported):
    _, path = exported("ConvNet")
    for wrong in ("0", "two", "-1", "99999999999999999999"):
        with pytest.raises(Exception, match=r"spp_lightning.threads` must be a number from 1"):
            session_of(path, threads=wrong)


HOSTILE = {  # attribute: what it becomes, and what is said of it
    "geometry is empty": ("geometry", lambda v: [], "must describe a layer"),
    "geometry is cut off": ("geometry", lambda v: v[:-1], "`geometry` must hold"),
    "no groups": ("geometry", lambda v: [*v[:10], 0, *v[11:]], "at least one group"),
    "groups don't divide": ("geometry", lambda v: [*v[:10], 5, *v[11:]], "must be of shape"),
    "another channel": ("geometry", lambda v: [*v[:11], 33, *v[12:]], "must read as many channels"),
    "a negative stride": ("geometry", lambda v: [*v[:4], -1, *v[5:]], "numbers from 0"),
    "no stride": ("geometry", lambda v: [*v[:4], 0, *v[5:]], "must be positive"),
    "a vast kernel": ("geometry", lambda v: [*v[:2], 2**62, *v[3:]], "numbers from 0"),
    "a large kernel": ("geometry", lambda v: [*v[:2], 2**24, *v[3:]], "doesn't fit the kernel"),
    "large paddings": ("geometry", lambda v: [*v[:6], 2**24, 2**24, *v[8:]], "2³¹ numbers"),
    "an unknown activation": ("activation", lambda v: [77, *v[1:]], "activation"),
    "no clamp": ("clamp", lambda v: v[1:], "`clamp` must hold"),
    "an operation of no layer": ("post", lambda v: [9, *v[1:]], "numbers from 0 to 2"),
    "an unknown operation": ("post", lambda v: [v[0], 9, *v[2:]], "no epilogue operation"),
    "a window of nothing": ("post", lambda v: [*v[:2], 0, *v[3:]], "must be positive"),
    "a vast window": ("post", lambda v: [*v[:2], 2**24, 2**24, *v[4:]], "smaller than a pool"),
    "operations are cut off": ("post", lambda v: v[:-1], "`post` must hold"),
    "configs are cut off": ("configs", lambda v: v[:-1], "`configs` must hold"),
    "no configs": ("configs", lambda v: [], None),
    "an unknown kernel": ("configs", lambda v: [0, 1, 0, *3 * (9, 1)], "no kernel 9"),
    "pairs of float32": ("configs", lambda v: [0, 1, 0, *3 * (2, 1)], "bfloat16"),
    "Winograd of 5×5": ("configs", lambda v: [0, 1, 0, *3 * (4, 1)], "Winograd"),
    "no threads": ("configs", lambda v: [0, 0, 0, *3 * (0, 0)], "positive batches and threads"),
    "a million threads": ("configs", lambda v: [0, 10**6, 0, *3 * (0, 1)], "0 to 1024"),
    "no linear layer": ("linear", lambda v: 0, "need 9 constant inputs, got 11"),
    "a residual": ("residual", lambda v: 1, "must be a constant|constant inputs"),
    "a flag of 7": ("linear", lambda v: 7, "must be 0 or 1"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_wrong_attributes_are_refused(case, exported, tmp_path):
    fast, path = exported("ConvNet")
    name, change, message = HOSTILE[case]
    model = onnx.load(path)
    (node,) = (node for node in model.graph.node if node.domain)
    (attribute,) = (a for a in node.attribute if a.name == name)
    value = onnx.helper.get_attribute_value(attribute)
    changed = change(value if isinstance(value, int) else list(value))
    node.attribute.remove(attribute)
    kind = onnx.AttributeProto.FLOATS if name == "clamp" else onnx.AttributeProto.INTS
    kind = onnx.AttributeProto.INT if isinstance(changed, int) else kind
    node.attribute.append(onnx.helper.make_attribute(name, changed, attr_type=kind))
    onnx.save(model, tmp_path / "hostile.onnx")
    x = images(1, 3, 32, 32)
    if message is not None:
        with pytest.raises(Exception, match=message):
            run(tmp_path / "hostile.onnx", x)
    else:  # it falls back on a kernel that every layer has, which computes the same
        with torch.inference_mode():
            assert torch.equal(run(tmp_path / "hostile.onnx", x)[0], fast(x))


def test_wrong_tensors_are_refused(exported, tmp_path):
    _, path = exported("ConvNet")
    wrong = {
        "conv2.weight": (np.zeros((32, 7), np.float32), "must be of shape"),
        "conv1.columns": (np.arange(19, dtype=np.int32)[::-1].copy(), "must be ascending"),
        "conv1.bias": (np.zeros(31, np.float32), "`bias` must have 32 numbers"),
        "conv3.columns": (np.zeros(200, np.float32), "must be of int32"),
        "ip1.weight": (np.zeros((10, 7), np.float32), "reads 7 features, but there are 1024"),
        "ip1.bias": (np.zeros((1, 10), np.float32), "with 1 dimensions"),
    }
    for name, (values, message) in wrong.items():
        model = onnx.load(path)
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(values, name))
        onnx.save(model, tmp_path / "wrong.onnx")
        with pytest.raises(Exception, match=message):
            run(tmp_path / "wrong.onnx", images(1, 3, 32, 32))
    model = onnx.load(path)
    value = onnx.helper.make_tensor_value_info("conv1.weight", onnx.TensorProto.FLOAT, [32, 19])
    model.graph.input.append(value)  # which makes it an input with a default value
    onnx.save(model, tmp_path / "wrong.onnx")
    with pytest.raises(Exception, match="Input 1 must be a constant"):
        session_of(tmp_path / "wrong.onnx")


def test_shapes_that_do_not_fit_are_refused(tmp_path):
    layer = ColumnConv2d.of(pruned(nn.Conv2d(4, 6, 3)))
    net = Tree(layer).eval()
    x = images(1, 4, 6, 6)
    export_onnx(net, tmp_path / "net.onnx", (x, images(1, 6, 4, 4)))
    model = onnx.load(tmp_path / "net.onnx")
    for value in model.graph.input:  # so that nothing is checked before the operator runs
        for size in value.type.tensor_type.shape.dim:
            size.Clear()
    onnx.save(model, tmp_path / "net.onnx")
    for shape, residual, message in (
        ((1, 5, 6, 6), (1, 6, 4, 4), r"must be of shape \(batch, 4, height, width\), got \(1, 5"),
        ((1, 4, 6, 6), (1, 6, 2, 8), "residual must be of the shape"),
        ((1, 4, 2, 6), (1, 6, 4, 4), "doesn't fit the kernel"),
    ):
        with pytest.raises(Exception, match=message):
            run(tmp_path / "net.onnx", images(*shape), images(*residual))


def test_the_slots_of_the_c_interface():
    """Slots whose functions can be recognized by what they return; the others are used above."""
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*")
    get_base = ctypes.CDLL(str(library)).OrtGetApiBase
    get_base.restype = ctypes.POINTER(ctypes.c_void_p)
    get_api = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint32)(get_base()[0])
    slots = get_api(16)
    assert slots[0] and [slots[i] for i in range(250)] == [get_api(1)[i] for i in range(250)]
    build_info = ctypes.CFUNCTYPE(ctypes.c_char_p)(slots[254])
    assert b"ORT Build Info" in build_info()
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(slots[0])
    code = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(slots[1])
    message = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(slots[2])
    status = create(2, b"what it was")
    assert (code(status), message(status)) == (2, b"what it was")
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(slots[93])(status)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_runs_in_a_program_of_c_plus_plus(exported, tmp_path):
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*")
    program = tmp_path / "run_onnx"
    source, headers = ROOT / "examples/cpp/run_onnx.cpp", ROOT / "spp_lightning/native"
    flags = ["-std=c++17", "-Wall", "-Werror", f"-I{headers}"]
    subprocess.run([COMPILER, *flags, source, "-o", program, "-ldl"], check=True)
    for name in ("ConvNet", "resnet18", "resnet18 int8"):
        fast, path = exported(name)
        x = images(3, *NETWORKS[name][1][1:])
        x.numpy().tofile(tmp_path / "x")
        files = [library, onnx_library(), path, "2", tmp_path / "x", tmp_path / "y"]
        command = [program, *files, *map(str, x.shape)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) > 0
        with torch.inference_mode():
            expected = fast(x)
        found = torch.from_numpy(np.fromfile(tmp_path / "y", np.float32)).view(expected.shape)
        assert difference(found, expected) < 1e-5
        command[-1] = str(x.shape[-1] + 1)
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and "input's size" in done.stderr


def test_refuses_what_it_cannot_export(tmp_path):
    x, path = images(1, 4, 6, 6), tmp_path / "net.onnx"
    with pytest.raises(ValueError, match="`model` must be a network"):
        export_onnx({}, path, x)
    net = nn.Sequential(ColumnConv2d.of(pruned(nn.Conv2d(4, 6, 3))))
    with pytest.raises(ValueError, match="`example_input` must be a float32 tensor"):
        export_onnx(net, path, x.double())
    with pytest.raises(ValueError, match=r"but `0` is torch.bfloat16 on cpu"):
        export_onnx(net.bfloat16(), path, x)
    assert not path.exists()
