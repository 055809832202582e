"""Which engines the ranks of a generator run, as `runtime.tensorrt.rank_manifest` reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from builders.artifacts import Engine, FileRecord, Partition, RankFiles, StagePort
from builders.errors import EngineError
from runtime.tensorrt.engine import LOGITS
from runtime.tensorrt.rank_manifest import EngineManifest, Passed, RankEngines


def write_rank_manifest(partition: Partition, engines: Sequence[Engine], out: Path) -> RankFiles:
    """Writes `engines.json` into `out`; it names the files of `engines`, which lie beside it in the model repository.

    Raises EngineError for a value that passes between stages in parts, and for ranks without engines.
    """
    ranks = [
        RankEngines(
            received=tuple(_passed(port, port.from_stage) for port in part.inputs if port.from_stage is not None),
            sent=tuple(
                _passed(port, later)
                for later, other in enumerate(partition.stages)
                for port in other.inputs
                if port.from_stage == stage
            ),
            files={
                f"{engine.target}.{engine.capacity}": engine.file
                for engine in engines
                if (engine.stage, engine.rank) == (stage, rank)
            },
        )
        for stage, part in enumerate(partition.stages)
        for rank in range(partition.tensor)
    ]
    if len({tuple(sorted(rank.files)) for rank in ranks}) > 1 or not ranks[0].files:
        raise EngineError(f"engines of {partition.source_file}: not the same targets and capacities for every rank")
    logits = next((port for port in partition.outputs if port.name == LOGITS), None)
    if logits is None:
        raise EngineError(f"{partition.source_file}: a decoder's ranks give {LOGITS}, these do not")
    manifest = EngineManifest(
        flavour=engines[0].flavour,
        tensor=partition.tensor,
        pipeline=partition.pipeline,
        vocabulary=int(logits.dims[-1]),
        ranks=tuple(ranks),
    )
    return RankFiles(
        directory=out,
        files=(FileRecord.of(manifest.save(out)),),
        tensor=partition.tensor,
        pipeline=partition.pipeline,
        partition_digest=partition.digest,
    )


def _passed(port: StagePort, stage: int) -> Passed:
    if port.cut is not None:
        raise EngineError(f"{port.name} passes between stages in parts; stages send to ranks of the same number alone")
    return Passed(name=port.name, stage=stage, dims=port.dims, itemsize=np.dtype(port.dtype).itemsize)
