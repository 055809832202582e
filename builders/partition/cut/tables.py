"""What the solver looks for in a graph: products with weights, and lookups in the table of words."""

from __future__ import annotations

import onnx_ir as ir

from builders.partition.read import Source, shape_of

_SUMMED = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def weight_product(source: Source, node: ir.Node) -> bool:
    if node.op_type not in ("MatMul", "Gemm"):
        return False
    left, weight = node.inputs[0], node.inputs[1]
    shape = shape_of(weight) if weight is not None else None
    return weight in source.constant and left not in source.constant and shape is not None and len(shape) == 2


def depth(node: ir.Node) -> int:
    """Elements that the product contracts."""
    shape = shape_of(node.inputs[0]) if node.inputs[0] is not None else None
    return shape[-1] if shape and isinstance(shape[-1], int) else 0


def word_tables(source: Source, least_bytes: float) -> list[tuple[ir.Value, int]]:
    """The largest table [rows, width] that ids are looked up in, and its rows: once for each lookup.

    Empty when it is not over `least_bytes`.
    """
    found: dict[str, list[tuple[ir.Value, int]]] = {}
    for node in source.graph:
        if node.op_type != "Gather" or node.outputs[0].dtype not in _SUMMED:
            continue
        table, ids = node.inputs[:2]
        shape = shape_of(table) if table is not None else None
        if table is None or table not in source.constant or ids in source.constant or shape is None or len(shape) != 2:
            continue
        if isinstance(shape[0], int):
            found.setdefault(_origin(source, table), []).append((table, shape[0]))
    sizes = {str(value.name): value.const_value.nbytes for value in source.origin if value.const_value is not None}
    largest = max(found, key=lambda name: sizes.get(name, 0), default="")
    return found[largest] if sizes.get(largest, 0) > least_bytes else []


def _origin(source: Source, value: ir.Value) -> str:
    """The tensor in the file that a constant is made of, by way of the first inputs of what dequantises or casts it."""
    while value not in source.origin:
        producer = value.producer()
        before = producer.inputs[0] if producer is not None and producer.inputs else None
        if before is None:
            return str(value.name)
        value = before
    return source.origin[value]
