"""One graph -> graphs of ranks, kept only when they compute the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from builders.artifacts import Partition, RankFiles
from builders.judging import corpus, vectors
from builders.partition.cut.shard import partition_graph
from builders.partition.prove.rank_files import write_rank_files
from builders.partition.prove.verify import verify_partition
from builders.pipeline.result import Build, Report, done
from builders.store.store import Store

_SAMPLES = 4  # real texts that an encoder's partition is proven with, beside random inputs


def partition(built: Build, store: Store, report: Report) -> Build:
    """Shares the graph out, and keeps the result only when rank processes have computed what the whole graph does."""
    parallel, source, checkpoint = built.spec.parallel, built.served_graph, built.checkpoint
    if parallel.ranks == 1:
        return built
    texts_file = built.spec.precision.calibration_texts

    def run(out: Path) -> Partition:
        found = partition_graph(source.file_path, parallel.tensor, parallel.pipeline, out)
        report("partition", f"{parallel.ranks} rank processes against the whole graph")
        samples: Sequence[Mapping[str, NDArray[Any]]] = ()
        if not built.spec.generates:  # a decoder's random inputs are as good: every token is an input
            samples = vectors.sample_requests(checkpoint, corpus.texts(texts_file, _SAMPLES))
        verify_partition(out, source.file_path, samples=samples)
        return found

    report("partition", f"{parallel.tensor} x {parallel.pipeline} ranks")
    item, hit = store.get_or_build(
        "partition",
        {
            "graph": source.digest,
            "parallel": parallel.model_dump(),
            "checkpoint": checkpoint.digest,
            "texts": corpus.corpus_key(texts_file),
        },
        Partition,
        run,
    )
    rank_files = None
    if built.platform == "cpu":
        rank_files, _ = store.get_or_build(
            "ranks", {"partition": item.digest}, RankFiles, lambda out: write_rank_files(item, out)
        )
    megabytes, ideal = item.rank_bytes / 1e6, item.ideal_bytes / 1e6
    report("partition", done(f"proven equal; {megabytes:.1f} MB a rank at most, ideal {ideal:.1f}", hit))
    return replace(built, partition=item, ranks=rank_files)
