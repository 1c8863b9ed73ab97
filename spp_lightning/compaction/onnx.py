"""export_onnx(): a compact network as ONNX, whose compact layers are operators of this package.

The kernels' library is the library of operators, too: onnxruntime loads it with
``register_custom_ops_library`` and finds ``ColumnChain`` in it, which is described in
``native/onnx_operator.cpp``. All other layers become standard operators.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spp_lightning import native
from spp_lightning.compaction.epilogue import ACTIVATIONS, KINDS
from spp_lightning.compaction.graph.join import Row, join
from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.graph.steps import Step, Value, map_values
from spp_lightning.compaction.kernels.cpu import cost
from spp_lightning.compaction.layers.column_conv import ColumnConv2d

__all__ = ["export_onnx", "onnx_library"]

_OPSET = 17
_GEOMETRY = 11  # numbers of a convolution's geometry in front of its description
_DOMAIN, _DOMAIN_VERSION = "spp_lightning", 1
# For which batches and threads a model says which kernels compute it. In between those for the next
# smaller number hold.
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_THREADS = (1, 2, 4, 8, 16)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_input: Tensor | Sequence[Tensor],
    *,
    dynamic_batch: bool = True,
) -> None:
    """Write a compact network to an ONNX file that runs in a stock onnxruntime.

    Compact layers, and layers in a row that one call computes, become operators ``ColumnChain`` of
    the domain ``spp_lightning``; onnxruntime finds them in :func:`onnx_library`. Weights are
    initializers. An operator's attributes say which kernels compute it, chosen by the cost model
    for the instruction set of this machine; any other machine computes the same, maybe more slowly.

    Inputs are named ``input``, or ``input_0``, ``input_1``, …; outputs likewise ``output``.

    Args:
        model: A compact network, or any network with compact layers in it, float32, on the CPU; it
            is left as it was. What it computes in evaluation mode is exported.
        path: The file. A file that exists is overwritten.
        example_input: An input, ``(B, C, H, W)``, or several. The model takes images of this size.
        dynamic_batch: Whether the first dimension of inputs and outputs may change.

    Raises:
        ImportError: If the package ``onnx`` isn't installed.
        ValueError: If ``model`` isn't a network, or a compact layer isn't float32 on the CPU, or an
            input isn't float32.
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
    import onnx  # by no other part of compaction

    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` must be a network, an instance of nn.Module, got {model!r}.")
    inputs = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
    if not inputs or not all(isinstance(x, Tensor) and x.dtype == torch.float32 for x in inputs):
        raise ValueError("`example_input` must be a float32 tensor, or several.")
    for name, layer in model.named_modules():
        if isinstance(layer, ColumnConv2d):
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
            file,
            input_names=names[0],
            output_names=names[1],
            dynamic_axes=axes,
            opset_version=_OPSET,
            custom_opsets={_DOMAIN: _DOMAIN_VERSION},
            dynamo=False,
        )
    made = onnx.load_from_string(file.getvalue())
    _tidy(made.graph)
    onnx.save(made, path)


def onnx_library() -> Path:
    """The library with the operators of :func:`export_onnx`: one file, which needs no Python.

    Returns:
        Its path, for onnxruntime's ``SessionOptions.register_custom_ops_library``.

    Raises:
        FileNotFoundError: If it wasn't built, since there was no C++ compiler.
    """
    path = native.library_path()
    if not path.exists():
        raise FileNotFoundError(f"The kernels were not built: there is no {path}.")
    return path


class _Node:
    """Layers in a row as an operator.

    Args:
        layers: One or more, each of which reads the output of the one before it.
        linear: A linear layer that reads the last one's output flattened, if there is one.
    """

    def __init__(self, layers: Sequence[ColumnConv2d], linear: nn.Linear | None = None) -> None:
        self.layers, self.linear = tuple(layers), linear

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        tensors = [
            tensor
            for layer in self.layers
            for tensor in (layer.weight, layer.columns, _bias_of(layer, layer.out_channels))
        ]
        if self.linear is not None:
            tensors += [self.linear.weight, _bias_of(self.linear, self.linear.out_features)]
        if residual is not None:
            tensors.append(residual)
        shape = tuple(int(n) for n in x.shape)
        y: Tensor = _Operator.apply(self, shape, residual is not None, x, *tensors)
        return y

    def out_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the output for an input of a shape."""
        *_, last = self._shapes(shape)
        return last if self.linear is None else (last[0], self.linear.out_features)

    def attributes(self, shape: Sequence[int], has_residual: bool) -> dict[str, Any]:
        """The operator's attributes; the suffix of a name says of which type it is."""
        specs = [layer.spec for layer in self.layers]
        ops = [(i, op) for i, spec in enumerate(specs) for op in spec.epilogue.post]
        return {
            "geometry_i": [n for spec in specs for n in spec.pack()[0][:_GEOMETRY]],
            "activation_i": [ACTIVATIONS.index(spec.epilogue.activation) for spec in specs],
            "clamp_f": [n for spec in specs for n in spec.epilogue.clamp],
            "post_i": [
                n
                for i, op in ops
                for n in (
                    *(i, KINDS.index(op.kind), *op.kernel_size, *op.stride, *op.padding),
                    *(int(op.ceil_mode), int(op.count_include_pad)),
                )
            ],
            "alpha_f": [op.alpha for _, op in ops],
            "linear_i": int(self.linear is not None),
            "residual_i": int(has_residual),
            "configs_i": self._configs(shape),
        }

    def _shapes(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        shapes = [tuple(shape)]
        for layer in self.layers:
            size = layer.spec.out_size(*shapes[-1][2:])
            shapes.append((shape[0], layer.geometry.filters, *size))
        return shapes

    def _configs(self, shape: Sequence[int]) -> list[int]:
        """Rows of what the cost model says of batches and threads: see ``native/onnx_chain.h``."""
        layers = [(layer.spec, len(layer.columns)) for layer in self.layers]
        rows = []
        for batch in sorted({*_BATCHES, shape[0]} - {0}):
            shapes = self._shapes((batch, *shape[1:]))
            for threads in sorted({*_THREADS, torch.get_num_threads()}):
                at_once = 0
                if len(layers) > 1 or self.linear is not None:
                    at_once = cost.choose_chain(layers, shapes[0], threads).threads
                rows += [batch, threads, at_once]
                for (spec, count), own in zip(layers, shapes, strict=False):
                    config = cost.choose(spec, count, own, torch.float32, threads, False).config
                    rows += [int(config.kernel), config.threads]
        return rows


class _Operator(torch.autograd.Function):
    """What the tracer sees of a node; it computes nothing, since only its shape is wanted."""

    @staticmethod
    def forward(
        ctx: Any, node: _Node, shape: tuple[int, ...], has_residual: bool, x: Tensor, *_: Tensor
    ) -> Tensor:
        return x.new_zeros(node.out_shape(shape))

    @staticmethod
    def symbolic(
        g: Any, node: _Node, shape: tuple[int, ...], has_residual: bool, x: Any, *tensors: Any
    ) -> Any:
        attributes = node.attributes(shape, has_residual)
        y = g.op(f"{_DOMAIN}::ColumnChain", x, *tensors, **attributes)
        return y.setType(x.type().with_sizes([None, *node.out_shape(shape)[1:]]))


def _check_layer(name: str, layer: ColumnConv2d) -> None:
    if layer.weight.dtype != torch.float32 or not layer.weight.is_cpu:
        raise ValueError(
            f"`model` must be float32 on the CPU, but `{name}` is {layer.weight.dtype} on"
            f" {layer.weight.device}."
        )


def _bias_of(layer: ColumnConv2d | nn.Linear, size: int) -> Tensor:
    return layer.weight.new_zeros(size) if layer.bias is None else layer.bias


def _with_operators(model: nn.Module) -> nn.Module:
    """A copy of a network whose compact layers call nodes; layers and tensors keep their names."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, ColumnConv2d):
            node = _Node([module])
            module.forward = node  # type: ignore[method-assign, assignment]
        elif isinstance(module, CompactNetwork):
            _join_rows(module)
    return model


def _join_rows(network: CompactNetwork) -> None:
    """Replace the layers that one call computes by one step."""
    rows = {row.position: row for row in join(network.compact_steps, network.get_submodule)}
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
        elif position not in replaced:
            steps.append(
                Step(step.kind, step.name, step.target, moved(step.args), moved(step.kwargs))
            )
            places[position] = len(steps) - 1
    network._set_steps(steps)


def _inputs_of(steps: Sequence[Step], row: Row) -> tuple[Any, ...]:
    """What a row reads: its first layer's input, and the residual of its last one, if any."""
    return steps[row.layers[0]].args[0], *steps[row.layers[-1]].args[1:]


def _node_of(network: CompactNetwork, row: Row) -> _Node:
    def layer(position: int) -> Any:
        return network.get_submodule(str(network.compact_steps[position].target))

    linear = None if row.linear is None else layer(row.linear)
    return _Node([layer(i) for i in row.layers], linear)


def _tidy(graph: Any) -> None:
    """Name the nodes after their layers, and let them read initializers rather than copies.

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
        if node.domain == _DOMAIN:
            weights = [x for x in node.input if x.endswith(".weight")]
            name = "+".join(x.removesuffix(".weight") for x in weights)
            count = named[name] = named.get(name, 0) + 1  # a layer may be called more than once
            node.name = name if count == 1 else f"{name}#{count}"


def _names(name: str, count: int) -> list[str]:
    return [name] if count == 1 else [f"{name}_{i}" for i in range(count)]
