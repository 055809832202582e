"""Shapes that ONNX's own inference leaves open, found by trying two sets of input sizes.

Older exporters compute every Reshape from `Shape`, so a head count shows up as an unknown. With concrete input sizes
all of that arithmetic can be carried out. A size that comes out the same for two sets of sizes is static; one that
follows an input dimension is that dimension. Only shapes and small integers are computed, never the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

_VALUE_ELEMENTS = 4096  # more is data, not arithmetic on sizes
_TRIALS = ((3, 11, 5, 7, 13, 17, 19, 23), (6, 10, 9, 14, 15, 21, 22, 26))  # small: tables of positions are short


@dataclass
class _Trial:
    """What is known of each value by name: its type with concrete sizes, and its content where that is small."""

    types: dict[str, onnx.TypeProto] = field(default_factory=dict)
    values: dict[str, NDArray[Any]] = field(default_factory=dict)


def has_unknowns(graph: ir.Graph) -> bool:
    """Whether some size is neither static nor a dimension of an input."""
    known = set(_symbols(graph))
    for value in [value for node in graph for value in node.outputs if value.name]:
        if value.shape is None or any(_symbol(dim) not in known for dim in value.shape if not isinstance(dim, int)):
            return True
    return False


def settle(graph: ir.Graph) -> None:
    """Gives every value the shape that two trials agree on; leaves alone what could not be computed."""
    symbols = _symbols(graph)
    if len(symbols) > len(_TRIALS[0]):
        return
    sizes = [_solve_sums(symbols, dict(zip(symbols, trial, strict=False))) for trial in _TRIALS]
    trials = [_try(graph, each) for each in sizes]
    for node in graph:
        for value in node.outputs:
            shapes = [_sizes(trial.types.get(str(value.name))) for trial in trials]
            if shapes[0] is not None and shapes[1] is not None and len(shapes[0]) == len(shapes[1]):
                value.shape = ir.Shape([_settled(a, b, sizes) for a, b in zip(shapes[0], shapes[1], strict=True)])


def _settled(first: int, second: int, sizes: Sequence[dict[str, int]]) -> int | str:
    if first == second:
        return first
    for symbol, size in sizes[0].items():
        if (size, sizes[1][symbol]) == (first, second):
            return symbol
    for a, b in combinations_with_replacement(sizes[0], 2):
        if (sizes[0][a] * sizes[0][b], sizes[1][a] * sizes[1][b]) == (first, second):
            return f"{a}*{b}"
    return f"size_{first}_{second}"  # the same name for the same behaviour


def _symbols(graph: ir.Graph) -> list[str]:
    names = [_symbol(dim) for value in graph.inputs for dim in value.shape or () if not isinstance(dim, int)]
    return list(dict.fromkeys(name for name in names if name))


def _symbol(dim: int | ir.SymbolicDim) -> str:
    return "" if isinstance(dim, int) else str(dim.value or "")


def _solve_sums(symbols: Sequence[str], sizes: dict[str, int]) -> dict[str, int]:
    """Exporters name a sum `past + length`: it must be the sum."""
    for symbol in symbols:
        parts = [part.strip() for part in symbol.split("+")]
        if len(parts) > 1 and all(part in sizes for part in parts):
            sizes[symbol] = sum(sizes[part] for part in parts)
    return sizes


def _try(graph: ir.Graph, sizes: dict[str, int]) -> _Trial:
    trial = _Trial()
    for value in graph.inputs:
        dims = [dim if isinstance(dim, int) else sizes.get(_symbol(dim)) for dim in value.shape or ()]
        _note(trial, value, dims)
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None:
            _note(trial, value, [int(size) for size in tensor.shape.numpy()])
            if tensor.size <= _VALUE_ELEMENTS and tensor.dtype.bitwidth >= 8:
                trial.values[str(value.name)] = tensor.numpy()
    opset = onnx.helper.make_opsetid("", graph.opset_imports[""])
    for node in graph:
        _infer(trial, ir.to_proto(node), opset)
    return trial


def _note(trial: _Trial, value: ir.Value, dims: Sequence[int | None]) -> None:
    assert value.dtype is not None
    trial.types[str(value.name)] = onnx.helper.make_tensor_type_proto(value.dtype.value, dims)


def _infer(trial: _Trial, node: onnx.NodeProto, opset: onnx.OperatorSetIdProto) -> None:
    """Shapes by ONNX's rule for the operator; the content too, where all that goes in is known and little comes out."""
    if node.op_type == "Shape":
        sizes = _sizes(trial.types.get(node.input[0]))
        if sizes is not None:
            bounds = {item.name: item.i for item in node.attribute}
            asked = sizes[bounds.get("start", 0) : bounds.get("end", len(sizes))]
            trial.values[node.output[0]] = np.array(asked, np.int64)
    inputs = [name for name in node.input if name]
    types = {name: trial.types[name] for name in inputs if name in trial.types}
    data = {name: onnx.numpy_helper.from_array(trial.values[name], name) for name in inputs if name in trial.values}
    schema = onnx.defs.get_schema(node.op_type, opset.version, "")
    try:
        found = onnx.shape_inference.infer_node_outputs(schema, node, types, data, opset_imports=[opset])
    except (onnx.shape_inference.InferenceError, RuntimeError, TypeError):
        return  # stays unknown, and so does what follows
    trial.types.update(found)
    sizes = _sizes(found.get(node.output[0]))
    small = sizes is not None and int(np.prod(sizes)) <= _VALUE_ELEMENTS
    if small and node.op_type != "Shape" and all(name in trial.values for name in inputs):
        _evaluate(trial, node, types, found, opset)


def _evaluate(
    trial: _Trial,
    node: onnx.NodeProto,
    types: dict[str, onnx.TypeProto],
    found: dict[str, onnx.TypeProto],
    opset: onnx.OperatorSetIdProto,
) -> None:
    from onnx.reference import ReferenceEvaluator

    values = [[onnx.helper.make_value_info(name, kind) for name, kind in each.items()] for each in (types, found)]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "node", *values), opset_imports=[opset])
    try:
        with np.errstate(all="ignore"):  # constants beside the sizes may overflow; sizes do not
            results = ReferenceEvaluator(model).run(None, {name: trial.values[name] for name in types})
    except Exception:  # noqa: BLE001 - a reference that lacks an operator raises whatever its code happens to raise
        return
    for name, result in zip(found, results, strict=True):
        if isinstance(result, np.ndarray | np.generic):
            trial.values[name] = np.asarray(result)


def _sizes(kind: onnx.TypeProto | None) -> list[int] | None:
    """Concrete sizes, or None where one is unknown."""
    if kind is None or not kind.tensor_type.HasField("shape"):
        return None
    dims = kind.tensor_type.shape.dim
    return [dim.dim_value for dim in dims] if all(dim.HasField("dim_value") for dim in dims) else None
