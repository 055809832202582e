"""Operators that a converter does not know, or gets wrong, in plainer ones that compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience

from builders.errors import UnsupportedError
from builders.graph import add_constant, write_model


def write_plain(source: Path, target: Path) -> None:
    """Saves `source` without Attention and ReduceL2. Raises UnsupportedError for an Attention that no encoder has."""
    model = ir.load(source)
    for node in list(model.graph):
        if node.op_type == "Attention":
            _attention(model.graph, node, source)
        elif node.op_type == "ReduceL2":
            _norm(model.graph, node)
    write_model(model, target)


def _attention(graph: ir.Graph, node: ir.Node, source: Path) -> None:
    """softmax(where(mask, scale * q @ k^T, least)) @ v, of [batch, heads, length, head_dim] each."""
    query, key, value, *rest = node.inputs
    plain = all(each is None for each in rest[1:]) and len(node.outputs) == 1 and rest[:1] not in ([], [None])
    others = {
        name: item.value for name, item in node.attributes.items() if name not in ("scale", "qk_matmul_output_mode")
    }
    if not plain or any(others.values()) or query is None or query.shape is None or len(query.shape) != 4:
        raise UnsupportedError(
            f"graph {source}", got=f"an Attention with {others}", expected="one of a mask and four dimensions",
            fix="use the ONNX graph itself",
        )  # fmt: skip
    assert query.dtype is not None
    dtype = query.dtype.numpy()
    width = query.shape[-1]
    assert isinstance(width, int)  # of a head
    scale = node.attributes["scale"].as_float() if "scale" in node.attributes else width**-0.5
    chain = _Chain(graph, node)
    turned = chain.add("Transpose", key, perm=[0, 1, 3, 2])
    scores = chain.add("Mul", chain.add("MatMul", query, turned), chain.constant("scale", np.array(scale, dtype)))
    # Of finite numbers: a row that is padding alone would otherwise divide zero by zero.
    masked = chain.add("Where", rest[0], scores, chain.constant("least", np.array(np.finfo(dtype).min, dtype)))
    chain.end(chain.add("MatMul", chain.add("Softmax", masked, axis=-1), value))


def _norm(graph: ir.Graph, node: ir.Node) -> None:
    """sqrt(sum(x * x)), over the axes that the node is given."""
    chain = _Chain(graph, node)
    square = chain.add("Mul", node.inputs[0], node.inputs[0])
    kept = {name: item.value for name, item in node.attributes.items()}
    chain.end(chain.add("Sqrt", chain.add("ReduceSum", square, *node.inputs[1:], **kept)))


class _Chain:
    """Nodes in front of one that they replace."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph, self._node, self._count = graph, node, 0
        self._name = str(node.outputs[0].name)

    def add(self, operator: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        made = ir.node(operator, list(inputs), attributes=attributes)
        made.outputs[0].name = f"{self._name}/plain{self._count}"
        self._count += 1
        self._graph.insert_before(self._node, [made])
        return made.outputs[0]

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        return add_constant(self._graph, f"{self._name}/{name}", array)

    def end(self, value: ir.Value) -> None:
        old = self._node.outputs[0]
        old.name, value.name = f"{self._name}/before", self._name  # an output of the graph keeps its name
        convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        self._graph.remove(self._node, safe=True)
