"""Where a tensor lives when `ranks` processes share one model.

    Replicate       every rank holds the whole tensor
    Shard(dim)      every rank holds a slice of dimension `dim`
    Partial         every rank holds a summand; an all-reduce makes it whole

A dimension may be several things side by side (fused query, key and value), so a Shard cuts it block by block. A
block may have fewer parts than there are ranks (key and value heads of grouped-query attention): neighbouring ranks
then hold the same part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """`size` neighbouring elements of a dimension, cut in `parts` equal pieces.

    Where the parts do not divide the size (a vocabulary), the last pieces are filled up with zeros.
    """

    size: int
    parts: int

    @property
    def local(self) -> int:
        return -(-self.size // self.parts)

    @property
    def divides(self) -> bool:
        return self.size % self.parts == 0


@dataclass(frozen=True)
class Replicate:
    """Every rank holds the whole tensor."""


@dataclass(frozen=True)
class Partial:
    """Every rank holds a summand of the tensor."""


@dataclass(frozen=True)
class Copies:
    """Dimension `dim` repeats the one before it, and ranks that share a part of that one cut it in `parts`."""

    dim: int
    parts: int


@dataclass(frozen=True)
class Shard:
    """Dimension `dim` (never negative) is cut block by block; the blocks fill the dimension."""

    dim: int
    blocks: tuple[Block, ...]
    copies: Copies | None = None

    @property
    def local(self) -> int:
        """Size of the dimension on one rank."""
        return sum(block.local for block in self.blocks)

    def at(self, dim: int) -> Shard:
        return Shard(dim, self.blocks)


Placement = Replicate | Shard | Partial
REPLICATE, PARTIAL = Replicate(), Partial()


def even(dim: int, size: int, parts: int) -> Shard:
    """One block over the whole dimension."""
    return Shard(dim, (Block(size, parts),))


def scaled(blocks: Sequence[Block], factor: int) -> tuple[Block, ...]:
    """The blocks of a dimension whose every element became `factor` elements."""
    return tuple(Block(block.size * factor, block.parts) for block in blocks)


def spans(blocks: Sequence[Block], rank: int, ranks: int) -> list[tuple[int, int]]:
    """Index ranges [start, stop) of the dimension that `rank` holds, neighbours joined."""
    found: list[tuple[int, int]] = []
    start = 0
    for block in blocks:
        end = start + block.size
        first = min(start + rank * block.parts // ranks * block.local, end)
        last = min(first + block.local, end)
        if found and found[-1][1] == first:
            found[-1] = (found[-1][0], last)
        else:
            found.append((first, last))
        start += block.size
    return found


def local_shape(shape: Sequence[int | str], placement: Placement) -> list[int | str]:
    """Sizes on one rank."""
    sizes = list(shape)
    if isinstance(placement, Shard):
        sizes[placement.dim] = placement.local
        if placement.copies is not None:
            whole = sizes[placement.copies.dim]
            assert isinstance(whole, int)
            sizes[placement.copies.dim] = whole // placement.copies.parts
    return sizes


def describe(placement: Placement) -> str:
    """`replicate`, `partial`, `shard(1: 384/2)`, `shard(1: 384/2 + 128/1)`; size/parts of each block."""
    if isinstance(placement, Shard):
        return f"shard({placement.dim}: {' + '.join(f'{block.size}/{block.parts}' for block in placement.blocks)})"
    return type(placement).__name__.lower()
