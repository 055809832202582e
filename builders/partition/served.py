"""A partition as the files that the CPU service runs: pieces between collectives, and the ranks' weights."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from builders.artifacts import FileRecord, Partition, RankFiles
from builders.errors import CheckError
from builders.partition.verify import rank_programs
from runtime.ranks.program import Layout
from runtime.ranks.stored import StoredPrograms, save_programs


def write_rank_files(partition: Partition, out: Path) -> RankFiles:
    """Writes the programs of all ranks into `out`, with their weights beside them (linked where possible).

    Raises CheckError for a graph that keeps states between steps, or whose inputs or outputs are cut: an encoder's
    are whole on every rank.
    """
    cut = [port.name for stage in partition.stages for port in (*stage.inputs, *stage.outputs) if port.cut is not None]
    if cut or partition.states:
        names = ", ".join([*cut, *(given for _, given in partition.states)][:4])
        raise CheckError(
            f"partition of {partition.source_file}: {names} differ by rank; an encoder has no such tensors"
        )
    programs = StoredPrograms(
        Layout(partition.tensor, partition.pipeline),
        tuple(port.name for port in partition.outputs),
        # As ONNX Runtime runs the whole graph by default; the proof runs weight-only products in fp32 instead.
        tuple(replace(program, session=()) for program in rank_programs(partition)),
    )
    written = save_programs(programs, out)
    for record in partition.files:
        if record.name.endswith(".data"):
            written.append(_link(partition.path(record.name), out / record.name))
    return RankFiles(
        directory=out,
        files=tuple(map(FileRecord.of, written)),
        tensor=partition.tensor,
        pipeline=partition.pipeline,
        partition_digest=partition.digest,
    )


def _link(source: Path, target: Path) -> Path:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
    return target
