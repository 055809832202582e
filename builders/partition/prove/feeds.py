"""Inputs for a graph that nobody described: what each input is, read from what the graph does with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from builders.partition.read import Source, shape_of

Role = Literal["ids", "positions", "index", "mask", "state", "values"]
Arrays = dict[str, NDArray[Any]]

_PASSING = ("Cast", "Reshape", "Unsqueeze", "Squeeze", "Expand", "Clip", "Identity", "Flatten", "Transpose")
SLOTS = 24  # positions of a cache whose length is dynamic
_OTHER = 7  # size of any other dynamic dimension
_WORST_ID = 30_000


@dataclass(frozen=True)
class InputRole:
    """`bound`: ids lie under it. `axis`: the dimension of a state that positions count."""

    name: str
    role: Role
    dtype: np.dtype[Any]
    dims: tuple[int | str, ...]
    bound: int = _WORST_ID
    axis: int = 2


@dataclass
class Case:
    """Steps that follow each other. States begin with the first step and are left out afterwards.

    `optional`: the whole graph may refuse it; of those of one name, the first that it takes is enough.
    """

    name: str
    steps: list[Arrays] = field(default_factory=list)
    optional: bool = False


def roles(source: Source, states: Mapping[str, str]) -> list[InputRole]:
    """`states` maps state inputs to the outputs that follow them."""
    found = [_role(source, value, states) for value in source.graph.inputs]
    if any(item.role == "positions" for item in found):
        return found
    # A cache that grows by Concat: any content will do, and one step shows everything.
    return [replace(item, role="values") if item.role == "state" else item for item in found]


def _role(source: Source, value: ir.Value, states: Mapping[str, str]) -> InputRole:
    assert value.dtype is not None
    found = InputRole(str(value.name), "values", np.dtype(value.dtype.numpy()), shape_of(value) or ())
    if value.name in states:
        node = next(iter(value.consumers()))
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -2
        return replace(found, role="state", axis=axis % len(found.dims))
    met = list(uses(value))
    if found.dtype.kind == "f":
        return found
    if any(node.op_type == "TensorScatter" and slot == 2 for node, slot in met):
        return replace(found, role="positions")
    looked_up = [node for node, slot in met if node.op_type in ("Gather", "GatherElements", "GatherND") and slot == 1]
    tables = [shape_of(node.inputs[0]) for node in looked_up if node.inputs[0] in source.constant]
    rows = [shape[0] for shape in tables if shape and isinstance(shape[0], int)]
    if looked_up and len(tables) < len(looked_up):
        return replace(found, role="index")
    if rows:
        return replace(found, role="ids", bound=min(rows))
    return replace(found, role="mask" if len(found.dims) >= 2 else "index")


def uses(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """Where the value goes, through operators that pass its elements on."""
    found: list[tuple[ir.Node, int]] = []
    queue, seen = [value], {value}
    while queue:
        for node, slot in queue.pop().uses():
            found.append((node, slot))
            if node.op_type in _PASSING and slot == 0 and node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                queue.append(node.outputs[0])
    return found


def cases(inputs: Sequence[InputRole], seed: int) -> list[Case]:
    """Several batch sizes and lengths, rows of different lengths. Caches: a prefill and steps at several positions."""
    generator = np.random.default_rng(seed)
    stateful = any(item.role == "state" for item in inputs)
    found = []
    for batch, length in ((1, 1), (2, 5), (3, 9)):
        case = Case(f"batch {batch} x length {length}")
        rows = np.sort(generator.integers(1, length + 1, batch))[::-1].copy()
        rows[0] = length
        case.steps.append(step(inputs, batch, length, rows, np.zeros(batch, np.int64), generator))
        if stateful and any(item.role == "positions" for item in inputs):
            begun = {item.name for item in inputs if item.role == "state"}
            kept = {item.name: case.steps[0][item.name] for item in inputs if item.role in ("values", "mask")}
            for offset in range(2):
                following = step(inputs, batch, 1, np.ones(batch, np.int64), rows + offset, generator) | kept
                case.steps.append({name: array for name, array in following.items() if name not in begun})
        found.append(case)
    return found


def step(
    inputs: Sequence[InputRole],
    batch: int,
    length: int,
    rows: NDArray[Any],
    starts: NDArray[Any],
    generator: np.random.Generator,
    slots: int = SLOTS,
) -> Arrays:
    """`rows`: tokens of each row of the batch; `starts`: positions that they begin at."""
    symbols = _sizes(inputs, batch, length, slots)
    return {item.name: _array(item, _resolve(item, symbols), rows, starts, length, generator) for item in inputs}


def _sizes(inputs: Sequence[InputRole], batch: int, length: int, slots: int) -> dict[str, int]:
    """A size for every dynamic dimension: batch leads, ids are [batch, length], states count positions."""
    symbols: dict[str, int] = {}
    for item in inputs:
        if item.role == "state" and isinstance(item.dims[item.axis], str):
            symbols[str(item.dims[item.axis])] = slots
        if item.role == "ids" and len(item.dims) > 1 and isinstance(item.dims[1], str):
            symbols[str(item.dims[1])] = length
        if item.dims and isinstance(item.dims[0], str):
            symbols[item.dims[0]] = batch
    for symbol in [str(size) for item in inputs for size in item.dims if isinstance(size, str) and "+" in size]:
        symbols[symbol] = sum(symbols.get(part.strip(), _OTHER) for part in symbol.split("+"))  # `past + length`
    return symbols


def _resolve(item: InputRole, symbols: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else symbols.get(size, _OTHER) for size in item.dims)


def _array(
    item: InputRole,
    shape: tuple[int, ...],
    rows: NDArray[Any],
    starts: NDArray[Any],
    length: int,
    generator: np.random.Generator,
) -> NDArray[Any]:
    if item.role == "state":
        return np.zeros(shape, item.dtype)
    if item.role == "values":
        return generator.standard_normal(shape).astype(item.dtype)
    if item.role == "ids":
        return generator.integers(0, item.bound, shape).astype(item.dtype)
    if item.role == "positions":
        return np.resize(starts, shape).astype(item.dtype)
    if item.role == "index":
        return np.resize(rows - 1, shape).astype(item.dtype)
    mask = np.ones(shape, item.dtype)
    if len(shape) == 2:
        filled = rows if shape[1] == length else generator.integers(1, shape[1] + 1, shape[0])
        mask = (np.arange(shape[1])[None] < np.resize(filled, shape[0])[:, None]).astype(item.dtype)
    return mask
