"""Which tensors are cut, found from the graph itself.

Every weight product that could be split by rows is a seed: its input is cut along the contracted dimension, and the
rules spread that cut to and fro until nothing changes. What the cut reaches is a region: it begins at weights split by
columns and ends in partial sums. A region is legal when every node that it touches has a rule for it. The attention
and the feed-forward part of a block come out as one region each, so each block closes with two all-reduces:

                by columns                    by rows
    stream ──► Wq Wk Wv ──Shard(heads)──► attention ──Shard(2)──► Wo ──Partial──► all-reduce ──► + ──► stream
    stream ──► W_up ──Shard(2)──► activation ──Shard(2)──► W_down ──Partial──► all-reduce ──► + ──► stream
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir

from builders.errors import InputError, UnsupportedError
from builders.partition.cut.tables import depth, weight_product, word_tables
from builders.partition.placement import (
    REPLICATE,
    Block,
    Partial,
    Placement,
    Replicate,
    Shard,
    even,
    local_shape,
)
from builders.partition.read import Source, shape_of
from builders.partition.rules.compute import head_counts
from builders.partition.rules.op import Assignment, Illegal, Op, out
from builders.partition.rules.shape import elements_of
from builders.partition.rules.table import rule_for
from builders.planning.plan import TABLE_SHARE

_OFF_STREAM_SHARE = 0.1  # of all weights: what a pair beside the residual stream (pooler, classifier) must hold
_LONGEST_SEARCH = 256  # ranks tried when an error names the sizes that would work


Embeddings = Literal["auto", "whole", "split"]


@dataclass(eq=False)
class Region:
    """Placements that hold together: all of them or none. What is not named is replicated."""

    placements: dict[ir.Value, Placement] = field(default_factory=dict)
    nodes: set[ir.Node] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)  # sizes that the ranks do not divide
    saved_bytes: int = 0  # of weights, per rank
    moved_bytes: int = 0  # per token and rank
    share_copies: bool = False

    @property
    def partials(self) -> list[ir.Value]:
        return [value for value, placement in self.placements.items() if isinstance(placement, Partial)]


@dataclass
class Solution:
    """`gathered` are graph outputs that ranks hold slices of and that leave the graph whole."""

    ranks: int
    placements: dict[ir.Value, Placement] = field(default_factory=dict)
    gathered: list[ir.Value] = field(default_factory=list)
    kept_whole: dict[str, str] = field(default_factory=dict)  # weight product -> why
    regions: int = 0

    def of(self, value: ir.Value) -> Placement:
        return self.placements.get(value, REPLICATE)


def solve(source: Source, ranks: int, embeddings: Embeddings = "auto") -> Solution:
    """The cheapest legal assignment for `ranks` in bytes moved against weight bytes saved.

    `embeddings`: the table of words whole on every rank, or split by rows at one all-reduce more; `auto` splits it when
    it is over a tenth of all weights, so large models stay at two all-reduces a block. Raises InputError where the
    ranks do not divide heads or widths, UnsupportedError where nothing can be split.
    """
    solution = Solution(ranks)
    if ranks == 1:
        return solution
    products = [node for node in source.graph if weight_product(source, node)]
    pairs, reasons = _row_regions(source, products, ranks)
    total = sum(_bytes(value) for value in source.graph.initializers.values())
    worth = [region for region in pairs if _pays(source, region, total)]
    _require_divisible(source, worth, ranks)
    for region in sorted(worth, key=lambda each: each.moved_bytes - each.saved_bytes):
        _accept(solution, region)
    beside = {node for region in pairs if region not in worth for node in region.nodes}
    reasons |= dict.fromkeys(map(_name, beside), "beside the residual stream: a collective costs more than it saves")
    for region in _column_regions(source, products, solution, reasons):
        _accept(solution, region)
    if not solution.regions:
        raise _nothing_to_split(source, products, reasons, ranks)
    if embeddings != "whole":
        for region in _table_regions(source, ranks, TABLE_SHARE * source.weight_bytes if embeddings == "auto" else 0):
            _accept(solution, region)
    cut = {node for node in products if (weight := node.inputs[1]) and isinstance(solution.of(weight), Shard)}
    for node in products:
        if node not in cut:
            shared = node.outputs[0] in solution.placements
            why = "ranks outnumber its heads" if shared else reasons.get(_name(node), "no row split follows it")
            solution.kept_whole[_name(node)] = why
    return solution


def _row_regions(source: Source, products: list[ir.Node], ranks: int) -> tuple[list[Region], dict[str, str]]:
    regions: list[Region] = []
    reasons: dict[str, str] = {}
    covered: set[ir.Node] = set()
    for node in products:
        if node in covered:
            continue
        activation = node.inputs[0]
        shape = shape_of(activation) if activation is not None else None
        if activation is None or shape is None or not isinstance(shape[-1], int):
            continue
        seed = even(len(shape) - 1, shape[-1], ranks)
        try:
            region = _spread_either(source, activation, seed, ranks)
        except Illegal as reason:
            reasons[_name(node)] = str(reason)
            continue
        if node in region.nodes and any(_weight_columns(source, region, other) for other in region.nodes):
            regions.append(region)
            covered |= region.nodes
    return regions, reasons


def _column_regions(
    source: Source, products: list[ir.Node], solution: Solution, reasons: dict[str, str]
) -> list[Region]:
    """Output heads: columns only, closed by one all-gather, or by none where each rank keeps its own heads."""
    found = []
    for node in products:
        weight, result = node.inputs[1], node.outputs[0]
        shape = shape_of(result)
        if (
            weight in solution.placements
            or result in solution.placements
            or shape is None
            or not isinstance(shape[-1], int)
        ):
            continue
        try:
            region = _spread(source, result, even(len(shape) - 1, shape[-1], solution.ranks), solution.ranks)
        except Illegal:
            continue
        ends = [
            value
            for value in region.placements
            if value.is_graph_output() and isinstance(region.placements[value], Shard)
        ]
        if region.partials or not ends:
            continue
        if region.faults and not _one_wide_cut(region, Block(shape[-1], solution.ranks)):
            reasons[_name(node)] = f"{solution.ranks} ranks do not divide {region.faults[0]}"
        elif any(needs_gather(value, region.placements[value]) for value in ends) and shape[-1] <= depth(node):
            reasons[_name(node)] = "an output that is no wider than its input: a collective costs more than it saves"
        else:
            found.append(region)
    return found


def _table_regions(source: Source, ranks: int, least_bytes: float) -> list[Region]:
    """Lookups of words: rows shared out, closed by one all-reduce each."""
    found = []
    for table, rows in word_tables(source, least_bytes):
        try:
            region = _spread(source, table, even(0, rows, ranks), ranks)
        except Illegal:
            continue
        if not region.faults or _one_wide_cut(region, Block(rows, ranks)):
            found.append(region)
    return found


def _one_wide_cut(region: Region, block: Block) -> bool:
    """Whether all that is cut is the one vocabulary: it may be filled up with zeros, which the gather drops again."""
    cuts = [placement for placement in region.placements.values() if isinstance(placement, Shard)]
    return all(cut.blocks == (block,) for cut in cuts)


def needs_gather(output: ir.Value, placement: Placement) -> bool:
    """Features and logits leave the graph whole. Heads of a cache [batch, heads, length, d] stay with their rank."""
    shape = shape_of(output)
    return isinstance(placement, Shard) and shape is not None and not (len(shape) >= 4 and placement.dim == 1)


def _spread_either(source: Source, seed: ir.Value, placement: Shard, ranks: int) -> Region:
    """With repeated heads shared out if that is legal; else without, so that an odd head count is named as one."""
    try:
        return _spread(source, seed, placement, ranks, share_copies=True)
    except Illegal:
        return _spread(source, seed, placement, ranks)


def _spread(source: Source, seed: ir.Value, placement: Shard, ranks: int, *, share_copies: bool = False) -> Region:
    """Everything that follows from cutting `seed`. Raises Illegal."""
    region = Region(share_copies=share_copies)
    queue: deque[ir.Node] = deque()
    waiting: dict[ir.Node, None] = {}
    settled: set[ir.Node] = set()
    _place(source, region, seed, placement, queue)
    while queue or waiting:
        if not queue:  # parts of a fused dimension that nothing cuts are whole on every rank
            node = next(iter(waiting))
            for value in node.outputs if node.op_type == "Split" else node.inputs:
                if value is not None and value not in region.placements:
                    region.placements[value] = REPLICATE
            del waiting[node]
            queue.append(node)
            settled.add(node)
        node = queue.popleft()
        assignment = _apply(source, region, node, ranks)
        if assignment is None and node in settled:
            raise Illegal(f"{node.op_type} {node.name} is cut in a way that its rule cannot follow")
        if assignment is None:
            waiting[node] = None
            continue
        waiting.pop(node, None)
        for slot, placed in assignment.items():
            value = node.outputs[-1 - slot] if slot < 0 else node.inputs[slot]
            if value is not None:
                _place(source, region, value, placed, queue)
    _measure(source, region, ranks)
    return region


def _apply(source: Source, region: Region, node: ir.Node, ranks: int) -> Assignment | None:
    """What the node's rule makes of the slots that are cut so far."""
    op = _op(source, region, node, ranks)
    cut = [(slot, placed) for slot, placed in op.known.items() if isinstance(placed, Shard)]
    if not cut:
        return {}
    rule = rule_for(node.op_type)
    if rule is None:
        raise Illegal(f"operator {node.op_type} has no rule")
    region.nodes.add(node)
    for slot, placed in cut:
        found = rule(op, slot, placed)
        if found is not None:
            return found
    return None


def _op(source: Source, region: Region, node: ir.Node, ranks: int) -> Op:
    slots = [*range(len(node.inputs)), *(out(index) for index in range(len(node.outputs)))]
    op = Op(node, ranks, {}, frozenset(i for i, value in enumerate(node.inputs) if value in source.constant))
    found = {slot: value for slot in slots if (value := op.value(slot)) is not None}
    known = {slot: region.placements[value] for slot, value in found.items() if value in region.placements}
    return Op(node, ranks, known, op.constant, region.share_copies)


def _place(source: Source, region: Region, value: ir.Value, placement: Placement, queue: deque[ir.Node]) -> None:
    before = region.placements.get(value)
    if before == placement or {type(before), type(placement)} == {Partial, Replicate}:
        if isinstance(placement, Partial):
            region.placements[value] = placement
        return
    if before is not None:
        raise Illegal(f"{value.name} would be cut in two ways")
    if isinstance(placement, Shard) and value.is_graph_input() and value.dtype not in _CACHE_TYPES:
        raise Illegal(f"input {value.name} would be cut")
    if (
        isinstance(placement, Shard)
        and placement.copies is not None
        and (value in source.constant or value.is_graph_input() or value.is_graph_output())
    ):
        raise Illegal(f"{value.name} would be cut along two dimensions")
    if value.is_graph_output() and needs_gather(value, placement) and not _in_order(placement):
        raise Illegal(f"output {value.name} would be gathered in another order")
    region.placements[value] = placement
    producer = value.producer()
    queue.extend(node for node in (producer, *value.consumers()) if node is not None and node not in queue)


def _in_order(placement: Placement) -> bool:
    """Whether the slices of ranks 0, 1, … one behind the other are the whole."""
    return isinstance(placement, Shard) and len(placement.blocks) == 1


_CACHE_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def _measure(source: Source, region: Region, ranks: int) -> None:
    for value, placement in region.placements.items():
        if isinstance(placement, Shard):
            shape = shape_of(value) or ()
            region.faults += [_fault(value, block) for block in placement.blocks if not block.divides]
            copied = shape[placement.copies.dim] if placement.copies is not None else 0
            if placement.copies is not None and (not isinstance(copied, int) or copied % placement.copies.parts):
                region.faults.append(f"{copied} copies of heads at {value.name}")
            if value in source.origin and not region.faults:
                elements = elements_of(shape)
                region.saved_bytes += (
                    _bytes(value) * (elements - elements_of(tuple(local_shape(shape, placement)))) // elements
                )
        elif isinstance(placement, Partial):
            region.moved_bytes += 2 * (ranks - 1) * token_bytes(value) // ranks
    for node in region.nodes:
        op = _op(source, region, node, ranks)
        region.faults += [f"{heads} heads at {op.name}" for heads, parts in head_counts(op) if heads % parts]


def _fault(value: ir.Value, block: Block) -> str:
    shape = shape_of(value) or ()
    if len(shape) == 4:
        return f"{block.size} heads at {value.name}"
    return f"{block.size} features at {value.name}"


def token_bytes(value: ir.Value) -> int:
    """Bytes of the tensor per token: dynamic dimensions count once."""
    width = value.dtype.itemsize if value.dtype is not None else 4
    return int(elements_of(shape_of(value) or ()) * width)


def _bytes(value: ir.Value) -> int:
    return value.const_value.nbytes if value.const_value is not None else 0


def _name(node: ir.Node) -> str:
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    return f"{node.op_type} {node.outputs[0].name} (weight {weight.name if weight is not None else '-'})"


def _weight_columns(source: Source, region: Region, node: ir.Node) -> bool:
    """Whether the region splits this product's weight by columns."""
    return weight_product(source, node) and isinstance(region.placements.get(node.outputs[0]), Shard)


def _pays(source: Source, region: Region, total_bytes: int) -> bool:
    """Parts of blocks always do. A pooler or classifier runs once a sequence, and must hold much of the model."""
    return _on_residual_stream(source, region) or region.saved_bytes > _OFF_STREAM_SHARE * total_bytes


def _on_residual_stream(source: Source, region: Region) -> bool:
    """Whether what the region computes is added to a tensor that went past it."""
    reached: set[ir.Value] = set(region.partials)
    queue = deque(reached)
    while queue:
        for node in queue.popleft().consumers():
            others = [value for value in node.inputs if value is not None and value not in reached]
            if node.op_type in ("Add", "Sum") and any(value not in source.constant for value in others):
                return True
            for value in node.outputs:
                if value not in reached:
                    reached.add(value)
                    queue.append(value)
    return False


def _accept(solution: Solution, region: Region) -> None:
    """Takes the region, unless it places a tensor in another way than one taken before."""
    for value, placement in region.placements.items():
        before = solution.placements.get(value, placement)
        if before != placement and {type(before), type(placement)} != {Partial, Replicate}:
            return
    for value, placement in region.placements.items():
        if not isinstance(solution.placements.get(value), Partial):
            solution.placements[value] = placement
        if value.is_graph_output() and needs_gather(value, placement) and value not in solution.gathered:
            solution.gathered.append(value)
    solution.regions += 1


def _require_divisible(source: Source, pairs: list[Region], ranks: int) -> None:
    faults = list(dict.fromkeys(fault for region in pairs for fault in region.faults))
    if not faults:
        return
    products = [node for node in source.graph if weight_product(source, node)]
    works = [1]
    for tried in range(2, _LONGEST_SEARCH + 1):
        regions, _ = _row_regions(source, products[:8], tried) if tried != ranks else (pairs, {})
        if regions and not any(region.faults for region in regions):
            works.append(tried)
    heads = [fault for fault in faults if "heads" in fault] or faults
    heads = list({fault.split(" at ")[0]: fault for fault in reversed(heads)}.values())[::-1]  # one of each size
    raise InputError(
        f"tensor={ranks} for {source.file.name}",
        got=f"sizes that {ranks} does not divide: {'; '.join(heads[:4])}",
        expected="ranks that divide the heads and the feed-forward width",
        fix=f"use tensor={', '.join(map(str, works[:-1])) + ' or ' if len(works) > 1 else ''}{works[-1]}",
    )


def _nothing_to_split(source: Source, products: list[ir.Node], reasons: dict[str, str], ranks: int) -> UnsupportedError:
    why = f"; {len(products)} weight products, the first: {next(iter(reasons.values()), 'none')}" if products else ""
    return UnsupportedError(
        f"tensor={ranks} for {source.file.name}",
        got=f"nothing to split between ranks{why}",
        expected="a transformer: weight products whose columns and then rows can be shared out",
        fix="use tensor=1",
    )
