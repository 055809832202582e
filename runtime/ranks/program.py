"""What one rank runs. Plain data: it travels to the rank (`wire`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class RunGraph:
    """A piece of the graph as ONNX bytes; large weights stay in files of the program's folder."""

    model: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Communicate:
    """A collective among the ranks of a stage; gathers join along dimension 0. `ranks` is what the graph says."""

    operation: str
    source: str
    target: str
    ranks: int


@dataclass(frozen=True)
class Transfer:
    """A value that passes between stages, to or from the rank of the same number."""

    value: str
    stage: int


@dataclass(frozen=True)
class RankProgram:
    """`states` are (output, input) pairs that stay with the rank from one step to the next.

    `session` are settings of ONNX Runtime, `threads` those of one piece.
    """

    folder: str
    steps: tuple[RunGraph | Communicate, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    received: tuple[Transfer, ...] = ()
    sent: tuple[Transfer, ...] = ()
    states: tuple[tuple[str, str], ...] = ()
    session: tuple[tuple[str, str], ...] = ()
    threads: int = 1


@dataclass(frozen=True)
class RankGrid:
    """Rank r of stage s is process s * tensor + r."""

    tensor: int
    pipeline: int

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline

    def stage(self, index: int) -> range:
        return range(index * self.tensor, (index + 1) * self.tensor)


@dataclass(frozen=True)
class PassedValue:
    """A value from or to the rank of the same number in another stage of engines. A string among `dims` is batch or
    length.
    """

    name: str
    stage: int
    dims: tuple[int | str, ...]
    itemsize: int


@dataclass(frozen=True)
class EngineProgram:
    """What one rank on a GPU runs: an engine for each capacity. `world` and `group` name the communicators of all ranks
    and of the stage.
    """

    layout: RankGrid
    flavour: Literal["tensorrt", "tensorrt-rtx"]
    files: tuple[Path, ...]
    capacities: tuple[int, ...]
    rows: int
    received: tuple[PassedValue, ...]
    sent: tuple[PassedValue, ...]
    world: bytes
    group: bytes
