"""Rules of operators that move elements and compute nothing."""

from __future__ import annotations

import math
from dataclasses import replace

from builders.partition.placement import PARTIAL, REPLICATE, Block, Copies, Placement, Replicate, Shard, scaled
from builders.partition.read import constant_array
from builders.partition.rules.op import OUT, Assignment, Op, Rule, out

_END = 1 << 31  # exporters write "to the end" as INT64_MAX or INT32_MAX


def transpose(op: Op, slot: int, shard: Shard) -> Assignment | None:
    rank = len(op.shape(0))
    perm = [int(axis) for axis in op.attribute("perm", range(rank)[::-1])]
    inside = perm[shard.dim] if slot == OUT else shard.dim
    before, after = replace(shard, dim=inside), replace(shard, dim=perm.index(inside))
    if shard.copies is not None:
        axis = perm[shard.copies.dim] if slot == OUT else shard.copies.dim
        before = replace(before, copies=replace(shard.copies, dim=axis))
        after = replace(after, copies=replace(shard.copies, dim=perm.index(axis)))
    return {0: before, OUT: after}


def reshape(op: Op, slot: int, shard: Shard) -> Assignment | None:
    """Reshape, Flatten, Squeeze, Unsqueeze: the order of elements stays, so strides say where the cut goes."""
    source, target = (op.shape(OUT), op.shape(0)) if slot == OUT else (op.shape(0), op.shape(OUT))
    passed = _carry(op, shard, source, target)
    found: dict[int, Placement] = {OUT: shard, 0: passed} if slot == OUT else {0: shard, OUT: passed}
    return found | {other: REPLICATE for other in op.inputs if other != 0}


def _strides(shape: tuple[int | str, ...]) -> list[tuple[int, tuple[str, ...]]]:
    """Elements from one index to the next, as a factor times symbols."""
    strides: list[tuple[int, tuple[str, ...]]] = []
    factor, symbols = 1, tuple[str, ...]()
    for size in reversed(shape):
        strides.append((factor, symbols))
        if isinstance(size, int):
            factor *= size
        else:
            symbols = tuple(sorted((*symbols, size)))
    return strides[::-1]


def _carry(op: Op, shard: Shard, source: tuple[int | str, ...], target: tuple[int | str, ...]) -> Shard:
    """The shard of `source` as a shard of `target`."""
    if shard.copies is not None:
        return _merge_copies(op, shard, source, target)
    size = source[shard.dim]
    stride, symbols = _strides(source)[shard.dim]
    if not isinstance(size, int):
        raise op.illegal("cuts a dynamic dimension")
    blocks = shard.blocks
    for dim, (step, inner) in enumerate(_strides(target)):
        extent = target[dim]
        if inner != symbols or not isinstance(extent, int):
            continue
        top, bottom = step * extent, step
        if bottom <= stride and stride * size <= top and stride % bottom == 0 and top % (stride * size) == 0:
            return Shard(dim, scaled(blocks, stride // bottom) * (top // (stride * size)))  # merged, or as it was
        if top == stride * size and bottom > stride and extent > 1:  # the outermost part of a dimension that is split
            return _split(op, blocks, target, dim, stride)
    raise op.illegal(f"tears dimension {shard.dim} of {list(source)} apart on the way to {list(target)}")


def _split(op: Op, blocks: tuple[Block, ...], target: tuple[int | str, ...], dim: int, stride: int) -> Shard:
    """Blocks of one dimension over the several dimensions that it becomes, from the outermost `dim` inwards."""
    strides = _strides(target)
    while True:
        extent = target[dim]
        if not isinstance(extent, int):
            raise op.illegal("splits a cut dimension into dynamic ones")
        inner = strides[dim][0] // stride  # elements of the old dimension in one index of this one
        equal = len({block.size for block in blocks}) == 1 and len({block.parts for block in blocks}) == 1
        if equal and len(blocks) > 1 and len(blocks) % extent == 0:
            blocks = blocks[: len(blocks) // extent]  # this dimension counts the blocks
        elif extent > 1:
            if inner == 0 or any(block.size % inner for block in blocks):
                raise op.illegal("splits a dimension between its blocks")
            parts, following = blocks[0].parts, target[dim + 1] if dim + 1 < len(target) else 0
            if (
                op.share_copies
                and len(blocks) == 1
                and parts > extent
                and parts % extent == 0
                and isinstance(following, int)
                and following > 1
            ):
                # Heads that repeat fewer key and value heads than there are ranks: ranks share out the copies.
                return Shard(dim, (Block(extent, extent),), Copies(dim + 1, parts // extent))
            return Shard(dim, tuple(Block(block.size // inner, block.parts) for block in blocks))
        dim += 1
        if dim == len(target) or inner <= 1:
            raise op.illegal("leaves nothing of the cut dimension")


def _merge_copies(op: Op, shard: Shard, source: tuple[int | str, ...], target: tuple[int | str, ...]) -> Shard:
    """[.., kv heads, copies, ..] -> [.., heads, ..]: parts of heads, and parts of their copies, are parts of both."""
    copies = shard.copies
    assert copies is not None
    heads, repeats = source[shard.dim], source[copies.dim]
    if not (isinstance(heads, int) and isinstance(repeats, int) and len(shard.blocks) == 1):
        raise op.illegal("repeats heads in a way that has no rule")
    merged = (*source[: shard.dim], heads * repeats, *source[copies.dim + 1 :])
    if copies.dim != shard.dim + 1 or _strides(merged)[shard.dim :] != _strides(target)[-len(merged) + shard.dim :]:
        raise op.illegal("repeats heads in a way that has no rule")
    return Shard(shard.dim, (Block(heads * repeats, shard.blocks[0].parts * copies.parts),))


def expand(op: Op, slot: int, shard: Shard) -> Assignment | None:
    """Dimensions of size 1 are repeated. The shape input is rewritten to local sizes later."""
    before, after = op.shape(0), op.shape(OUT)
    shift = len(after) - len(before)
    if slot == OUT:
        dim = shard.dim - shift
        if shard.copies is not None and before[shard.copies.dim - shift] != 1:
            raise op.illegal("repeats heads in a way that has no rule")
        repeated = dim < 0 or before[dim] == 1
        inside: Placement = REPLICATE if repeated else Shard(dim, shard.blocks)
        return {OUT: shard, 0: inside, 1: REPLICATE}
    dim, placed = shard.dim, Shard(shard.dim + shift, shard.blocks)
    op.plain(shard)
    parts = {block.parts for block in shard.blocks}
    following = dim + 1 < len(before) and before[dim + 1] == 1 and after[placed.dim + 1] != 1
    if following and len(parts) == 1 and op.ranks > max(parts):
        # Fewer key and value heads than ranks: ranks that share a head share out its copies.
        placed = replace(placed, copies=Copies(placed.dim + 1, op.ranks // max(parts)))
    return {0: shard, OUT: placed, 1: REPLICATE}


def slice_(op: Op, slot: int, shard: Shard) -> Assignment | None:
    op.plain(shard)
    rank = len(op.shape(0))
    starts, ends = constant_array(op.value(1)), constant_array(op.value(2))
    axes, steps = constant_array(op.value(3)), constant_array(op.value(4))
    if axes is None and op.has(3):
        raise op.illegal("takes axes that are computed")
    cut = list(range(rank)) if axes is None else [int(axis) % rank for axis in axes.reshape(-1)]
    if shard.dim in cut:
        position = cut.index(shard.dim)
        whole = (
            starts is not None and ends is not None and int(starts.reshape(-1)[position]) == 0
            and int(ends.reshape(-1)[position]) >= min(_END, op.size(0, shard.dim))
            and (not op.has(4) or (steps is not None and int(steps.reshape(-1)[position]) == 1))
        )  # fmt: skip
        if not whole:
            raise op.illegal("takes a range of the cut dimension")
    return {0: shard, OUT: shard} | {other: REPLICATE for other in op.inputs if other != 0}


def split(op: Op, slot: int, shard: Shard) -> Assignment | None:
    op.plain(shard)
    axis = int(op.attribute("axis", 0)) % len(op.shape(0))
    parts = [out(index) for index in range(len(op.node.outputs))]
    rest: dict[int, Placement] = {other: REPLICATE for other in op.inputs if other != 0}
    if shard.dim != axis:
        return {0: shard, **dict.fromkeys(parts, shard)} | rest
    joined = _join(op, axis, parts) if slot != 0 else shard
    if joined is None:
        return None
    return {0: joined, **_cut(op, joined, axis, parts)} | rest


def concat(op: Op, slot: int, shard: Shard) -> Assignment | None:
    op.plain(shard)
    axis = int(op.attribute("axis", 0)) % len(op.shape(OUT))
    if shard.dim != axis:
        return dict.fromkeys([*op.inputs, OUT], shard)
    joined = _join(op, axis, op.inputs) if slot != OUT else shard
    if joined is None:
        return None
    return {OUT: joined, **_cut(op, joined, axis, op.inputs)}


def _join(op: Op, axis: int, slots: list[int]) -> Shard | None:
    """The parts side by side; None while one is unknown. A part that every rank holds whole is a block of one part."""
    blocks: list[Block] = []
    for slot in slots:
        known = op.known.get(slot)
        if known is None:
            return None
        if isinstance(known, Shard) and known.dim == axis and known.copies is None:
            blocks.extend(known.blocks)
        elif isinstance(known, Replicate):
            blocks.append(Block(op.size(slot, axis), 1))
        else:
            raise op.illegal("joins parts that are cut in different ways")
    return Shard(axis, tuple(blocks))


def _cut(op: Op, joined: Shard, axis: int, slots: list[int]) -> dict[int, Placement]:
    """Blocks handed out to the parts, whose ends must be ends of blocks."""
    blocks, found = list(joined.blocks), dict[int, Placement]()
    for slot in slots:
        size, taken = op.size(slot, axis), list[Block]()
        while blocks and sum(block.size for block in taken) < size:
            taken.append(blocks.pop(0))
        if sum(block.size for block in taken) != size:
            raise op.illegal("cuts across the parts of a fused dimension")
        found[slot] = REPLICATE if all(block.parts == 1 for block in taken) else Shard(axis, tuple(taken))
    return found


def gather(op: Op, slot: int, shard: Shard) -> Assignment | None:
    """Rows of a table by computed indices; any dimension but the indexed one may be cut.

    A table of weights may be cut by rows too: `tensor` lets each rank give zeros for the rows of others, so the sum
    over the ranks is the lookup (a vocabulary-parallel embedding).
    """
    op.plain(shard)
    data, indices = op.shape(0), op.shape(1)
    axis = int(op.attribute("axis", 0)) % len(data)
    added = len(indices) - 1
    if slot == 0:
        dim = shard.dim
    elif slot == OUT and not axis <= shard.dim <= axis + added:
        dim = shard.dim if shard.dim < axis else shard.dim - added
    else:
        raise op.illegal("is indexed by a cut dimension")
    if dim == axis and 0 in op.constant and 1 not in op.constant and axis == 0:
        return {0: shard, 1: REPLICATE, OUT: PARTIAL}
    if dim == axis:
        raise op.illegal("looks rows up along the cut dimension")
    return {0: shard.at(dim), 1: REPLICATE, OUT: shard.at(dim if dim < axis else dim + added)}


def tensor_scatter(op: Op, slot: int, shard: Shard) -> Assignment | None:
    """A cache [batch, heads, slots, head_dim] and what is written to it."""
    op.plain(shard)
    if shard.dim == int(op.attribute("axis", -2)) % len(op.shape(0)) or shard.dim == 0:
        raise op.illegal("writes along the cut dimension")
    if slot == 2:
        raise op.illegal("takes positions that are cut")
    return {0: shard, 1: shard, OUT: shard} | ({2: REPLICATE} if op.has(2) else {})


def shape(op: Op, slot: int, shard: Shard) -> Assignment | None:
    """Shape arithmetic stays in whole sizes; `tensor` sees to that."""
    return {0: shard, OUT: REPLICATE}


def trilu(op: Op, slot: int, shard: Shard) -> Assignment | None:
    op.plain(shard)
    if shard.dim >= len(op.shape(0)) - 2:
        raise op.illegal("cuts a triangle")
    return {0: shard, OUT: shard} | ({1: REPLICATE} if op.has(1) else {})


def elements_of(shape_: tuple[int | str, ...]) -> int:
    """Elements per token: dynamic dimensions count once."""
    return math.prod(size for size in shape_ if isinstance(size, int))


RULES: dict[str, Rule] = {
    "Transpose": transpose, "Reshape": reshape, "Flatten": reshape, "Squeeze": reshape, "Unsqueeze": reshape,
    "Expand": expand, "Slice": slice_, "Split": split, "Concat": concat, "Gather": gather,
    "TensorScatter": tensor_scatter, "Shape": shape, "Trilu": trilu,
}  # fmt: skip
