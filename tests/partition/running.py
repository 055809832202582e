"""What tests of partitions share: graphs that are made once, rank processes, and a partition proven in one call.

Graphs come from torch once and are kept in pytest's cache, by the source that makes them. A test module binds the
fixtures that it uses to names of its own: `group = partition_running.group`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest

from builders.partition.cut.shard import partition_graph
from builders.partition.cut.solve import Embeddings
from builders.partition.prove.verify import VerifyReport, verify_partition
from runtime.ranks.group import RankGroup
from tests.partition import exported, legacy

RANKS = 4
GRAPHS = exported.GRAPHS | legacy.GRAPHS
Graphs = Callable[[str], Path]


@pytest.fixture(scope="module")
def groups() -> Iterator[list[RankGroup]]:
    running = [RankGroup(RANKS)]
    yield running
    running[0].close()


@pytest.fixture
def group(groups: list[RankGroup]) -> RankGroup:
    """Processes that tests share; new ones after a mutation that ended them."""
    if not groups[0].processes:
        groups[0] = RankGroup(RANKS)
    return groups[0]


@pytest.fixture(scope="session")
def graphs(request: pytest.FixtureRequest) -> Graphs:
    source = b"".join(Path(str(module.__file__)).read_bytes() for module in (exported, legacy))
    versions = "".join(metadata.version(name) for name in ("torch", "transformers", "onnxscript"))
    folder = request.config.cache.mkdir(f"partition-{hashlib.sha256(source + versions.encode()).hexdigest()[:12]}")

    def graph(name: str) -> Path:
        file = folder / f"{name}.onnx"
        if not file.is_file():  # another process of the tests may be making it too: the last rename wins
            GRAPHS[name](folder / f"{name}.{os.getpid()}.onnx").replace(file)
        return file

    return graph


def proven(
    file: Path,
    tensor: int,
    pipeline: int,
    out: Path,
    group: RankGroup,
    *,
    seed: int | None = None,
    embeddings: Embeddings = "whole",
) -> VerifyReport:
    shutil.rmtree(out, ignore_errors=True)
    partition_graph(file, tensor, pipeline, out, embeddings)
    return verify_partition(out, file, group=group, seed=seed)
