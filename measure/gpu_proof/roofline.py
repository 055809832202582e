"""The least time that a piece of work can take on a device: a roofline over limits measured in the same run.

Counted is what no implementation gets around: every weight read once, the cache of every row read once, the products.
Activations, norms and the table of words are left out, so the floor is a little too low, and a fraction with it. It is
too high, and may be over 1, where the limits are others: weights that stay in the L2 cache are not read at the rate of
the memory, and INT8 products are held against the rate of fp16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from measure.bench.decoder_graph import DecoderShape
from measure.gpu_proof.record import Measured


@dataclass(frozen=True)
class EncoderShape:
    """BERT's kind of block: full attention, a feed-forward part of two products."""

    name: str
    layers: int
    hidden: int
    heads: int
    ffn: int
    vocabulary: int = 30522


@dataclass(frozen=True)
class LeastWork:
    bytes: float
    flops: float


@dataclass(frozen=True)
class DeviceLimits:
    """`bytes_per_s` counts bytes read and written, `flops_per_s` two for each multiplication with its addition."""

    bytes_per_s: float
    flops_per_s: float


def floor_seconds(work: LeastWork, limits: DeviceLimits) -> tuple[float, str]:
    """The longer of both times, and what it is spent on."""
    memory, arithmetic = work.bytes / limits.bytes_per_s, work.flops / limits.flops_per_s
    return (memory, "memory") if memory >= arithmetic else (arithmetic, "arithmetic")


def against(row: Measured, work: LeastWork, seconds: float, limits: DeviceLimits | None, **figures: float) -> Measured:
    """`row`, whose work took `seconds`, held against the limits; without limits, the counts alone."""
    found = {"ms": seconds * 1e3, "gb": work.bytes / 1e9, "gflop": work.flops / 1e9}
    if limits is None:
        return replace(row, figures={**found, **figures})
    floor, bound = floor_seconds(work, limits)
    found |= {"floor_ms": floor * 1e3, "fraction": floor / seconds}
    return replace(row, figures={**found, **figures}, facts={"bound by": bound})


def block_parameters(shape: DecoderShape) -> int:
    attention = shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    return attention + 3 * shape.hidden * shape.ffn


def position_bytes(shape: DecoderShape, value_bytes: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * value_bytes


def decode_work(shape: DecoderShape, rows: int, context: int, value_bytes: int) -> LeastWork:
    """One token for each of `rows`, that attend to `context` positions each."""
    multiplied = shape.layers * block_parameters(shape) + shape.vocabulary * shape.hidden
    attention = 4 * rows * context * shape.heads * shape.head_dim * shape.layers
    read = multiplied * value_bytes + rows * context * position_bytes(shape, value_bytes)
    return LeastWork(read, 2 * rows * multiplied + attention)


def prefill_work(shape: DecoderShape, length: int, value_bytes: int) -> LeastWork:
    """One prompt of `length` tokens at once; a token attends to those before it, and the head sees the last one."""
    blocks, head = shape.layers * block_parameters(shape), shape.vocabulary * shape.hidden
    attention = 2 * length * length * shape.heads * shape.head_dim * shape.layers
    moved = (blocks + head) * value_bytes + length * position_bytes(shape, value_bytes)
    return LeastWork(moved, 2 * (length * blocks + head) + attention)


def encoder_work(shape: EncoderShape, batch: int, length: int, value_bytes: int) -> LeastWork:
    blocks = shape.layers * (4 * shape.hidden * shape.hidden + 2 * shape.hidden * shape.ffn)
    attention = 4 * batch * length * length * shape.hidden * shape.layers
    return LeastWork(blocks * value_bytes, 2 * batch * length * blocks + attention)
