"""A partition as the files that the CPU service runs: pieces between collectives, and the ranks' weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from builders.artifacts import FileRecord, Partition, RankFiles
from builders.errors import CheckError
from builders.partition.prove.verify import rank_programs
from builders.store.store import link_or_copy
from runtime.ranks.program import RankGrid
from runtime.ranks.stored import StoredPrograms, save_programs


def write_rank_files(partition: Partition, out: Path) -> RankFiles:
    """Writes the programs of all ranks into `out`, with their weights beside them (linked where possible).

    Raises CheckError when inputs or outputs are cut that are not states: what comes and goes is whole on every rank.
    """
    states = {name for pair in partition.states for name in pair}
    ports = [port for stage in partition.stages for port in (*stage.inputs, *stage.outputs)]
    cut = [port.name for port in ports if port.cut is not None and port.name not in states]
    if cut:
        raise CheckError(f"partition of {partition.source_file}: {', '.join(cut[:4])} differ by rank")
    programs = StoredPrograms(
        RankGrid(partition.tensor, partition.pipeline),
        tuple(port.name for port in partition.outputs),
        # As ONNX Runtime runs the whole graph by default; the proof runs weight-only products in fp32 instead.
        tuple(replace(program, session=()) for program in rank_programs(partition)),
    )
    written = save_programs(programs, out)
    for record in partition.files:
        if record.name.endswith(".data"):
            written.append(link_or_copy(partition.path(record.name), out / record.name))
    return RankFiles(
        directory=out,
        files=tuple(map(FileRecord.of, written)),
        tensor=partition.tensor,
        pipeline=partition.pipeline,
        partition_digest=partition.digest,
    )
