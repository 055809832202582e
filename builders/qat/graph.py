"""The numbers of a quantised graph, and the same graph with others. Nodes, names, shapes and types stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from builders.errors import ParityError
from builders.graph import write_model
from builders.quantize.scales import Floats

Array = NDArray[Any]


@dataclass(frozen=True)
class Int8Product:
    """A MatMul whose operands are both in INT8, by the names of its constants.

    Its input [..., K] is multiplied by `inverse` [K], then rounded to steps of `activation_scale`, which all that read
    the same input share. Its weight [K, N] is `integers * scales`, with what makes good for `inverse` in it.
    """

    names: tuple[str, str, str]  # of integers, scales and activation_scale
    integers: NDArray[np.int8]
    scales: Floats
    activation_scale: float
    inverse: Floats

    @property
    def weight(self) -> Floats:
        """Of the model before, but for the rounding."""
        restored: Floats = self.integers * self.scales * self.inverse[:, None]
        return restored


@dataclass(frozen=True)
class BlockProduct:
    """A MatMul whose weight [K, N] alone is in integers of `bits`: `integers`, times `scales` [K / block, N]."""

    names: tuple[str, str]  # of integers and scales
    integers: NDArray[np.int8]
    scales: Floats
    bits: int

    @property
    def each_scale(self) -> Floats:
        """[K, N]"""
        return self.scales.repeat(len(self.integers) // len(self.scales), axis=0)

    @property
    def weight(self) -> Floats:
        """Of the model before, but for the rounding."""
        restored: Floats = self.integers * self.each_scale
        return restored


@dataclass(frozen=True)
class PlainProduct:
    """A MatMul with a constant weight [K, N] that stayed in floating point."""

    name: str
    weight: Floats


Product = Int8Product | BlockProduct | PlainProduct


@dataclass(frozen=True)
class RoundedGraph:
    """`constants` are names and shapes of all; `dtype` is that of scales, and of all that is in floating point."""

    products: tuple[Product, ...]
    constants: Mapping[str, tuple[int, ...]]
    dtype: np.dtype[Any]


def read_graph(file: Path) -> RoundedGraph:
    """Of `quantize`. Raises ParityError for a graph without a product in integers."""
    model = ir.load(file)
    products = [found for node in model.graph if node.op_type == "MatMul" and (found := _product(node)) is not None]
    constants = {
        str(name): tuple(int(size) for size in value.const_value.shape.numpy())
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }
    first = next((item for item in products if not isinstance(item, PlainProduct)), None)
    if first is None:
        raise ParityError(f"{file.name} holds no product in integers: there is nothing to train")
    scale = model.graph.initializers[first.names[1]].const_value
    assert scale is not None
    return RoundedGraph(tuple(products), constants, scale.numpy().dtype)


def _product(node: ir.Node) -> Product | None:
    weight = node.inputs[1]
    if weight is None:
        return None
    if weight.is_initializer():
        array = _array(weight)
        return PlainProduct(str(weight.name), array.astype(np.float32)) if array.ndim == 2 else None
    restoring = weight.producer()
    if restoring is None or restoring.op_type != "DequantizeLinear":
        return None  # a product of two activations
    if "block_size" in restoring.attributes:
        return _block_product(restoring)
    reading = _from(node.inputs[0])
    rounding = _from(reading.inputs[0])
    smoothing = _from(rounding.inputs[0])
    named = (restoring.inputs[0], restoring.inputs[1], reading.inputs[1])
    integers, scales, activation = (_array(value) for value in named)
    return Int8Product(
        (_name(named[0]), _name(named[1]), _name(named[2])),
        integers,
        scales.astype(np.float32),
        float(activation),
        _array(smoothing.inputs[1]).astype(np.float32),
    )


def _block_product(restoring: ir.Node) -> BlockProduct:
    values, scales = restoring.inputs[0], restoring.inputs[1]
    integers = _array(values)
    bits = 4 if integers.dtype.name == "int4" else 8
    return BlockProduct(
        (_name(values), _name(scales)), integers.astype(np.int8), _array(scales).astype(np.float32), bits
    )


def _from(value: ir.Value | None) -> ir.Node:
    producer = None if value is None else value.producer()
    assert producer is not None  # as quantize.int8 writes it: Mul, QuantizeLinear, DequantizeLinear
    return producer


def _name(value: ir.Value | None) -> str:
    assert value is not None
    return str(value.name)


def _array(value: ir.Value | None) -> Array:
    assert value is not None
    assert value.const_value is not None
    array: Array = value.const_value.numpy()
    return array


def replace_constants(source: Path, arrays: Mapping[str, Array], target: Path) -> None:
    """Saves `source` with these constants, in the types that they have there. Raises ParityError for one that is not
    there, or has another shape."""
    model = ir.load(source)
    for name, array in arrays.items():
        value = model.graph.initializers.get(name)
        if value is None or value.const_value is None or tuple(value.const_value.shape.numpy()) != array.shape:
            raise ParityError(f"{source.name} has no constant {name} of shape {list(array.shape)}: it is not replaced")
        value.const_value = ir.tensor(array.astype(value.const_value.dtype.numpy()), name=name)
    write_model(model, target)
