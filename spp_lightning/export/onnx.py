"""export_onnx(): a compact network as ONNX, whose compact layers are operators of this package.

The kernels' library is the library of operators, too: onnxruntime loads it with
``register_custom_ops_library``. The operators are described in ``native/onnx_chain_node.cpp``,
``onnx_int8_node.cpp`` and ``onnx_pool_node.cpp``. All other layers become standard operators.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spp_lightning.compaction.graph.join import Row, join
from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.graph.steps import Step, Value, map_values
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.layers.quantized import Quantize, QuantizedConv2d, QuantizedLinear
from spp_lightning.export.chain_node import ChainNode
from spp_lightning.export.int8_node import Int8LayerNode, QuantizeNode
from spp_lightning.export.node import DOMAIN
from spp_lightning.export.pool_node import pool_nodes

__all__ = ["export_onnx"]

_OPSET = 17
_DOMAIN_VERSION = 1


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_input: Tensor | Sequence[Tensor],
    *,
    dynamic_batch: bool = True,
) -> None:
    """Write a compact network to an ONNX file that runs in a stock onnxruntime.

    Compact layers, and layers in a row that one call computes, become operators ``ColumnChain`` of
    the domain ``spp_lightning``; int8 layers, roundings to uint8 and pools become operators of it,
    too. onnxruntime finds them in the library ``onnx_library()``. Weights are initializers. A
    ``ColumnChain`` says by attributes which kernels compute it: the cost model chose them for the
    instruction set of this machine. Any other computes the same, maybe more slowly.

    Tensors between int8 layers are uint8. These operators compute the bits that the network
    computes in PyTorch. Operators of onnxruntime round otherwise than torch.

    Inputs are named ``input``, or ``input_0``, ``input_1``, …; outputs likewise ``output``.

    Args:
        model: A compact network, float32 or what ``quantize_compact`` made, or any network with
            compact layers in it, on the CPU; it is left as it was. What it computes in evaluation
            mode is exported.
        path: The file. A file that exists is overwritten.
        example_input: An input, ``(B, C, H, W)``, or several. The model takes images of this size.
        dynamic_batch: Whether the first dimension of inputs and outputs may change.

    Raises:
        ValueError: If ``model`` isn't a network, or a compact layer isn't float32 or int8 on the
            CPU, or an int8 layer is of a derived class or is given inputs that don't fit, or an
            input isn't float32. Then no file is written.
        torch.onnx.errors.OnnxExporterError: If ONNX has no operator for something that the network
            computes.

    >>> import tempfile
    >>> from spp_lightning.compaction.epilogue import RELU
    >>> net = nn.Sequential(ColumnConv2d.of(nn.Conv2d(3, 8, 3), RELU), nn.Flatten())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_onnx(net, f"{folder}/net.onnx", torch.zeros(1, 3, 8, 8))
    ...     Path(f"{folder}/net.onnx").stat().st_size > 1000
    True
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` must be a network, an instance of nn.Module, got {model!r}.")
    inputs = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
    if not inputs or not all(isinstance(x, Tensor) and x.dtype == torch.float32 for x in inputs):
        raise ValueError("`example_input` must be a float32 tensor, or several.")
    for name, layer in model.named_modules():
        _check_layer(name, layer)
    network = _with_operators(model)
    with torch.no_grad():
        outputs = pytree.tree_leaves(network(*inputs))
    names = _names("input", len(inputs)), _names("output", len(outputs))
    axes = {name: {0: "batch"} for name in (*names[0], *names[1])} if dynamic_batch else None
    file = io.BytesIO()
    with warnings.catch_warnings():
        # The exporter that needs no further package is deprecated, and says so in several ways.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            inputs,
            file,  # type: ignore[arg-type]  # a file works
            input_names=names[0],
            output_names=names[1],
            dynamic_axes=axes,
            opset_version=_OPSET,
            custom_opsets={DOMAIN: _DOMAIN_VERSION},
            dynamo=False,
        )
    made = onnx.load_from_string(file.getvalue())
    _tidy(made.graph)
    onnx.save(made, path)


def _check_layer(name: str, layer: nn.Module) -> None:
    dtypes = {ColumnConv2d: torch.float32, QuantizedConv2d: torch.int8}
    for kind, dtype in dtypes.items():
        if isinstance(layer, kind) and (layer.weight.dtype != dtype or not layer.weight.is_cpu):
            raise ValueError(
                f"`model` must be float32 or int8 on the CPU, but `{name}` is {layer.weight.dtype}"
                f" on {layer.weight.device}."
            )
    exported = (QuantizedConv2d, QuantizedLinear, Quantize)
    if isinstance(layer, exported) and type(layer) not in exported:
        raise ValueError(
            f"`model` must have int8 layers of this package, but `{name}` is of a derived class,"
            f" {type(layer).__name__}."
        )


def _with_operators(model: nn.Module) -> nn.Module:
    """A copy of a network whose compact layers call nodes; layers and tensors keep their names."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for name, module in list(model.named_modules()):
        node: Callable[..., Tensor]
        if isinstance(module, ColumnConv2d):
            node = ChainNode([module])
        elif isinstance(module, QuantizedConv2d):
            node = Int8LayerNode(name, module)
        elif isinstance(module, Quantize):
            node = QuantizeNode(name, module)
        else:
            if isinstance(module, CompactNetwork):
                _replace_steps(module)
            continue
        module.forward = node  # type: ignore[method-assign, assignment]
    return model


def _replace_steps(network: CompactNetwork) -> None:
    """Make one step of the layers that one call computes, and let pools be nodes."""
    rows = {row.position: row for row in join(network.compact_steps, network.get_submodule)}
    pools = pool_nodes(network.compact_steps, network.get_submodule)
    replaced = {i for row in rows.values() for i in row.replaced}
    places: dict[int, int] = {}  # of the old steps' results among the new steps
    steps: list[Step] = []

    def moved(argument: Any) -> Any:
        return map_values(argument, lambda x: Value(places[x.step]) if isinstance(x, Value) else x)

    for position, step in enumerate(network.compact_steps):
        if position in rows:
            row = rows[position]
            x, *residual = _inputs_of(network.compact_steps, row)
            result = network.compact_steps[row.result]
            node = _node_of(network, row)
            steps.append(Step("function", result.name, node, (moved(x), *moved(residual))))
            places[row.result] = len(steps) - 1
        elif position in pools:
            pool, planes = pools[position]
            steps.append(Step("function", step.name, pool, (moved(planes),)))
            places[position] = len(steps) - 1
        elif position not in replaced:
            steps.append(
                Step(step.kind, step.name, step.target, moved(step.args), moved(step.kwargs))
            )
            places[position] = len(steps) - 1
    network._set_steps(steps)


def _inputs_of(steps: Sequence[Step], row: Row) -> tuple[Any, ...]:
    """What a row reads: its first layer's input, and the residual of its last one, if any."""
    return steps[row.layers[0]].args[0], *steps[row.layers[-1]].args[1:]


def _node_of(network: CompactNetwork, row: Row) -> ChainNode:
    def layer(position: int) -> Any:
        return network.get_submodule(str(network.compact_steps[position].target))

    linear = None if row.linear is None else layer(row.linear)
    return ChainNode([layer(i) for i in row.layers], linear)


def _tidy(graph: Any) -> None:
    """Name the nodes after their weights, and let them read initializers rather than copies.

    The exporter writes equal tensors once, and copies them by ``Identity``. A session that doesn't
    optimize would take a copy for something that changes.
    """
    constants = {tensor.name for tensor in graph.initializer}
    copied = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Identity" and node.input[0] in constants
    }
    results, named = {output.name for output in graph.output}, dict[str, int]()
    for node in list(graph.node):
        if node.output[0] in copied and node.output[0] not in results:
            graph.node.remove(node)
            continue
        for i, name in enumerate(node.input):
            node.input[i] = copied.get(name, name)
        weights = [x for x in node.input if x.endswith(".weight")]
        if node.domain == DOMAIN and weights:
            name = "+".join(x.removesuffix(".weight") for x in weights)
            count = named[name] = named.get(name, 0) + 1  # a layer may be called more than once
            node.name = name if count == 1 else f"{name}#{count}"


def _names(name: str, count: int) -> list[str]:
    return [name] if count == 1 else [f"{name}_{i}" for i in range(count)]
