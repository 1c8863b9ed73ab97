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

__all__ = ["dense_calls"]


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
    file: Any = io.BytesIO()
    torch.onnx.export(net, (x,), file, dynamo=False, input_names=["x"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads would go on spinning on the cores that the next contender needs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        file.getvalue(), options, providers=["CPUExecutionProvider"]
    )
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)
