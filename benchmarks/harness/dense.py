"""The ways to run an unpruned network on a CPU, of which the fastest is what counts as dense."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from functools import partial
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

from harness.rounds import Call
from spp_lightning import ConvNet

__all__ = ["compiled_call", "dense_calls", "onnx_bytes", "onnx_session_call", "openvino_call"]


def dense_calls(net: nn.Module, x: Tensor, threads: int) -> Iterator[tuple[str, Call]]:
    """The ways to run the unpruned network."""
    first = copy.deepcopy(net).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    if isinstance(first, ConvNet):
        first.channels_last = False
    yield "eager", lambda: first(x)
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x_last = x.contiguous(memory_format=torch.channels_last)
    yield "eager, channels-last", lambda: last(x_last)
    if isinstance(net, nn.Conv2d):
        yield "oneDNN, packed", packed_call(net, x)
    else:  # a compiled convolution is one of oneDNN with packed weights
        for key, module, batch in (("", first, x), (", channels-last", last, x_last)):
            torch._dynamo.reset()
            compiled = torch.compile(module, options={"freezing": True})
            with torch.no_grad():
                compiled(batch)
            yield f"compiled{key}", partial(compiled, batch)
    if x.dtype == torch.float32:
        yield "onnxruntime", onnx_call(first, x, threads)


def packed_call(conv: nn.Conv2d, x: Tensor) -> Call:
    """The layer in oneDNN, with weights in its own layout."""
    shape = ([*conv.padding], [*conv.stride], [*conv.dilation], conv.groups)
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(  # type: ignore[call-arg]
        conv.weight.detach().to_mkldnn(), *shape, list(x.shape)
    )
    run = torch.ops.mkldnn._convolution_pointwise
    return lambda: run(x, packed, conv.bias, *shape, "none", [], "")


def onnx_call(net: nn.Module, x: Tensor, threads: int) -> Call:
    """The network in onnxruntime, which optimizes it as well."""
    return onnx_session_call(onnx_bytes(net, x), x, threads)


def onnx_bytes(net: nn.Module, example: Any) -> bytes:
    """The network as an ONNX file; ``example`` is what it takes, a tensor or a list of one."""
    file: Any = io.BytesIO()
    with torch.no_grad():
        torch.onnx.export(net, (example,), file, dynamo=False, input_names=["x"])
    content: bytes = file.getvalue()
    return content


def onnx_session_call(content: bytes, x: Tensor, threads: int) -> Call:
    """An ONNX file in onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads would go on spinning on the cores that the next contender needs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)


def openvino_call(content: bytes, x: Tensor, threads: int) -> Call:
    """An ONNX file in OpenVINO, in float32."""
    import openvino  # of benchmarks/zoo.py only

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(core.read_model(content), "CPU", settings).create_infer_request()
    feed = {0: x.numpy()}
    return lambda: request.infer(feed)


def compiled_call(net: nn.Module, example: Any) -> Call:
    """The network in torch.compile, with frozen weights."""
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(net), options={"freezing": True})
    with torch.no_grad():
        compiled(example)
    return partial(compiled, example)
