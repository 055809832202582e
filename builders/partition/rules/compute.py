"""Rules of operators that compute: elementwise, normalisation, products, attention, quantisation."""

from __future__ import annotations

from dataclasses import replace

from builders.partition.placement import PARTIAL, REPLICATE, Block, Placement, Shard, even
from builders.partition.read import constant_array
from builders.partition.rules.op import OUT, Assignment, Op, Rule, out


def elementwise(op: Op, slot: int, shard: Shard) -> Assignment | None:
    """Any operator that works element by element and broadcasts: dimensions align at the right."""
    whole = op.shape(OUT)
    shift = len(whole) - len(op.shape(slot))
    return {each: _broadcast(op, each, shard.dim + shift, shard, shift) for each in [*op.inputs, OUT]}


def _broadcast(op: Op, slot: int, dim: int, shard: Shard, shift: int) -> Placement:
    """The shard of output dimension `dim` as `slot` sees it: dimensions of size 1 are whole on every rank."""
    sizes, whole = op.shape(slot), op.shape(OUT)
    back = len(whole) - len(sizes)
    if dim < back or (sizes[dim - back] == 1 and whole[dim] != 1):
        if shard.copies is not None and dim + 1 >= back and sizes[dim + 1 - back] != 1:
            raise op.illegal("combines repeated heads with their copies")
        return REPLICATE
    copies = shard.copies
    if copies is not None:
        at = copies.dim + shift
        copies = None if sizes[at - back] == 1 else replace(copies, dim=at - back)
    return Shard(dim - back, shard.blocks, copies)


def normalisation(op: Op, slot: int, shard: Shard) -> Assignment | None:
    """LayerNormalization, RMSNormalization: everything from `axis` on is one group."""
    op.plain(shard)
    if slot not in (0, OUT) or shard.dim >= int(op.attribute("axis", -1)) % len(op.shape(0)):
        raise op.illegal("normalises over the cut dimension")
    outputs = {out(index): shard for index in range(len(op.node.outputs)) if op.has(out(index))}
    return {0: shard, **outputs} | {other: REPLICATE for other in op.inputs if other != 0}


def softmax(op: Op, slot: int, shard: Shard) -> Assignment | None:
    op.plain(shard)
    if shard.dim == int(op.attribute("axis", -1)) % len(op.shape(0)):
        raise op.illegal("normalises over the cut dimension")
    return {0: shard, OUT: shard}


def reduce(op: Op, slot: int, shard: Shard) -> Assignment | None:
    op.plain(shard)
    rank = len(op.shape(0))
    given = constant_array(op.value(1)) if op.has(1) else op.attribute("axes", None)
    if given is None and op.has(1):
        raise op.illegal("takes axes that are computed")
    axes = sorted(int(axis) % rank for axis in (range(rank) if given is None else given))
    kept = [dim for dim in range(rank) if dim not in axes]
    keep = bool(op.attribute("keepdims", 1))
    dim = shard.dim if slot == 0 or keep else kept[shard.dim]
    if dim in axes:
        raise op.illegal("reduces over the cut dimension")
    after = dim if keep else kept.index(dim)
    return {0: shard.at(dim), OUT: shard.at(after)} | ({1: REPLICATE} if op.has(1) else {})


def matmul(op: Op, slot: int, shard: Shard) -> Assignment | None:
    """Columns of a weight give a sharded output, rows a partial one; batch dimensions align at the right."""
    op.plain(shard)
    left, right, whole = op.shape(0), op.shape(1), op.shape(OUT)
    if min(len(left), len(right)) < 2:
        raise op.illegal("multiplies a vector")
    rank, sizes = len(whole), {0: left, 1: right, OUT: whole}
    from_end = len(sizes[slot]) - shard.dim
    if (slot, from_end) in ((0, 1), (1, 2)):
        if 1 not in op.constant:
            raise op.illegal("contracts the cut dimension of two activations")
        return {0: shard.at(len(left) - 1), 1: shard.at(len(right) - 2), OUT: PARTIAL}
    if from_end == 1:
        return {0: REPLICATE, 1: shard.at(len(right) - 1), OUT: shard.at(rank - 1)}
    if from_end == 2:
        return {0: shard.at(len(left) - 2), 1: REPLICATE, OUT: shard.at(rank - 2)}
    found: dict[int, Placement] = {OUT: shard.at(rank - from_end)}
    for operand in (0, 1):
        dims = sizes[operand]
        absent = from_end > len(dims) or (dims[-from_end] == 1 and whole[-from_end] != 1)
        found[operand] = REPLICATE if absent else shard.at(len(dims) - from_end)
    return found


def gemm(op: Op, slot: int, shard: Shard) -> Assignment | None:
    """As MatMul; the bias of a row split is taken out and added once, after the all-reduce."""
    op.plain(shard)
    if op.attribute("transA", 0):
        raise op.illegal("transposes its left operand")
    inner, outer = (1, 0) if op.attribute("transB", 0) else (0, 1)
    if (slot, shard.dim) in ((0, 1), (1, inner)):
        if 1 not in op.constant:
            raise op.illegal("contracts the cut dimension of two activations")
        found: dict[int, Placement] = {0: shard.at(1), 1: shard.at(inner), OUT: PARTIAL}
        return found | ({2: REPLICATE} if op.has(2) else {})
    if (slot, shard.dim) in ((1, outer), (OUT, 1)):
        columns: dict[int, Placement] = {0: REPLICATE, 1: shard.at(outer), OUT: shard.at(1)}
        if op.has(2):
            bias = op.shape(2)
            cut = len(bias) > 0 and bias[-1] == op.size(OUT, 1)
            columns[2] = shard.at(len(bias) - 1) if cut else REPLICATE
        return columns
    raise op.illegal("is cut along its rows or its bias")


def kv_parts(heads: int, ranks: int) -> int:
    """Pieces of the key and value heads: as many as ranks, or one head each where there are fewer heads."""
    return heads if heads < ranks and ranks % heads == 0 else ranks


def attention(op: Op, slot: int, shard: Shard) -> Assignment | None:
    """ai.onnx Attention on [batch, heads, length, d] or [batch, length, heads * d]: heads are independent."""
    op.plain(shard)
    flat = len(op.shape(0)) == 3
    dim = 2 if flat else 1
    heads = int(op.attribute("q_num_heads", 0)) if flat else op.size(0, 1)
    kv_heads = int(op.attribute("kv_num_heads", 0)) if flat else op.size(1, 1)
    parts = kv_parts(kv_heads, op.ranks)

    def kv(value: int, at: int) -> Placement:
        return REPLICATE if parts == 1 else even(at, op.size(value, at), parts)

    found: dict[int, Placement] = {0: even(dim, op.size(0, dim), op.ranks), 1: kv(1, dim), 2: kv(2, dim)}
    found[OUT] = even(dim, op.size(OUT, dim), op.ranks)
    if op.has(3):
        mask = op.shape(3)
        per_head = len(mask) >= 3 and mask[-3] == heads and heads != 1
        found[3] = even(len(mask) - 3, heads, op.ranks) if per_head else REPLICATE
    for past in (4, 5, out(1), out(2)):
        if op.has(past):
            found[past] = kv(past, 1)
    if op.has(6):
        found[6] = REPLICATE
    if op.has(out(3)):
        found[out(3)] = even(1, heads, op.ranks)
    if found.get(slot) != shard:
        raise op.illegal("is cut along something else than its heads")
    return found


def rotary_embedding(op: Op, slot: int, shard: Shard) -> Assignment | None:
    op.plain(shard)
    heads = int(op.attribute("num_heads", 0))
    if slot not in (0, OUT) or shard.dim != (1 if len(op.shape(0)) == 4 else 2) or (shard.dim == 2 and not heads):
        raise op.illegal("is cut along something else than its heads")
    return {0: shard, OUT: shard} | {other: REPLICATE for other in op.inputs if other != 0}


def quantisation(op: Op, slot: int, shard: Shard) -> Assignment | None:
    """QuantizeLinear, DequantizeLinear: scales per tensor stay whole, per channel or block they follow the cut."""
    op.plain(shard)
    if slot not in (0, OUT):
        return None
    found: dict[int, Placement] = {0: shard, OUT: shard}
    axis = int(op.attribute("axis", 1)) % max(len(op.shape(0)), 1)
    block = int(op.attribute("block_size", 0))
    for scale in [each for each in op.inputs if each != 0]:
        sizes = op.shape(scale)
        if len(sizes) == 0 or (len(sizes) == 1 and sizes[0] == 1 and not block):
            found[scale] = REPLICATE
        elif block:
            found[scale] = shard if shard.dim != axis else _scale_blocks(op, shard, block)
        else:
            found[scale] = shard.at(0) if shard.dim == axis else REPLICATE
    return found


def _scale_blocks(op: Op, shard: Shard, block: int) -> Shard:
    """Scales of the cut rows. Where a rank holds less than one block of rows, ranks hold the same scale."""
    if any(each.size % block for each in shard.blocks):
        raise op.illegal(f"shares scales over {block} elements across the cut")
    counts = [each.size // block for each in shard.blocks]
    if len(counts) == 1 and counts[0] < shard.blocks[0].parts and shard.blocks[0].parts % counts[0] == 0:
        return even(shard.dim, counts[0], counts[0])
    return Shard(shard.dim, tuple(Block(count, each.parts) for count, each in zip(counts, shard.blocks, strict=True)))


def head_counts(op: Op) -> list[tuple[int, int]]:
    """Heads hidden in attributes, which must divide like dimensions do: (heads, parts)."""
    if op.node.op_type not in ("Attention", "RotaryEmbedding") or len(op.shape(0)) != 3:
        return []
    slots = {"q_num_heads": 0, "kv_num_heads": 1, "num_heads": 0}
    given = {name: op.known.get(slot) for name, slot in slots.items()}
    return [
        (int(op.attribute(name, 0)), placed.blocks[0].parts)
        for name, placed in given.items()
        if isinstance(placed, Shard) and op.attribute(name, 0)
    ]


_ELEMENTWISE = (
    "Abs", "Add", "And", "Cast", "CastLike", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Div", "Elu", "Equal", "Erf", "Exp",
    "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu",
    "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "Pow", "PRelu",
    "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Sub",
    "Sum", "Swish", "Tanh", "ThresholdedRelu", "Where", "Xor",
)  # fmt: skip
_REDUCTIONS = (
    "ReduceL1",
    "ReduceL2",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(_REDUCTIONS, reduce),
    "LayerNormalization": normalisation, "RMSNormalization": normalisation,
    "Softmax": softmax, "LogSoftmax": softmax, "MatMul": matmul, "Gemm": gemm,
    "Attention": attention, "RotaryEmbedding": rotary_embedding,
    "QuantizeLinear": quantisation, "DequantizeLinear": quantisation,
}  # fmt: skip
