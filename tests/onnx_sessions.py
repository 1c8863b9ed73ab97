"""Models in onnxruntime with this package's operators."""

import onnx
import onnxruntime
import torch

from spp_lightning import onnx_library


def images(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def session_of(path, threads=2, **options):
    made = onnxruntime.SessionOptions()
    made.log_severity_level = 4  # errors are expected, and raised as well
    made.intra_op_num_threads = 1
    made.add_session_config_entry("spp_lightning.threads", str(threads))
    for name, value in options.items():
        setattr(made, name, value)
    made.register_custom_ops_library(str(onnx_library()))
    return onnxruntime.InferenceSession(path, made, providers=["CPUExecutionProvider"])


def run(path, *inputs, **options):
    session = session_of(path, **options)
    names = [value.name for value in session.get_inputs()]
    feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feed)]


def nodes_of(path):
    return [node for node in onnx.load(path).graph.node if node.domain == "spp_lightning"]


def difference(found, expected):
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())
