"""Cases at the ends of what a graph takes, which random inputs hardly meet: the first and the last word of every
shard, the last position, and values that are small or large."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from builders.partition.prove.feeds import SLOTS, Arrays, Case, InputRole, step, uses
from builders.partition.read import Source, shape_of

_LONGEST = 512  # tokens in a row; longer ones cost more than they show
_MOST_SLOTS = 2048
_WIDTH = 8  # words in a row of the case that goes through all boundaries
_SIZES = (1e-3, 1.0, 30.0)  # of values, row by row


def edge_cases(source: Source, inputs: Sequence[InputRole], ranks: int, seed: int) -> list[Case]:
    generator = np.random.default_rng(seed)
    most = max([len(boundary_ids(item.bound, ranks)) for item in inputs if item.role == "ids"], default=len(_SIZES))
    batch, length = -(-most // _WIDTH), min(most, _WIDTH)
    found = [Case("boundary words", [_at_boundaries(inputs, batch, length, ranks, generator)])]
    rows = position_rows(source, inputs)
    if any(item.role == "positions" for item in inputs):
        slots = min(rows or SLOTS, _MOST_SLOTS)
        held = [size for item in inputs if item.role == "state" and isinstance(size := item.dims[item.axis], int)]
        last = np.array([min([slots, *held]) - 1])
        found.append(Case("the last position", [step(inputs, 1, 1, np.ones(1, int), last, generator, slots)]))
    elif any(item.role == "ids" for item in inputs):
        # A table may begin with rows for padding, as RoBERTa's does: the whole graph says which length is too long.
        for longest in (rows, rows - 2) if rows > 2 else ():
            tokens = min(longest, _LONGEST)
            feeds = step(inputs, 1, tokens, np.array([tokens]), np.zeros(1, int), generator)
            found.append(Case("the longest text", [feeds], optional=True))
    return found


def boundary_ids(bound: int, ranks: int) -> list[int]:
    """The first and the last id under `bound` of each of `ranks` shards, and their neighbours in the next one."""
    local = -(-bound // ranks)
    starts = [min(rank * local, bound - 1) for rank in range(ranks)]
    return sorted({0, bound - 1, *starts, *(max(start - 1, 0) for start in starts)})


def position_rows(source: Source, inputs: Sequence[InputRole]) -> int:
    """Rows of the largest table [rows, width] that something else than ids is looked up in; 0 without one."""
    named = {item.name for item in inputs if item.role == "ids"}
    words = {node for value in source.graph.inputs if value.name in named for node, _ in uses(value)}
    tables = [node.inputs[0] for node in source.graph if node.op_type == "Gather" and node not in words]
    shapes = [shape_of(table) for table in tables if table is not None and table in source.constant]
    return max([shape[0] for shape in shapes if shape and len(shape) == 2 and isinstance(shape[0], int)], default=0)


def _at_boundaries(
    inputs: Sequence[InputRole], batch: int, length: int, ranks: int, generator: np.random.Generator
) -> Arrays:
    feeds = step(inputs, batch, length, np.full(batch, length), np.zeros(batch, int), generator)
    for item in inputs:
        array = feeds[item.name]
        if item.role == "ids":
            feeds[item.name] = np.resize(boundary_ids(item.bound, ranks), array.shape).astype(item.dtype)
        if item.role == "values" and array.ndim:
            sizes: NDArray[np.float64] = np.resize(_SIZES, len(array)).reshape(-1, *[1] * (array.ndim - 1))
            feeds[item.name] = (array * sizes).astype(item.dtype)
    return feeds
