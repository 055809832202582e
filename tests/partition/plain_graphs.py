"""Transformers written by hand in plain ONNX: the shapes and habits of exporters that the torch graphs do not show."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


@dataclass(frozen=True)
class Shape:
    """What to build. `qkv`: how queries, keys and values come out of their weights."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 4
    hidden: int = 12
    ffn: int = 16
    layers: int = 2
    vocabulary: int = 32
    attention: Literal["products", "operator", "operator_flat"] = "products"
    qkv: Literal["separate", "split", "slices", "stacked"] = "separate"
    linear: Literal["matmul", "gemm"] = "matmul"
    gate: Literal["none", "separate", "split"] = "none"
    norm: Literal["layer", "rms", "rms_operator"] = "layer"
    first: bool = True  # norm before each part, else behind it
    bias: bool = True
    rotary: bool = False
    sizes: Literal["computed", "zeros"] = "computed"
    head: bool = False
    mask: bool = True


class _Builder:
    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(seed)

    def add(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"{operator.lower()}_{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), names, f"node_{len(self.nodes)}", **attributes))
        return names[0] if outputs == 1 else names

    def weight(self, *shape: int) -> str:
        return self.constant((self.random.standard_normal(shape) * 0.4).astype(np.float32))

    def constant(self, array: Any) -> str:
        array = np.asarray(array)
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array.astype(np.int64) if array.dtype.kind == "i" else array, name))
        return name


def transformer(shape: Shape, file: Path, seed: int = 0) -> Path:
    """`input_ids` (and `attention_mask`) -> `hidden`, or `logits` with a head."""
    b = _Builder(seed)
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])]
    mask = ""
    if shape.mask:
        inputs.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "length"]))
        kept = b.add("Cast", b.add("Unsqueeze", "attention_mask", b.constant([1, 2])), to=TensorProto.FLOAT)
        mask = b.add("Mul", b.add("Sub", kept, b.constant(np.float32(1))), b.constant(np.float32(1e4)))
    x = b.add("Gather", b.weight(shape.vocabulary, shape.hidden), "input_ids")
    for _ in range(shape.layers):
        x = _residual(b, shape, x, lambda y: _attention(b, shape, y, mask))
        x = _residual(b, shape, x, lambda y: _feed_forward(b, shape, y))
    x = _norm(b, shape, x)
    width = shape.hidden
    if shape.head:
        x, width = b.add("MatMul", x, b.weight(shape.hidden, shape.vocabulary)), shape.vocabulary
    name = "logits" if shape.head else "hidden"
    b.nodes.append(helper.make_node("Identity", [x], [name]))
    output = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "length", width])
    graph = helper.make_graph(b.nodes, "plain", inputs, [output], b.weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), str(file))
    return file


def _residual(b: _Builder, shape: Shape, x: str, part: Any) -> str:
    if shape.first:
        return b.add("Add", x, part(_norm(b, shape, x)))
    return _norm(b, shape, b.add("Add", part(x), x))


def _norm(b: _Builder, shape: Shape, x: str) -> str:
    if shape.norm == "layer":
        return b.add("LayerNormalization", x, b.weight(shape.hidden), b.weight(shape.hidden))
    if shape.norm == "rms_operator":
        return b.add("RMSNormalization", x, b.weight(shape.hidden), epsilon=1e-5)
    square = b.add("ReduceMean", b.add("Pow", x, b.constant(np.float32(2))), b.constant([-1]), keepdims=1)
    scale = b.add("Sqrt", b.add("Add", square, b.constant(np.float32(1e-5))))
    return b.add("Mul", b.add("Div", x, scale), b.weight(shape.hidden))


def _linear(b: _Builder, shape: Shape, x: str, inner: int, outer: int) -> str:
    if shape.linear == "gemm":
        flat = b.add("Reshape", x, b.constant([-1, inner]))
        extra = [b.weight(outer)] if shape.bias else []
        y = b.add("Gemm", flat, b.weight(outer, inner), *extra, transB=1, beta=0.5)
        sizes = b.add("Concat", b.add("Shape", x, end=2), b.constant([outer]), axis=0)
        return b.add("Reshape", y, sizes)
    y = b.add("MatMul", x, b.weight(inner, outer))
    return b.add("Add", y, b.weight(outer)) if shape.bias else y


def _sizes(b: _Builder, shape: Shape, x: str, *rest: int) -> str:
    if shape.sizes == "zeros":
        return b.constant([0, 0, *rest])
    return b.add("Concat", b.add("Shape", x, end=2), b.constant(list(rest)), axis=0)


def _attention(b: _Builder, shape: Shape, x: str, mask: str) -> str:
    widths = [shape.heads * shape.head_dim, *[shape.kv_heads * shape.head_dim] * 2]
    # ONNX Runtime infers a wrong shape for Attention in three dimensions behind a Gather, and refuses the whole graph.
    if shape.qkv == "stacked" and shape.heads == shape.kv_heads and shape.attention != "operator_flat":
        fused = _linear(b, shape, x, shape.hidden, sum(widths))
        parts = b.add("Reshape", fused, _sizes(b, shape, fused, 3, shape.heads, shape.head_dim))
        turned = b.add("Transpose", parts, perm=[2, 0, 3, 1, 4])
        q, k, v = [b.add("Gather", turned, b.constant(index), axis=0) for index in range(3)]
    else:
        flat = _projections(b, shape, x, widths)
        if shape.attention == "operator_flat":
            q, k, v = flat
        else:
            q, k, v = [
                _heads(b, shape, each, count)
                for each, count in zip(flat, (shape.heads, shape.kv_heads, shape.kv_heads), strict=True)
            ]
    if shape.attention == "products":
        y = _products(b, shape, _rotated(b, shape, q, 0), _rotated(b, shape, k, 0), v, mask)
    else:
        counts = (
            {"q_num_heads": shape.heads, "kv_num_heads": shape.kv_heads} if shape.attention == "operator_flat" else {}
        )
        q, k = [
            _rotated(b, shape, each, count if counts else 0) for each, count in ((q, shape.heads), (k, shape.kv_heads))
        ]
        y = b.add("Attention", q, k, v, *([_square(b, x, mask)] if mask else []), **counts)
    if shape.attention != "operator_flat":
        y = _merge(b, shape, y, widths[0])
    return _linear(b, shape, y, widths[0], shape.hidden)


def _merge(b: _Builder, shape: Shape, x: str, width: int) -> str:
    y = b.add("Transpose", x, perm=[0, 2, 1, 3])
    return b.add("Reshape", y, _sizes(b, shape, y, width))


def _heads(b: _Builder, shape: Shape, x: str, count: int) -> str:
    parts = b.add("Reshape", x, _sizes(b, shape, x, count, shape.head_dim))
    return b.add("Transpose", parts, perm=[0, 2, 1, 3])


def _square(b: _Builder, x: str, mask: str) -> str:
    """ONNX Runtime's Attention wants the query dimension of the mask spelled out."""
    batch, length = b.add("Shape", x, end=1), b.add("Shape", x, start=1, end=2)
    return b.add("Expand", mask, b.add("Concat", batch, b.constant([1]), length, length, axis=0))


def _projections(b: _Builder, shape: Shape, x: str, widths: list[int]) -> list[str]:
    if shape.qkv not in ("split", "slices"):
        return [_linear(b, shape, x, shape.hidden, width) for width in widths]
    fused = _linear(b, shape, x, shape.hidden, sum(widths))
    if shape.qkv == "split":
        return list(b.add("Split", fused, b.constant(widths), outputs=3, axis=2))
    ends = np.cumsum([0, *widths])
    return [b.add("Slice", fused, *[b.constant([value]) for value in (low, high, 2)]) for low, high in pairwise(ends)]


def _rotated(b: _Builder, shape: Shape, x: str, heads: int) -> str:
    if not shape.rotary:
        return x
    angles = np.outer(np.arange(64), 0.3 ** np.arange(shape.head_dim // 2)).astype(np.float32)
    size = b.add("Shape", x, start=1, end=2) if heads else b.add("Shape", x, start=2, end=3)
    rows = b.add("Slice", b.constant(angles), b.constant([0]), size, b.constant([0]))
    table = b.add("Unsqueeze", rows, b.constant([0]))
    batch = b.add("Concat", b.add("Shape", x, end=1), b.constant([1, 1]), axis=0)
    cos, sin = [b.add("Expand", b.add(name, table), batch) for name in ("Cos", "Sin")]
    return b.add("RotaryEmbedding", x, cos, sin, "", **({"num_heads": heads} if heads else {}))


def _products(b: _Builder, shape: Shape, q: str, k: str, v: str, mask: str) -> str:
    copies = shape.heads // shape.kv_heads
    if copies > 1:
        k, v = [_repeat(b, shape, each, copies) for each in (k, v)]
    scores = b.add("MatMul", b.add("Mul", q, b.constant(np.float32(0.5))), b.add("Transpose", k, perm=[0, 1, 3, 2]))
    if mask:
        scores = b.add("Add", scores, mask)
    return b.add("MatMul", b.add("Softmax", scores, axis=-1), v)


def _repeat(b: _Builder, shape: Shape, x: str, copies: int) -> str:
    batch, length = b.add("Shape", x, end=1), b.add("Shape", x, start=2, end=3)
    wide = b.add("Unsqueeze", x, b.constant([2]))
    many = b.add(
        "Expand",
        wide,
        b.add("Concat", batch, b.constant([shape.kv_heads, copies]), length, b.constant([shape.head_dim]), axis=0),
    )
    return b.add(
        "Reshape", many, b.add("Concat", batch, b.constant([shape.heads]), length, b.constant([shape.head_dim]), axis=0)
    )


def _feed_forward(b: _Builder, shape: Shape, x: str) -> str:
    if shape.gate == "none":
        y = b.add("Gelu", _linear(b, shape, x, shape.hidden, shape.ffn))
    elif shape.gate == "separate":
        gate = _linear(b, shape, x, shape.hidden, shape.ffn)
        y = b.add("Mul", b.add("Mul", gate, b.add("Sigmoid", gate)), _linear(b, shape, x, shape.hidden, shape.ffn))
    else:
        gate, up = b.add("Split", _linear(b, shape, x, shape.hidden, 2 * shape.ffn), outputs=2, axis=-1, num_outputs=2)
        y = b.add("Mul", b.add("Mul", gate, b.add("Sigmoid", gate)), up)
    return _linear(b, shape, y, shape.ffn, shape.hidden)
