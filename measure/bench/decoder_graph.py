"""A decoder of any size with random weights, written as plain ONNX without ever being in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    import onnx

_PERIOD = (1 << 16) + 7  # values that repeat: odd, so that no two rows and no two weights are alike


@dataclass(frozen=True)
class DecoderShape:
    """Llama's kind of block: grouped-query attention, gated feed-forward, RMSNorm, an output head of its own."""

    layers: int
    hidden: int = 2048
    heads: int = 16
    kv_heads: int = 4
    ffn: int = 8192
    vocabulary: int = 64000

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


def write_decoder(shape: DecoderShape, file: Path) -> int:
    """`input_ids` [batch, length] -> `logits` [batch, length, vocabulary] in fp32. Returns the bytes of its weights."""
    import onnx
    from onnx import TensorProto, helper

    with file.with_name(f"{file.name}.data").open("wb") as data:
        graph = _Graph(data)
        x = graph.add("Gather", graph.weight(shape.vocabulary, shape.hidden), "input_ids")
        for _ in range(shape.layers):
            x = graph.add("Add", x, _attention(graph, shape, graph.norm(x, shape.hidden)))
            x = graph.add("Add", x, _feed_forward(graph, shape, graph.norm(x, shape.hidden)))
        logits = graph.product(graph.norm(x, shape.hidden), shape.hidden, shape.vocabulary)
        graph.nodes.append(helper.make_node("Identity", [logits], ["logits"]))
        size = data.tell()
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", shape.vocabulary])
    proto = helper.make_graph(graph.nodes, "decoder", [ids], [out], graph.initializers)
    onnx.save(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 24)], ir_version=11), str(file))
    return size


class _Graph:
    def __init__(self, data: BinaryIO) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._data = data
        self._values = (np.random.default_rng(0).standard_normal(_PERIOD) * 0.02).astype(np.float32)

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        name = f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name, **attributes))
        return name

    def weight(self, *shape: int) -> str:
        from onnx import TensorProto

        count, offset = math.prod(shape), self._data.tell()
        for at in range(0, count, _PERIOD):
            self._data.write(self._values[: count - at].data)
        tensor = TensorProto(name=f"w{len(self.initializers)}", dims=shape, data_type=TensorProto.FLOAT)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", Path(self._data.name).name), ("offset", offset), ("length", 4 * count)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        return str(tensor.name)

    def constant(self, values: list[int]) -> str:
        from onnx import numpy_helper

        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def product(self, x: str, inner: int, outer: int) -> str:
        return self.add("MatMul", x, self.weight(inner, outer))

    def norm(self, x: str, width: int) -> str:
        return self.add("RMSNormalization", x, self.weight(width), axis=-1, epsilon=1e-5)


def _attention(graph: _Graph, shape: DecoderShape, x: str) -> str:
    parts = []
    for count in (shape.heads, shape.kv_heads, shape.kv_heads):
        flat = graph.product(x, shape.hidden, count * shape.head_dim)
        parts.append(graph.add("Reshape", flat, graph.constant([0, 0, count, shape.head_dim])))
    heads = [graph.add("Transpose", part, perm=[0, 2, 1, 3]) for part in parts]
    seen = graph.add("Transpose", graph.add("Attention", *heads, is_causal=1), perm=[0, 2, 1, 3])
    return graph.product(graph.add("Reshape", seen, graph.constant([0, 0, shape.hidden])), shape.hidden, shape.hidden)


def _feed_forward(graph: _Graph, shape: DecoderShape, x: str) -> str:
    gate = graph.product(x, shape.hidden, shape.ffn)
    up = graph.product(x, shape.hidden, shape.ffn)
    wide = graph.add("Mul", graph.add("Mul", gate, graph.add("Sigmoid", gate)), up)
    return graph.product(wide, shape.ffn, shape.hidden)
