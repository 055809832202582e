"""fp32 or fp16 graph -> weights of matrix products in 8 or 4 bits, in blocks with one scale each: of 128 weights where
they have 8 bits, of 32 where they have 4.

Written as DequantizeLinear(block_size=…) in front of MatMul: standard ONNX, which OpenVINO and ONNX Runtime run as one
product on the integers and TensorRT builds. Decoding reads every weight for each token, so it is bytes that count.

Eight bits round to the nearest step. Four bits do so first, and where that misses the perplexity budget go on to GPTQ,
then to GPTQ with the head in eight bits. The head is quantised because it is read in full at every step; the lookup of
embeddings reads a few rows of its table, which stays as it is, also where the two are one tensor.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from builders.artifacts import Checkpoint, GenerationQuality, OnnxGraph
from builders.errors import ParityError, UnsupportedError
from builders.graph import INLINE_WEIGHT_BYTES, record_graph, require_standard
from builders.judging.perplexity import (
    ENCODER_FILE,
    Constants,
    DecoderSession,
    Ids,
    encode,
    graph_perplexity,
    require_perplexity,
    text_pairs,
    token_rows,
    within_budget,
)
from builders.quantize.blocks import BLOCK, HESSIAN_BYTES, Bits, Blocks, block_size, gptq, round_to_nearest
from builders.quantize.scales import Floats, Type

_MIN_QUANTISED = 0.5  # below this share of the product weights the graph is quantised in name only
_BEHIND_HEAD = ("Cast", "Identity", "Add", "Mul", "Div", "Tanh", "Clip", "Gather", "Reshape", "Squeeze")  # soft caps


@dataclass(frozen=True)
class WeightRecipe:
    """How the weights are rounded."""

    name: str
    bits: Bits
    head_bits: Bits
    gptq: bool = False
    longest_block: int = BLOCK


RECIPES: dict[str, tuple[WeightRecipe, ...]] = {
    "w8": (WeightRecipe("round to nearest", 8, 8, longest_block=128),),
    "w4": (
        WeightRecipe("round to nearest", 4, 4),
        WeightRecipe("GPTQ", 4, 4, gptq=True),
        WeightRecipe("GPTQ, head in 8 bits", 4, 8, gptq=True),
    ),
}


def quantize_weights(
    graph: OnnxGraph,
    reference: OnnxGraph,
    checkpoint: Checkpoint,
    precision: Literal["w8", "w4"],
    max_ratio: float,
    calibration_texts: Sequence[str],
    held_out_texts: Sequence[str],
    out: Path,
    progress: Callable[[str], None] = lambda message: None,
    ranks: int = 1,
) -> OnnxGraph:
    """Writes the decoder `graph` with quantised weights into `out`; `reference` is its fp32 form;
    `ranks` will share every product.

    The encoder of an encoder-decoder comes along in eight bits: it runs once a text, and is not bound by bytes.
    The first recipe whose perplexity on the held-out texts is within `max_ratio` of the reference is taken. Raises
    QualityError with the figures of all when none is; UnsupportedError when there is too little to quantise.
    """
    file = out / graph.file
    if checkpoint.task == "seq2seq":
        write_quantised(graph.path(ENCODER_FILE), RECIPES["w8"][0], {}, out / ENCODER_FILE)
        require_standard(out / ENCODER_FILE)
    progress("measuring the reference")
    expected, _ = graph_perplexity(reference.file_path, *_material(checkpoint, held_out_texts, reference.directory))
    rows, constants = _material(checkpoint, held_out_texts, out)
    compensated: dict[int, Blocks] = {}
    tried: dict[str, GenerationQuality] = {}
    for recipe in RECIPES[precision]:
        if recipe.gptq and not compensated:
            material = _material(checkpoint, calibration_texts, reference.directory)
            dtype = find_products(ir.load(graph.file_path))[0].dtype
            compensated = compensate(reference.file_path, *material, progress, dtype)
        progress(recipe.name)
        write_quantised(graph.file_path, recipe, compensated, file, ranks)
        require_standard(file)
        perplexity, executor = graph_perplexity(file, rows, constants)
        tried[recipe.name] = GenerationQuality(
            perplexity=perplexity, reference_perplexity=expected, tokens=rows[:, 1:].size, executor=executor
        )
        if within_budget(tried[recipe.name], max_ratio):
            break
    quality = require_perplexity(tried, max_ratio, f"{precision} graph of {checkpoint.source}")
    return record_graph(out, precision, quality, graph.digest, graph.file)


def _material(checkpoint: Checkpoint, texts: Sequence[str], folder: Path) -> tuple[Ids, Constants]:
    """Rows of tokens to predict, and what the encoder in `folder` makes of their sources, if there is one."""
    if checkpoint.task != "seq2seq":
        return token_rows(checkpoint, texts), {}
    source, lengths, target = text_pairs(checkpoint, texts)
    return target, encode(folder / ENCODER_FILE, source, lengths)


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
            better = recipe.gptq and bits == 4
            size = block_size(item.shape[0], recipe.longest_block, ranks)
            blocks = compensated[index] if better else round_to_nearest(item.array(), bits, size, item.dtype)
            done[key] = _insert(model.graph, item, blocks)
        item.node.replace_input_with(1, done[key])
    RemoveUnusedNodesPass()(model)
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    ir.save(model, target, external_data=f"{target.name}.data" if weights > INLINE_WEIGHT_BYTES else None)


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
    integers = blocks.values if blocks.bits == 8 else blocks.values.astype(ml_dtypes.int4)
    inputs = [
        _constant(graph, f"{name}_int{blocks.bits}", integers),
        _constant(graph, f"{name}_scale", blocks.scales.astype(item.dtype)),
    ]
    attributes = {"axis": 0, "block_size": blocks.size}
    node = ir.node("DequantizeLinear", inputs, attributes=attributes, name=f"{name}_dequantize")
    node.outputs[0].name = f"{name}_dequantized"
    graph.insert_before(item.node, [node])
    return node.outputs[0]


def _constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def compensate(
    source: Path,
    rows: Ids,
    constants: Constants | None = None,
    progress: Callable[[str], None] = lambda message: None,
    dtype: Type = np.float32,
) -> dict[int, Blocks]:
    """GPTQ at four bits for every product of a decoder graph, on what it reads while it predicts `rows`.

    `dtype` is that of the graph that gets the weights.
    """
    products = find_products(ir.load(source))
    done: dict[int, Blocks] = {}
    for share in _shares(products):
        hessians = _hessians(source, {products[index].input_name for index in share}, rows, constants)
        for index in share:
            progress(f"GPTQ {len(done) + 1} of {len(products)}")
            done[index] = gptq(products[index].array(), hessians[products[index].input_name], 4, dtype)
    return done


def _shares(products: Sequence[Product]) -> list[list[int]]:
    """Products that fit, in graph order, cut where the Hessians of one share would take too much memory."""
    shares: list[list[int]] = [[]]
    held: dict[str, int] = {}
    for index, item in enumerate(products):
        if not item.fits:
            continue
        if sum(held.values()) > HESSIAN_BYTES and item.input_name not in held:
            shares.append([])
            held = {}
        held[item.input_name] = 4 * item.shape[0] ** 2
        shares[-1].append(index)
    return shares


def _hessians(source: Path, names: Collection[str], rows: Ids, constants: Constants | None) -> dict[str, Floats]:
    """X^T X of the named activations over every token of `rows`, read token by token as the graph is served."""
    model = ir.load(source)
    values = {value.name: value for node in model.graph for value in node.outputs if value.name in names}
    model.graph.outputs.extend(values.values())
    found: dict[str, Floats] = {}
    with tempfile.TemporaryDirectory(prefix="trireme-calibration-") as folder:
        probe = Path(folder) / "probe.onnx"
        ir.save(model, probe, external_data="probe.onnx.data")
        session = DecoderSession(probe, len(rows), rows.shape[1], constants, list(map(str, values)))
        for at in range(rows.shape[1]):
            _, *read = session.step(np.ascontiguousarray(rows[:, at : at + 1]), np.ones(len(rows), np.int64))
            for name, array in zip(values, read, strict=True):
                tokens = array.reshape(-1, array.shape[-1]).astype(np.float32)
                product: Floats = tokens.T @ tokens
                found[str(name)] = found[str(name)] + product if name in found else product
    return found
