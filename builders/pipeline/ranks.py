"""Ranks and engines, of encoders and generators alike."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from builders import corpus, graph, quality
from builders.artifacts import Engine, Partition, RankFiles
from builders.engine import tensorrt
from builders.partition import served
from builders.partition.shard import partition_graph
from builders.partition.verify import verify_partition
from builders.pipeline.result import Build, Report, done
from builders.store import Store, folder_digest, source_digest, tool_versions

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
            samples = quality.sample_requests(checkpoint, corpus.texts(texts_file, _SAMPLES))
        verify_partition(out, source.file_path, samples=samples)
        return found

    report("partition", f"{parallel.tensor} x {parallel.pipeline} ranks")
    code = {"code": folder_digest("builders/partition", "runtime/ranks")}
    item, hit = store.get_or_build(
        "partition",
        {
            "graph": source.digest,
            "parallel": parallel.model_dump(),
            "checkpoint": checkpoint.digest,
            "texts": corpus.corpus_key(texts_file),
            "tools": tool_versions("onnx", "onnx-ir", "onnxruntime"),
            **code,
        },
        Partition,
        run,
    )
    rank_files = None
    if built.platform == "cpu":
        rank_files, _ = store.get_or_build(
            "ranks", {"partition": item.digest, **code}, RankFiles, lambda out: served.write_rank_files(item, out)
        )
    megabytes, ideal = item.rank_bytes / 1e6, item.ideal_bytes / 1e6
    report("partition", done(f"proven equal; {megabytes:.1f} MB a rank at most, ideal {ideal:.1f}", hit))
    return replace(built, partition=item, ranks=rank_files)


def engines(built: Build, store: Store, report: Report) -> Build:
    """One engine for each target: of an encoder's graph, of each rank, or of a decoder for each length of the cache."""
    if built.platform != "gpu":
        return built
    engine = built.spec.engine
    made = []
    for target, variant in itertools.product(engine.targets, _variants(built)):
        report("engine", f"{engine.flavour} {target} {variant.label}")
        item, hit = store.get_or_build(
            "engine",
            {
                **variant.key,
                "flavour": engine.flavour,
                "target": target,
                "tools": tool_versions(engine.flavour, "polygraphy"),
                "code": source_digest(tensorrt, graph),
            },
            Engine,
            functools.partial(variant.build, target),
        )
        made.append(item)
        report("engine", done(f"{target} {variant.label}, {item.bytes / 1e6:.1f} MB", hit))
    return replace(built, engines=tuple(made))


@dataclass(frozen=True)
class _Variant:
    """What an engine is built of, beside its target. `build` takes the target and the folder."""

    label: str
    key: dict[str, Any]
    build: Callable[[str, Path], Engine]


def _variants(built: Build) -> list[_Variant]:
    source, partition, flavour = built.served_graph, built.partition, built.spec.engine.flavour
    profiles = built.spec.engine.profiles
    key: dict[str, Any] = {"graph": source.digest, "profiles": [profile.model_dump() for profile in profiles]}
    if built.spec.generates:
        chunk = built.spec.generation.chunk_tokens
        found = []
        for capacity in built.spec.cache_lengths_on("gpu"):
            decoding = tensorrt.decoder_profiles(built.spec.generation.slots, min(chunk, capacity))
            shapes = [profile.model_dump() for profile in decoding]
            found.append(
                _Variant(
                    f"{source.precision}, cache of {capacity}",
                    {"graph": source.digest, "profiles": shapes, "capacity": capacity},
                    lambda target, out, capacity=capacity, decoding=decoding: tensorrt.build_decoder_engine(  # type: ignore[misc]
                        source, capacity, flavour, target, decoding, out
                    ),
                )
            )
        return found
    if partition is None:
        build = lambda target, out: tensorrt.build_engine(source, flavour, target, profiles, out)  # noqa: E731
        return [_Variant(source.precision, key, build)]
    return [
        _Variant(
            f"{source.precision} stage {stage} rank {rank}",
            {**key, "graph": partition.digest, "rank": (stage, rank)},
            lambda target, out, stage=stage, rank=rank: tensorrt.build_rank_engine(  # type: ignore[misc]
                partition, stage, rank, source.precision, flavour, target, profiles, out
            ),
        )
        for stage in range(partition.pipeline)
        for rank in range(partition.tensor)
    ]
