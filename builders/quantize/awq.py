"""AWQ: inputs of products scaled channel by channel before their weights are rounded, where that costs no operator.

A channel of large inputs makes the error of its weights large. Its weights are multiplied by a factor, so that they
fall on finer steps of their block, and the input is divided by it. The division goes into what makes the input, where
that is exact: the scale (and bias) of a norm that nothing else reads; the columns of the product that is multiplied
with a gate; those of the values that attention mixes. So the graph stays what it is, node for node. Behind a norm that
a residual sum reads too, as in BERT, and behind an activation, there is no such place.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2023: factors are
magnitude^alpha, and alpha is searched by the error of the products on calibration inputs. Here the magnitude is the
root mean square, and the error that of all rows at once, by their Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from builders.errors import ParityError
from builders.graph import add_constant, write_model
from builders.quantize.blocks import block_size, round_to_nearest
from builders.quantize.products import Hessians, Product, WeightRecipe, find_products, shares
from builders.quantize.scales import FACTORS, Floats, Type

ALPHAS = np.linspace(0.0, 1.0, 11)
_NORMS = ("RMSNormalization", "LayerNormalization")
_MOVES = ("GatherElements", "Cast", "Identity", "Reshape")  # of rows, where channels stay in their places


@dataclass(frozen=True)
class Fold:
    """A place for factors. `readers` are products, by their place in the graph, that read one input and nothing else
    reads it. Its channels come from a `norm`, or from the columns of the product `maker`, `heads` at a time: (heads of
    the maker, how many of the input's each of these makes, channels of a head)."""

    readers: tuple[int, ...]
    norm: ir.Node | None = None
    maker: int | None = None
    heads: tuple[int, int, int] | None = None

    def spread(self, factors: Floats) -> Floats:
        """Those of the source's channels, for each channel of the input."""
        if self.heads is None:
            return factors
        own, each, size = self.heads
        return factors.reshape(own, 1, size).repeat(each, axis=1).reshape(-1)

    def gathered(self, values: Floats) -> Floats:
        """The mean of the input's channels that one channel of the source makes."""
        if self.heads is None:
            return values
        own, each, size = self.heads
        mean: Floats = values.reshape(own, each, size).mean(axis=1).reshape(-1)
        return mean


def find_folds(model: ir.Model, products: Sequence[Product]) -> list[Fold]:
    """In graph order."""
    readers: dict[str, list[int]] = {}
    for index, item in enumerate(products):
        readers.setdefault(item.input_name, []).append(index)
    place = {item.node: index for index, item in enumerate(products) if not item.transposed}
    outputs = set(model.graph.outputs)
    found = []
    for group in readers.values():
        if all(products[index].fits for index in group) and _own(products, group):
            value = products[group[0]].node.inputs[0]
            if value is not None and value not in outputs and _is_read_by(value, [products[i].node for i in group]):
                found.append(_source(value, tuple(group), place, outputs))
    return [fold for fold in found if fold is not None]


def _own(products: Sequence[Product], group: Sequence[int]) -> bool:
    """A transposed table is scaled as a copy, so whatever transposes it must do so for these products alone."""
    for index in group:
        weight = products[index].node.inputs[1]
        if products[index].transposed and weight is not None and len(weight.uses()) > 1:
            return False
    return True


def _is_read_by(value: ir.Value, nodes: Sequence[ir.Node]) -> bool:
    return {use.node for use in value.uses()} == set(nodes)


def _source(
    value: ir.Value, group: tuple[int, ...], place: Mapping[ir.Node, int], outputs: set[ir.Value]
) -> Fold | None:  # fmt: skip
    node = value.producer()
    while node is not None and node.op_type in _MOVES and _by_rows(node) and node.inputs[0] is not None:
        value = node.inputs[0]
        if value in outputs or len(value.uses()) > 1:
            return None
        node = value.producer()
    if node is None:
        return None
    if node.op_type in _NORMS:
        plain = all(given is None or given.const_value is not None for given in node.inputs[1:])
        return Fold(group, norm=node) if plain else None
    if node.op_type == "Mul":
        makers = [index for given in node.inputs if (index := _maker(given, node, place, outputs)) is not None]
        return Fold(group, maker=makers[-1]) if makers and node.inputs[0] is not node.inputs[1] else None
    return _of_values(node, group, place, outputs) if node.op_type == "Reshape" else None


def _by_rows(node: ir.Node) -> bool:
    if node.op_type == "GatherElements":
        axis = node.attributes.get("axis")
        return axis is not None and axis.as_int() == 1
    before, after = node.inputs[0], node.outputs[0]
    if before is None or before.shape is None or after.shape is None:
        return node.op_type != "Reshape"
    return before.shape[-1] == after.shape[-1] and isinstance(after.shape[-1], int)


def _maker(
    value: ir.Value | None, reader: ir.Node, place: Mapping[ir.Node, int], outputs: set[ir.Value]
) -> int | None:  # fmt: skip
    """The product that `value` comes from, with or without a constant bias, and that `reader` alone reads."""
    if value is None or value in outputs or not _is_read_by(value, [reader]):
        return None
    node = value.producer()
    if node is not None and node.op_type == "Add" and (sides := _biased(node)) is not None:
        value = sides[0]
        if value in outputs or not _is_read_by(value, [node]):
            return None
        node = value.producer()
    return None if node is None else place.get(node)


def _biased(node: ir.Node) -> tuple[ir.Value, int] | None:
    """(what is not constant, which of the inputs is) of a sum with a constant vector."""
    for index in (0, 1):
        bias, other = node.inputs[index], node.inputs[1 - index]
        if bias is not None and other is not None and bias.is_initializer() and bias.shape is not None:
            return (other, index) if len(bias.shape) == 1 and not other.is_initializer() else None
    return None


def _of_values(
    node: ir.Node, group: tuple[int, ...], place: Mapping[ir.Node, int], outputs: set[ir.Value]
) -> Fold | None:  # fmt: skip
    """Attention mixes values, each channel by itself: [batch, heads, length, size] -> Transpose -> Reshape."""
    back = _only(node.inputs[0], node, "Transpose", outputs)
    mixed = _only(back.inputs[0], back, "Attention", outputs) if back is not None else None
    if back is None or mixed is None or len(mixed.inputs) < 3 or mixed.inputs[2] is None:
        return None
    values, reader = mixed.inputs[2], mixed
    scatter = values.producer()
    if scatter is not None and scatter.op_type == "TensorScatter":  # a cache: what it holds is scaled too
        if not _is_read_by(values, [mixed]) or scatter.inputs[1] is None:
            return None
        values, reader = scatter.inputs[1], scatter
    shape = values.shape
    turned = _only(values, reader, "Transpose", outputs)
    shaped = _only(turned.inputs[0], turned, "Reshape", outputs) if turned is not None else None
    maker = None if shaped is None else _maker(shaped.inputs[0], shaped, place, outputs)
    if maker is None or shape is None or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        return None
    own, size = shape[1], shape[3]
    whole = back.outputs[0].shape
    heads = whole[2] if whole is not None else None
    if not isinstance(heads, int) or heads % own:
        return None
    return Fold(group, maker=maker, heads=(own, heads // own, size))


def _only(value: ir.Value | None, reader: ir.Node, kind: str, outputs: set[ir.Value]) -> ir.Node | None:
    """The node of this kind that makes `value` for `reader` alone."""
    if value is None or value in outputs or not _is_read_by(value, [reader]):
        return None
    node = value.producer()
    return node if node is not None and node.op_type == kind else None


def search(
    source: Path,
    hessians_of: Hessians,
    recipe: WeightRecipe,
    dtype: Type = np.float32,
    ranks: int = 1,
    progress: Callable[[str], None] = lambda message: None,
) -> list[Floats | None]:
    """Factors for each fold of `source`, in their order; None where the weights are best as they are."""
    model = ir.load(source)
    products = find_products(model)
    folds = find_folds(model, products)
    found: dict[int, Floats | None] = {}
    for share in shares(products):
        inside = [number for number, fold in enumerate(folds) if fold.readers[0] in share]
        hessians = hessians_of(source, {products[folds[number].readers[0]].input_name for number in inside})
        for number in inside:
            progress(f"AWQ {len(found) + 1} of {len(folds)}")
            fold = folds[number]
            weights = [products[index].array() for index in fold.readers]
            size = block_size(len(weights[0]), recipe.longest_block, ranks)
            hessian = hessians[products[fold.readers[0]].input_name]

            def rounded(weight: Floats, size: int = size) -> Floats:
                return round_to_nearest(weight, recipe.bits, size, dtype, recipe.form).restore()

            found[number] = best_factors(fold, weights, hessian, rounded)
    return [found[number] for number in range(len(folds))]


def best_factors(
    fold: Fold, weights: Sequence[Floats], hessian: Floats, rounded: Callable[[Floats], Floats]
) -> Floats | None:
    """Of the source's channels. `weights` [K, N] read inputs whose X^T X is `hessian` [K, K], and become `rounded`."""
    magnitude = np.sqrt(fold.gathered(np.maximum(np.diag(hessian), 0.0)))
    best, least = None, np.inf
    for alpha in ALPHAS:
        factors = _balanced(magnitude, float(alpha))
        error = sum(_error(weight, fold.spread(factors), hessian, rounded) for weight in weights)
        if error < least:
            best, least = (factors if alpha else None), error
    return best


def _balanced(magnitude: Floats, alpha: float) -> Floats:
    """The largest and the smallest as far from 1. Channels that are always 0 count as the smallest that is not."""
    real = magnitude[magnitude > 0]
    if not len(real):
        return np.ones_like(magnitude)
    factors = np.maximum(magnitude, real.min()) ** alpha
    balanced: Floats = np.clip(factors / np.sqrt(factors.max() * factors.min()), *FACTORS).astype(np.float32)
    return balanced


def _error(weight: Floats, factors: Floats, hessian: Floats, rounded: Callable[[Floats], Floats]) -> float:
    """|| X (W' - W) ||^2 with W' as it is after rounding, over all rows X."""
    off = rounded(weight * factors[:, None]) / factors[:, None] - weight
    return float(np.einsum("kn,kn->", off, hessian @ off))


def write_folded(source: Path, factors: Sequence[Floats | None], target: Path) -> None:
    """Saves `source` with the factors of each of its folds: other numbers in the same nodes."""
    model = ir.load(source)
    products = find_products(model)
    rows: dict[int, Floats] = {}
    columns: dict[int, Floats] = {}
    folds = find_folds(model, products)
    if len(folds) != len(factors):
        raise ParityError(f"{source}: {len(folds)} places for factors, and {len(factors)} were searched")
    for fold, found in zip(folds, factors, strict=True):
        if found is None:
            continue
        rows |= dict.fromkeys(fold.readers, fold.spread(found))
        if fold.maker is not None:
            columns[fold.maker] = found
        elif fold.norm is not None:
            for index in (1, 2):
                if index < len(fold.norm.inputs):
                    _divided(model.graph, fold.norm, index, found)
    for index in sorted({*rows, *columns}):
        _scaled(model.graph, products[index], rows.get(index), columns.get(index))
    for value in [each for each in model.graph.initializers.values() if not each.uses()]:
        del model.graph.initializers[str(value.name)]
    write_model(model, target)


def _divided(graph: ir.Graph, node: ir.Node, index: int, factors: Floats) -> None:
    """A constant vector of `node`; others may read the same one."""
    value = node.inputs[index]
    if value is None:
        return
    assert value.const_value is not None
    array = value.const_value.numpy()
    name = f"{node.outputs[0].name}_{value.name}_divided"
    node.replace_input_with(index, add_constant(graph, name, (array / factors).astype(array.dtype)))


def _scaled(graph: ir.Graph, item: Product, rows: Floats | None, columns: Floats | None) -> None:
    weight = item.array()
    weight = weight if rows is None else weight * rows[:, None]
    weight = weight if columns is None else weight / columns
    array = (weight.T if item.transposed else weight).astype(item.dtype)
    made = add_constant(graph, f"{item.node.outputs[0].name}_{item.weight.name}_scaled", np.ascontiguousarray(array))
    turned = item.node.inputs[1].producer() if item.node.inputs[1] is not None else None
    if item.transposed and turned is not None:
        turned.replace_input_with(0, made)
    else:
        item.node.replace_input_with(1, made)
    if columns is None:
        return
    (reader,) = {use.node for use in item.node.outputs[0].uses()}
    if reader.op_type == "Add" and (sides := _biased(reader)) is not None:
        _divided(graph, reader, sides[1], columns)
