"""Quantised forms of a graph, written as TensorRT and ONNX Runtime both read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_LIMITS = {4: 7, 8: 127}


def weight_only(source: Path, file: Path, bits: int, block: int = 32) -> Path:
    """Each MatMul weight [K, N] as integers behind a DequantizeLinear, one scale for `block` rows of a column."""
    model = onnx.load(str(source))

    def quantise(name: str, weight: Any) -> onnx.NodeProto:
        rows = block if weight.shape[0] % block == 0 else weight.shape[0]
        grouped = weight.reshape(-1, rows, weight.shape[1])
        scales = np.maximum(np.abs(grouped).max(axis=1), 1e-6) / _LIMITS[bits]
        values = np.clip(np.rint(grouped / scales[:, None]), -_LIMITS[bits], _LIMITS[bits]).reshape(weight.shape)
        kind = TensorProto.INT4 if bits == 4 else TensorProto.INT8
        model.graph.initializer.extend([
            helper.make_tensor(f"{name}_q", kind, weight.shape, values.astype(np.int8).reshape(-1)),
            numpy_helper.from_array(scales.astype(np.float32), f"{name}_s"),
        ])  # fmt: skip
        return helper.make_node("DequantizeLinear", [f"{name}_q", f"{name}_s"], [f"{name}_d"], axis=0, block_size=rows)

    _replace_weights(model, quantise)
    onnx.save(model, str(file))
    return file


def words(source: Path, file: Path, axis: int, block: int = 0) -> Path:
    """INT8: the first table that is looked up in, a scale for each index of `axis`, or for `block` columns of a row."""
    model = onnx.load(str(source))
    graph = model.graph
    node = next(each for each in graph.node if each.op_type == "Gather")
    table = next(tensor for tensor in graph.initializer if tensor.name == node.input[0])
    values = numpy_helper.to_array(table)
    sizes = (len(values), values.shape[1] // block) if block else (values.shape[axis],)
    scales = np.random.default_rng(0).uniform(0.01, 0.03, sizes).astype(np.float32)
    graph.initializer.remove(table)
    graph.initializer.extend([
        numpy_helper.from_array(np.clip(np.rint(values / 0.02), -127, 127).astype(np.int8), "words"),
        numpy_helper.from_array(scales, "words_scale"),
    ])  # fmt: skip
    options = {"axis": axis} | ({"block_size": block} if block else {})
    graph.node.insert(0, helper.make_node("DequantizeLinear", ["words", "words_scale"], ["words_wide"], **options))
    node.input[0] = "words_wide"
    onnx.save(model, str(file))
    return file


def qdq(source: Path, file: Path) -> Path:
    """INT8: weights one scale a column, the inputs of products one scale a tensor."""
    model = onnx.load(str(source))

    def quantise(name: str, weight: Any) -> onnx.NodeProto:
        scales = np.maximum(np.abs(weight).max(axis=0), 1e-6) / 127
        model.graph.initializer.extend([
            numpy_helper.from_array(np.clip(np.rint(weight / scales), -127, 127).astype(np.int8), f"{name}_q"),
            numpy_helper.from_array(scales.astype(np.float32), f"{name}_s"),
            numpy_helper.from_array(np.zeros(len(scales), np.int8), f"{name}_z"),
        ])  # fmt: skip
        return helper.make_node("DequantizeLinear", [f"{name}_q", f"{name}_s", f"{name}_z"], [f"{name}_d"], axis=1)

    for node in _replace_weights(model, quantise):
        value = node.input[0]
        scale, zero = f"{node.output[0]}_scale", f"{node.output[0]}_zero"
        model.graph.initializer.extend([
            numpy_helper.from_array(np.float32(8 / 127), scale), numpy_helper.from_array(np.int8(0), zero)
        ])  # fmt: skip
        at = list(model.graph.node).index(node)
        model.graph.node.insert(at, helper.make_node("DequantizeLinear", [f"{scale}_q", scale, zero], [f"{scale}_d"]))
        model.graph.node.insert(at, helper.make_node("QuantizeLinear", [value, scale, zero], [f"{scale}_q"]))
        node.input[0] = f"{scale}_d"
    onnx.save(model, str(file))
    return file


def _replace_weights(model: onnx.ModelProto, quantise: Any) -> list[onnx.NodeProto]:
    """Weights of products become what `quantise` makes of them. The products."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    found = [
        node
        for node in model.graph.node
        if node.op_type == "MatMul" and len(getattr(weights.get(node.input[1]), "dims", ())) == 2
    ]
    for count, node in enumerate(found):
        made = quantise(f"quantised{count}", numpy_helper.to_array(weights[node.input[1]]))
        model.graph.node.insert(list(model.graph.node).index(node), made)
        node.input[1] = made.output[0]
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return found
