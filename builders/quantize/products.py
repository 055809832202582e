"""The products of a graph with constant weights, and the same graph with these in blocks of 8 or 4 bits.

Written as DequantizeLinear(block_size=…) in front of MatMul: standard ONNX, which OpenVINO and ONNX Runtime run as one
product on the integers and TensorRT builds. The lookup of embeddings reads a few rows of its table, which stays as it
is, also where table and head are one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from builders.errors import ParityError, UnsupportedError
from builders.graph import add_constant, write_model
from builders.quantize.blocks import (
    BLOCK,
    HESSIAN_BYTES,
    SYMMETRIC,
    Bits,
    BlockForm,
    Blocks,
    block_size,
    gptq,
    round_to_nearest,
)
from builders.quantize.scales import Floats, Type

_MIN_QUANTISED = 0.5  # below this share of the product weights the graph is quantised in name only
_BEHIND_HEAD = ("Cast", "Identity", "Add", "Mul", "Div", "Tanh", "Clip", "Gather", "Reshape", "Squeeze")  # soft caps

Hessians = Callable[[Path, Collection[str]], dict[str, Floats]]  # of a graph's named activations: X^T X [K, K]


@dataclass(frozen=True)
class WeightRecipe:
    """How the weights are rounded. `awq`: in a graph whose inputs were scaled first; see `awq.py`."""

    name: str
    bits: Bits
    head_bits: Bits
    gptq: bool = False
    longest_block: int = BLOCK
    awq: bool = False
    form: BlockForm = SYMMETRIC


@dataclass(frozen=True)
class Product:
    """A MatMul with a constant weight [K, N], or with the transpose of one, as a head tied to the embedding has."""

    node: ir.Node
    weight: ir.Value
    transposed: bool
    is_head: bool

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def shape(self) -> tuple[int, int]:
        assert self.weight.const_value is not None
        rows, columns = (int(size) for size in self.weight.const_value.shape.numpy())
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def fits(self) -> bool:
        return self.shape[0] % BLOCK == 0

    @property
    def input_name(self) -> str:
        return str(self.node.inputs[0].name) if self.node.inputs[0] is not None else ""

    @property
    def dtype(self) -> np.dtype[Any]:
        assert self.weight.const_value is not None
        return self.weight.const_value.dtype.numpy()

    def array(self) -> Floats:
        assert self.weight.const_value is not None
        array: Floats = self.weight.const_value.numpy().astype(np.float32)
        return array.T if self.transposed else array


def find_products(model: ir.Model) -> list[Product]:
    """In graph order, which the fp32 and the fp16 export of one model share."""
    head = _head(model)
    found = []
    for node in model.graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        producer = weight.producer() if weight is not None else None
        transposed = producer is not None and producer.op_type == "Transpose"
        if transposed and producer is not None:
            weight = producer.inputs[0]
        if weight is None or not weight.is_initializer() or weight.shape is None or len(weight.shape) != 2:
            continue
        found.append(Product(node, weight, transposed, node is head))
    return found


def _head(model: ir.Model) -> ir.Node | None:
    """The product that the first output, the logits, comes from by way of operators on single elements."""
    node = model.graph.outputs[0].producer()
    while node is not None and node.op_type != "MatMul":
        node = node.inputs[0].producer() if node.op_type in _BEHIND_HEAD and node.inputs[0] is not None else None
    return node


def write_quantised(
    source: Path, recipe: WeightRecipe, compensated: Mapping[int, Blocks], target: Path, ranks: int = 1
) -> None:
    """Saves `source` with the weights of its products rounded; `compensated` are GPTQ's, by place in the graph.

    Raises UnsupportedError when most cannot be cut into blocks, ParityError when GPTQ's are of another graph.
    """
    model = ir.load(source)
    products = find_products(model)
    _require_most(products, source)
    if recipe.gptq and len(compensated) != sum(item.fits for item in products):
        raise ParityError(f"{source}: {len(products)} products, but GPTQ has the weights of {len(compensated)}")
    done: dict[tuple[str, bool], ir.Value] = {}
    for index, item in enumerate(products):
        if not item.fits:
            continue
        key = (str(item.weight.name), item.transposed)
        if key not in done:
            bits = recipe.head_bits if item.is_head else recipe.bits
            better = recipe.gptq and bits == recipe.bits
            size = block_size(item.shape[0], recipe.longest_block, ranks)
            blocks = (
                compensated[index] if better else round_to_nearest(item.array(), bits, size, item.dtype, recipe.form)
            )
            done[key] = _insert(model.graph, item, blocks)
        item.node.replace_input_with(1, done[key])
    RemoveUnusedNodesPass()(model)
    write_model(model, target)


def _require_most(products: Sequence[Product], source: Path) -> None:
    total = sum(item.size for item in products)
    fit = sum(item.size for item in products if item.fits)
    if fit < _MIN_QUANTISED * total or not total:
        raise UnsupportedError(
            f"graph {source.name}", got=f"{fit} of {total} weights of products in blocks of {BLOCK}",
            expected="at least half", fix=f"use fp16, or a model whose sizes are multiples of {BLOCK}",
        )  # fmt: skip


def _insert(graph: ir.Graph, item: Product, blocks: Blocks) -> ir.Value:
    """Integers and scales -> DequantizeLinear, as the new weight."""
    import ml_dtypes

    assert item.weight.const_value is not None
    name = f"{item.weight.name}{'_transposed' if item.transposed else ''}"
    small = ml_dtypes.int4 if blocks.zeros is None else ml_dtypes.uint4
    integers = blocks.values if blocks.bits == 8 else blocks.values.astype(small)
    inputs = [
        add_constant(graph, f"{name}_int{blocks.bits}", integers),
        add_constant(graph, f"{name}_scale", blocks.scales.astype(item.dtype)),
    ]
    if blocks.zeros is not None:
        inputs.append(add_constant(graph, f"{name}_zero", blocks.zeros.astype(integers.dtype)))
    attributes = {"axis": 0, "block_size": blocks.size}
    node = ir.node("DequantizeLinear", inputs, attributes=attributes, name=f"{name}_dequantize")
    node.outputs[0].name = f"{name}_dequantized"
    graph.insert_before(item.node, [node])
    return node.outputs[0]


def compensate(
    source: Path,
    hessians_of: Hessians,
    recipe: WeightRecipe,
    progress: Callable[[str], None] = lambda message: None,
    dtype: Type = np.float32,
    ranks: int = 1,
) -> dict[int, Blocks]:
    """GPTQ for every product of a graph, on what it reads. `dtype` is that of the graph that gets the weights."""
    products = find_products(ir.load(source))
    done: dict[int, Blocks] = {}
    for share in shares(products):
        hessians = hessians_of(source, {products[index].input_name for index in share})
        for index in share:
            progress(f"GPTQ {len(done) + 1} of {len(products)}")
            item = products[index]
            size = block_size(item.shape[0], recipe.longest_block, ranks)
            done[index] = gptq(item.array(), hessians[item.input_name], recipe.bits, dtype, size, recipe.form)
    return done


def shares(products: Sequence[Product]) -> list[list[int]]:
    """Products that fit, in graph order, cut where the Hessians of one share would take too much memory."""
    found: list[list[int]] = [[]]
    held: dict[str, int] = {}
    for index, item in enumerate(products):
        if not item.fits:
            continue
        if sum(held.values()) > HESSIAN_BYTES and item.input_name not in held:
            found.append([])
            held = {}
        held[item.input_name] = 4 * item.shape[0] ** 2
        found[-1].append(index)
    return found
