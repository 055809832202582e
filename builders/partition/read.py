"""A graph as the partitioner reads it: standard operators only, every shape inferred, every weight located.

After `read` each initializer, and each node that only reshapes or dequantises one, has exactly one consumer, so that
two uses of one weight (a tied embedding) can be placed in two ways. Copies are names only: weights stay in the file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from builders.errors import InputError, UnsupportedError
from builders.partition.shapes import has_unknowns, settle

_SMALL_BYTES = 4096  # constants that decide shapes are far smaller, weights that matter are larger
_WEIGHT_CHAIN = ("DequantizeLinear", "Transpose", "Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze")
_STANDARD = ("", "ai.onnx")
_OLDEST_OPSET = 13


@dataclass
class Source:
    """`origin` maps each initializer (copies too) to the name of the tensor in the file."""

    file: Path
    model: ir.Model
    origin: dict[ir.Value, str] = field(default_factory=dict)
    constant: set[ir.Value] = field(default_factory=set)

    @property
    def graph(self) -> ir.Graph:
        return self.model.graph

    @property
    def weight_bytes(self) -> int:
        """Of the file: a weight that is used twice counts once."""
        found = [value.const_value for value, origin in self.origin.items() if origin == value.name]
        return sum(tensor.nbytes for tensor in found if tensor is not None)


def read(file: Path) -> Source:
    """Raises InputError: no such file, not ONNX, weights missing or short, vendor operators, control flow,
    weights that are graph inputs."""
    source = Source(file, _load(file))
    _require_plain(source)
    _require_weights(source)
    _prepare(source)
    _one_use_each(source)
    source.constant = _constants(source.graph)
    _require_fixed_weights(source)
    return source


def shape_of(value: ir.Value) -> tuple[int | str, ...] | None:
    """Static sizes as int, dynamic ones as a symbol; None where the rank is unknown."""
    if value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value or f"?{id(dim)}" for dim in value.shape)


def constant_array(value: ir.Value | None) -> NDArray[Any] | None:
    """A small constant's content; None for anything else."""
    if value is None or value.const_value is None or value.const_value.nbytes > _SMALL_BYTES:
        return None
    return value.const_value.numpy()


def _load(file: Path) -> ir.Model:
    try:
        return ir.load(file)
    except Exception as error:  # protobuf and onnx_ir raise many unrelated types for bytes that are no graph
        raise InputError(
            f"graph {file}",
            got="no such file" if not file.is_file() else f"{type(error).__name__}: {str(error).splitlines()[0]}",
            expected="an ONNX file",
            fix="give the path of the .onnx file itself",
        ) from error


def _require_plain(source: Source) -> None:
    graph, name = source.graph, source.file.name
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in graph if node.domain not in _STANDARD})
    if foreign or source.model.functions:
        raise UnsupportedError(
            f"graph {name}",
            got=f"operators that ONNX does not define: {', '.join(foreign) or 'model-local functions'}",
            expected="standard ai.onnx operators, for which placements are known",
            fix="export without vendor operators or functions (torch.onnx.export, dynamo=True)",
        )
    if any(node.op_type == "DistCollective" for node in graph):
        raise InputError(
            f"graph {name}",
            got="a graph that holds collectives",
            expected="the whole model",
            fix="give the graph that was sharded",
        )
    opset = graph.opset_imports.get("", 0)
    if opset < _OLDEST_OPSET:
        raise UnsupportedError(
            f"graph {name}",
            got=f"opset {opset}",
            expected=f"opset {_OLDEST_OPSET} or newer; older operators mean other things by the same names",
            fix="export again with a newer opset, or convert with onnx.version_converter",
        )
    nested = sorted(
        {node.op_type for node in graph for a in node.attributes.values() if a.type.name in ("GRAPH", "GRAPHS")}
    )
    if nested:
        raise UnsupportedError(
            f"graph {name}",
            got=f"control flow ({', '.join(nested)})",
            expected="one straight graph",
            fix="export one graph without If, Loop or Scan; merged decoders must be exported apart",
        )
    overridable = [value.name for value in graph.inputs if value.is_initializer()]
    if overridable:
        raise InputError(
            f"graph {name}",
            got=f"weights that are graph inputs too: {', '.join(map(str, overridable[:4]))}",
            expected="weights as constants",
            fix="export without keep_initializers_as_inputs",
        )


def _require_weights(source: Source) -> None:
    for value in source.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        path = Path(tensor.path)
        need = (tensor.offset or 0) + tensor.nbytes
        have = path.stat().st_size if path.is_file() else None
        if have is None or have < need:
            raise InputError(
                f"weight {value.name} of {source.file.name}",
                got="no file " + path.name if have is None else f"{have} bytes in {path.name}",
                expected=f"{need} bytes of external data beside the graph",
                fix="copy the data file that belongs to the graph into the same folder",
            )


def _prepare(source: Source) -> None:
    """Constants become initializers, dead nodes go, and every shape is inferred."""
    from onnx_ir.passes import common

    for value in source.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= _SMALL_BYTES:  # shape inference reads values
            value.const_value = ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=value.name)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(source.model)
    common.RemoveUnusedNodesPass()(source.model)
    common.TopologicalSortPass()(source.model)
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(source.model)
    if has_unknowns(source.graph):
        settle(source.graph)
    for value in [value for node in source.graph for value in node.outputs]:
        _split_from_slices(source.graph, value)


def _split_from_slices(graph: ir.Graph, value: ir.Value) -> None:
    """Slices that together are the whole of one dimension become one Split, which has a rule when that one is cut."""
    by_axis: dict[int, dict[tuple[int, int], list[ir.Node]]] = {}
    shape = shape_of(value)
    for node in value.consumers():
        given = [constant_array(each) for each in node.inputs[1:]]
        if (
            node.op_type != "Slice"
            or shape is None
            or not 3 <= len(given) <= 4
            or any(e is None or e.size != 1 for e in given)
        ):
            continue
        start, end, axis, step = [int(each.reshape(-1)[0]) for each in given if each is not None] + [1] * (
            4 - len(given)
        )
        size = shape[axis]
        if step == 1 and isinstance(size, int):
            low, high = (max(0, min(bound + size if bound < 0 else bound, size)) for bound in (start, end))
            by_axis.setdefault(axis % len(shape), {}).setdefault((low, high), []).append(node)
    for axis, pieces in by_axis.items():
        ranges = sorted(pieces)
        bounds = [0, *(high for _, high in ranges)]
        if len(ranges) < 2 or [low for low, _ in ranges] != bounds[:-1] or bounds[-1] != (shape or ())[axis]:
            continue
        name = f"{value.name}/parts{axis}"
        sizes = ir.Value(name=name, const_value=ir.tensor(np.diff(bounds).astype(np.int64), name=name))
        sizes.shape, sizes.type = ir.Shape([len(ranges)]), ir.TensorType(ir.DataType.INT64)
        graph.register_initializer(sizes)
        split = ir.Node(
            "", "Split", [value, sizes], [ir.AttrInt64("axis", axis)], num_outputs=len(ranges), name=f"{name}/split"
        )
        for part, piece in zip(split.outputs, ranges, strict=True):
            first = pieces[piece][0].outputs[0]
            part.name, part.shape, part.type = first.name, first.shape, first.type
            for index, node in enumerate(pieces[piece]):
                node.outputs[0].name = f"{first.name}/slice{index}"
                node.outputs[0].replace_all_uses_with(part, replace_graph_outputs=True)
        first_node = min((nodes[0] for nodes in pieces.values()), key=list(graph).index)
        graph.insert_before(first_node, split)
        graph.remove([node for nodes in pieces.values() for node in nodes], safe=True)


def _one_use_each(source: Source) -> None:
    graph = source.graph
    constant = _constants(graph)
    for node in reversed(list(graph)):
        if node.op_type in _WEIGHT_CHAIN and node.outputs[0] in constant and not node.outputs[0].is_graph_output():
            for user, index in list(node.outputs[0].uses())[1:]:
                copy = ir.Node("", node.op_type, node.inputs, node.attributes.values(), num_outputs=1)
                _like(
                    copy.outputs[0],
                    node.outputs[0],
                    f"{node.outputs[0].name}/{user.name or user.outputs[0].name}.{index}",
                )
                graph.insert_before(node, copy)
                user.replace_input_with(index, copy.outputs[0])
    for name, value in list(graph.initializers.items()):
        source.origin[value] = name
        for count, (user, index) in enumerate(list(value.uses())[1:]):
            copied = ir.Value(name=f"{name}/use{count + 1}", const_value=value.const_value)
            _like(copied, value, str(copied.name))
            graph.register_initializer(copied)
            source.origin[copied] = name
            user.replace_input_with(index, copied)


def _like(value: ir.Value, model: ir.Value, name: str) -> None:
    value.name, value.shape, value.type = name, model.shape, model.type


def _constants(graph: ir.Graph) -> set[ir.Value]:
    """Values that depend on no graph input."""
    found = set(graph.initializers.values())
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if inputs and all(value in found for value in inputs):
            found.update(node.outputs)
    return found


def _require_fixed_weights(source: Source) -> None:
    for node in source.graph:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        weight = node.inputs[1]
        shape = shape_of(weight) if weight is not None else None
        if weight is None or weight in source.constant or not weight.is_graph_input() or shape is None:
            continue
        if len(shape) == 2 and all(isinstance(size, int) for size in shape):
            raise UnsupportedError(
                f"weight {weight.name} of {source.file.name}",
                got="a graph input",
                expected="a constant in the file, which can be cut before it is loaded",
                fix="export the weight as an initializer",
            )
