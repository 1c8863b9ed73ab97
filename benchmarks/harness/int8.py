"""Int8 layers: column-pruned ones, and the fastest dense ones that other libraries have.

The dense layer is an ONNX file in the form that quantisers write: uint8 input and output, int8
weights with a scale per filter, ReLU. onnxruntime and OpenVINO fuse it to one int8 convolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from harness.dense import onnx_session_call, openvino_call
from harness.rounds import Call
from spp_lightning.compaction.epilogue import RELU
from spp_lightning.compaction.geometry import Geometry, dense_weight, kept_columns
from spp_lightning.compaction.int8_spec import Int8Spec, TensorScale
from spp_lightning.compaction.kernels.cpu.handle import Handle
from spp_lightning.compaction.kernels.cpu.int8 import Int8Handle
from spp_lightning.compaction.spec import ConvSpec

__all__ = ["Int8Layer", "dense_int8_calls"]


class Int8Layer:
    """A convolution with ReLU in int8: of the columns that aren't 0.

    Args:
        conv: The layer in float32.
        x: An input, ``(B, C, H, W)``.
    """

    def __init__(self, conv: nn.Conv2d, x: Tensor) -> None:
        self.conv, g = conv, Geometry.of(conv)
        assert conv.bias is not None
        weight, columns = kept_columns(conv.weight.detach(), g)
        self.scale = (conv.weight.detach().flatten(1).abs().amax(1) / 127).clamp(min=1e-8)
        self.weight = (weight / self.scale[:, None]).round().to(torch.int8)
        self.columns = columns
        low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
        step = (high - low) / 255
        self.input = TensorScale(step, round(-low / step))
        self.x = (x / step + self.input.zero_point).round().clamp(0, 255).to(torch.uint8)
        self.output = TensorScale(float(conv(x).max()) / 255)
        self.spec = Int8Spec(g, self.input, self.output, clamp=(0.0, math.inf))
        self.bias = conv.bias.detach()
        self.handle = Int8Handle(self.weight, self.columns, self.scale, self.bias, self.spec)
        kept = ConvSpec(g, RELU)
        self._float = Handle(weight, columns, self.bias, kept), x

    def call(self) -> Call:
        """The layer in int8."""
        return partial(self.handle.run, self.x)

    def float_call(self) -> Call:
        """The layer in float32, by the kernels of this package."""
        return partial(self._float[0].forward, self._float[1])

    def wrong(self) -> float:
        """The share of outputs that aren't those of exact sums."""
        g = self.spec.geometry
        shifted = self.x.double() - self.input.zero_point
        wide = dense_weight(self.weight, self.columns, g).double()
        acc = F.conv2d(shifted, wide, None, g.stride, g.padding, g.dilation, g.groups)
        step = torch.tensor(self.input.scale, dtype=torch.float32) * self.scale
        v = (acc.float() * step.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).clamp(min=0)
        t = v * (1 / torch.tensor(self.output.scale, dtype=torch.float32))
        expected = (t.double().round() + self.output.zero_point).clamp(0, 255).to(torch.uint8)
        return float((self.handle.run(self.x) != expected).double().mean())

    def steps_off(self, call: Call) -> tuple[int, float]:
        """How far a dense way in NCHW is off: the most steps, and the share off by more than 1."""
        result = call()
        (found,) = result.values() if hasattr(result, "values") else result
        off = (torch.from_numpy(found).int() - self.handle.run(self.x).int()).abs()
        return int(off.max()), float((off > 1).double().mean())

    def onnx(self) -> bytes:
        """The dense layer as quantisers write it."""
        g = self.spec.geometry
        tensors = self._onnx_tensors()
        pads = [*g.padding, *g.padding]
        dequantise, node = partial(helper.make_node, "DequantizeLinear"), helper.make_node
        nodes = [
            dequantise(["x", "x_scale", "x_zero"], ["x_real"]),
            dequantise(["w", "w_scale", "w_zero"], ["w_real"], axis=0),
            dequantise(["b", "b_scale", "b_zero"], ["b_real"], axis=0),
            node("Conv", ["x_real", "w_real", "b_real"], ["v"], pads=pads, strides=g.stride),
            node("Relu", ["v"], ["r"]),
            node("QuantizeLinear", ["r", "y_scale", "y_zero"], ["y"]),
        ]
        out = [len(self.x), g.filters, *g.out_size(*self.x.shape[2:])]
        graph = helper.make_graph(
            nodes,
            "layer",
            [helper.make_tensor_value_info("x", TensorProto.UINT8, list(self.x.shape))],
            [helper.make_tensor_value_info("y", TensorProto.UINT8, out)],
            [numpy_helper.from_array(t.numpy(), name) for name, t in tensors.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        onnx.checker.check_model(model)
        content: bytes = model.SerializeToString()
        return content

    def onnx_last(self) -> bytes:
        """The dense layer as onnxruntime computes it inside a network: channels-last."""
        g = self.spec.geometry
        tensors = self._onnx_tensors()
        names = ("x", "x_scale", "x_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero", "b")
        conv = helper.make_node(
            "QLinearConv",
            names,
            ["y"],
            domain="com.microsoft",
            channels_last=1,
            pads=[*g.padding, *g.padding],
            strides=g.stride,
        )
        shapes = [(len(self.x), *self.x.shape[2:], g.channels)]
        shapes.append((len(self.x), *g.out_size(*self.x.shape[2:]), g.filters))
        ends = [
            helper.make_tensor_value_info(name, TensorProto.UINT8, list(shape))
            for name, shape in zip("xy", shapes, strict=True)
        ]
        given = [numpy_helper.from_array(tensors[name].numpy(), name) for name in names[1:]]
        graph = helper.make_graph([conv], "layer", ends[:1], ends[1:], given)
        opset = [helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)]
        content: bytes = helper.make_model(
            graph, opset_imports=opset, ir_version=8
        ).SerializeToString()
        return content

    def _onnx_tensors(self) -> dict[str, Tensor]:
        g = self.spec.geometry
        return {
            "x_scale": torch.tensor(self.input.scale, dtype=torch.float32),
            "x_zero": torch.tensor(self.input.zero_point, dtype=torch.uint8),
            "w": dense_weight(self.weight, self.columns, g),
            "w_scale": self.scale,
            "w_zero": torch.zeros(g.filters, dtype=torch.int8),
            "b": (self.bias / (self.input.scale * self.scale)).round().to(torch.int32),
            "b_scale": self.scale * self.input.scale,
            "b_zero": torch.zeros(g.filters, dtype=torch.int32),
            "y_scale": torch.tensor(self.output.scale, dtype=torch.float32),
            "y_zero": torch.tensor(self.output.zero_point, dtype=torch.uint8),
        }


def dense_int8_calls(layer: Int8Layer, threads: int) -> Iterator[tuple[str, Call]]:
    """The ways to run the unpruned layer in int8; OpenVINO where it is installed."""
    content = layer.onnx()
    yield "onnxruntime int8", onnx_session_call(content, layer.x, threads)
    last = layer.x.permute(0, 2, 3, 1).contiguous()
    yield "onnxruntime int8, channels-last", onnx_session_call(layer.onnx_last(), last, threads)
    try:
        yield "OpenVINO int8", openvino_call(content, layer.x, threads)
    except ImportError:
        return
