"""What a build has come to so far: the record that every step takes, and returns with more in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from builders.artifacts import (
    Checkpoint,
    Engine,
    GenerationQuality,
    OnnxGraph,
    Partition,
    PrecisionChoice,
    ProofFile,
    Quality,
    RankFiles,
    RepositoryEntry,
)
from builders.spec import DeploymentSpec, Platform
from builders.store.store import Store

Stage = Literal[
    "checkpoint", "compress", "precision", "export", "quantize", "partition", "qualify", "engine", "repository"
]
Report = Callable[[Stage, str], None]


@dataclass(frozen=True)
class Build:
    """What a build has come to so far; later fields are None or empty when it stopped earlier.

    `checkpoint` is what is served. Where the spec compresses, `original` is what the spec names, and `steps` are what
    each step left, the last of which is `checkpoint`.
    """

    spec: DeploymentSpec
    platform: Platform
    checkpoint: Checkpoint
    original: Checkpoint | None = None
    steps: tuple[Checkpoint, ...] = ()
    choice: PrecisionChoice | None = None
    graphs: tuple[OnnxGraph, ...] = ()
    partition: Partition | None = None
    ranks: RankFiles | None = None
    served: Quality | GenerationQuality | None = None
    engines: tuple[Engine, ...] = ()
    proof: ProofFile | None = None
    entry: RepositoryEntry | None = None

    def graph(self, precision: str) -> OnnxGraph:
        return next(item for item in self.graphs if item.precision == precision)

    @property
    def served_graph(self) -> OnnxGraph:
        """The graph that the platform runs or builds from."""
        wanted = self.spec.precision_on(self.platform)
        return self.graph("fp32" if wanted == "bf16" else wanted)


Step = Callable[[Build, Store, Report], Build]


def done(text: str, hit: bool) -> str:
    """A line of progress for a stage that has ended; `hit`: it came from the store."""
    return f"{text} (unchanged)" if hit else text
