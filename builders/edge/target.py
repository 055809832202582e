"""What every runtime for small devices is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from builders.artifacts import Checkpoint, OnnxGraph
from builders.errors import UnsupportedError
from runtime.graph import GraphExecutor


@dataclass(frozen=True)
class EdgeTarget:
    """`suffix` is that of the file, `parts` those of further files beside it. `precisions`: of graphs that are taken;
    `others` says why no other.

    `convert` writes the file and answers with the converter's version; it raises MachineError where the package is not
    here, UnsupportedError for what the converter cannot do. `open` is the maker's own runtime on this CPU. `length`
    are the tokens that each text is padded to in a file of fixed shape.
    """

    name: str
    suffix: str
    precisions: tuple[str, ...]
    others: str
    convert: Callable[[OnnxGraph, Checkpoint, Path], str]
    open: Callable[[Path, Checkpoint], GraphExecutor]
    parts: tuple[str, ...] = ()
    length: int | None = None

    def require_precision(self, graph: OnnxGraph) -> None:
        if graph.precision not in self.precisions:
            raise UnsupportedError(
                f"graph {graph.file_path} for {self.name}", got=f"a graph in {graph.precision}",
                expected=" or ".join(self.precisions), fix=self.others,
            )  # fmt: skip
