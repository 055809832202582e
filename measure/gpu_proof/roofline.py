"""The least time that a piece of work can take on a device: a roofline over limits measured in the same run.

Counted is what no implementation gets around: every weight read once, the cache of every row read once, the products.
Activations, norms and the table of words are left out, so the floor is a little too low, and a fraction with it. It is
too high, and may be over 1, where the limits are others: weights that stay in the L2 cache are not read at the rate of
the memory, and INT8 products are held against the rate of fp16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

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


class LeastWork(NamedTuple):
    bytes: float
    flops: float


class DeviceLimits(NamedTuple):
    """`bytes_per_s` counts bytes read and written, `flops_per_s` two for each multiplication with its addition."""

    bytes_per_s: float
    flops_per_s: float


def against(row: Measured, work: LeastWork, seconds: float, limits: DeviceLimits | None, **figures: float) -> Measured:
    """`row`, whose work took `seconds`, held against the limits; without limits, the counts alone."""
    found, facts = {"ms": seconds * 1e3, "gb": work.bytes / 1e9, "gflop": work.flops / 1e9}, {}
    if limits is not None:
        memory, arithmetic = work.bytes / limits.bytes_per_s, work.flops / limits.flops_per_s
        facts["bound by"] = "memory" if memory >= arithmetic else "arithmetic"
        found |= {"floor_ms": max(memory, arithmetic) * 1e3, "fraction": max(memory, arithmetic) / seconds}
    return replace(row, figures=found | figures, facts=facts)


def decode_work(shape: DecoderShape, rows: int, context: int, value_bytes: int) -> LeastWork:
    """One token for each of `rows`, that attend to `context` positions each."""
    multiplied = shape.layers * _block(shape) + shape.vocabulary * shape.hidden
    attention = 4 * rows * context * shape.heads * shape.head_dim * shape.layers
    return LeastWork((multiplied + rows * context * _cached(shape)) * value_bytes, 2 * rows * multiplied + attention)


def prefill_work(shape: DecoderShape, length: int, value_bytes: int) -> LeastWork:
    """One prompt of `length` tokens at once; a token attends to those before it, and the head sees the last one."""
    blocks, head = shape.layers * _block(shape), shape.vocabulary * shape.hidden
    attention = 2 * length * length * shape.heads * shape.head_dim * shape.layers
    return LeastWork((blocks + head + length * _cached(shape)) * value_bytes, 2 * (length * blocks + head) + attention)


def _block(shape: DecoderShape) -> int:
    """Weights of one layer."""
    return shape.hidden * (2 * shape.head_dim * (shape.heads + shape.kv_heads) + 3 * shape.ffn)


def _cached(shape: DecoderShape) -> int:
    """Keys and values of one token in all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim


def encoder_work(shape: EncoderShape, batch: int, length: int, value_bytes: int) -> LeastWork:
    blocks = shape.layers * (4 * shape.hidden * shape.hidden + 2 * shape.hidden * shape.ffn)
    attention = 4 * batch * length * length * shape.hidden * shape.layers
    return LeastWork(blocks * value_bytes, 2 * batch * length * blocks + attention)
