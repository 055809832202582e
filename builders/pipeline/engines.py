"""Engines, of encoders and generators, of whole graphs and of ranks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from builders.artifacts import Engine, Partition, RankFiles
from builders.engine import rank_manifest as rank_engines
from builders.engine import tensorrt
from builders.judging.perplexity import ENCODER_FILE
from builders.pipeline.result import Build, Report, done
from builders.spec import ProfileSlice
from builders.store.closure import tool_versions
from builders.store.store import Store


def engines(built: Build, store: Store, report: Report) -> Build:
    """One engine for each target: of an encoder's graph, of each rank, and of a decoder for each length of the cache.

    Ranks of a decoder get a manifest of theirs, too.
    """
    if built.platform != "gpu":
        return built
    engine = built.spec.engine
    library = engine.flavour.replace("-", "_")
    made = []
    for target, variant in itertools.product(engine.targets, _variants(built)):
        report("engine", f"{engine.flavour} {target} {variant.label}")
        item, hit = store.get_or_build(
            "engine",
            {
                **variant.key,
                "flavour": engine.flavour,
                "target": target,
                "tools": tool_versions(library, f"{library}_libs"),
            },
            Engine,
            functools.partial(variant.build, target),
        )
        made.append(item)
        report("engine", done(f"{target} {variant.label}, {item.bytes / 1e6:.1f} MB", hit))
    manifest = _rank_manifest(built, made, store) if built.spec.generates else None
    return replace(built, engines=tuple(made), ranks=manifest)


def _rank_manifest(built: Build, engines: Sequence[Engine], store: Store) -> RankFiles | None:
    partition = built.partition
    if partition is None:
        return None
    item, _ = store.get_or_build(
        "rank-engines",
        {
            "partition": partition.digest,
            "engines": sorted((engine.file, engine.digest) for engine in engines),
        },
        RankFiles,
        lambda out: rank_engines.write_rank_manifest(partition, engines, out),
    )
    return item


@dataclass(frozen=True)
class _Variant:
    """What an engine is built of, beside its target. `build` takes the target and the folder."""

    label: str
    key: dict[str, Any]
    build: Callable[[str, Path], Engine]


def _variants(built: Build) -> list[_Variant]:
    partition, capacities = built.partition, built.spec.cache_lengths_on("gpu")
    if built.spec.generates and partition is not None:
        places = itertools.product(range(partition.pipeline), range(partition.tensor), capacities)
        return [_of_decoder_rank(built, partition, *place) for place in places]
    if built.spec.generates:
        sources = [_of_source(built, capacities[-1])] if built.checkpoint.task == "seq2seq" else []
        return [*(_of_decoder(built, capacity) for capacity in capacities), *sources]
    if partition is None:
        return [_of_graph(built)]
    ranks = itertools.product(range(partition.pipeline), range(partition.tensor))
    return [_of_rank(built, partition, stage, rank) for stage, rank in ranks]


def _of_graph(built: Build) -> _Variant:
    source, flavour, profiles = built.served_graph, built.spec.engine.flavour, built.spec.engine_profiles

    def build(target: str, out: Path) -> Engine:
        return tensorrt.build_engine(source, flavour, target, profiles, out)

    return _Variant(source.precision, {"graph": source.digest, "profiles": _shapes(profiles)}, build)


def _of_rank(built: Build, partition: Partition, stage: int, rank: int) -> _Variant:
    precision, flavour = built.served_graph.precision, built.spec.engine.flavour
    profiles = built.spec.engine_profiles

    def build(target: str, out: Path) -> Engine:
        place = (stage, rank, precision)
        return tensorrt.build_rank_engine(partition, *place, flavour, target, profiles, out)

    key = {"graph": partition.digest, "rank": (stage, rank), "profiles": _shapes(profiles)}
    return _Variant(f"{precision} stage {stage} rank {rank}", key, build)


def _of_decoder(built: Build, capacity: int) -> _Variant:
    source, flavour, profiles = built.served_graph, built.spec.engine.flavour, _decoder_profiles(built, capacity)

    def build(target: str, out: Path) -> Engine:
        return tensorrt.build_decoder_engine(source, capacity, flavour, target, profiles, out)

    key = {"graph": source.digest, "capacity": capacity, "profiles": _shapes(profiles)}
    return _Variant(f"{source.precision}, cache of {capacity}", key, build)


def _of_decoder_rank(built: Build, partition: Partition, stage: int, rank: int, capacity: int) -> _Variant:
    precision, flavour = built.served_graph.precision, built.spec.engine.flavour
    profiles = _decoder_profiles(built, capacity)

    def build(target: str, out: Path) -> Engine:
        place = (stage, rank, capacity, precision)
        return tensorrt.build_decoder_rank_engine(partition, *place, flavour, target, profiles, out)

    key = {"graph": partition.digest, "rank": (stage, rank), "capacity": capacity, "profiles": _shapes(profiles)}
    return _Variant(f"{precision} stage {stage} rank {rank}, cache of {capacity}", key, build)


def _of_source(built: Build, longest: int) -> _Variant:
    graph, flavour = built.served_graph, built.spec.engine.flavour

    def build(target: str, out: Path) -> Engine:
        return tensorrt.build_source_engine(graph, ENCODER_FILE, longest, flavour, target, out)

    return _Variant(f"{graph.precision}, encoder", {"graph": graph.digest, "longest": longest}, build)


def _decoder_profiles(built: Build, capacity: int) -> tuple[ProfileSlice, ...]:
    chosen = built.spec.generation
    return tensorrt.decoder_profiles(chosen.slots, min(chosen.chunk_tokens, capacity))


def _shapes(profiles: Sequence[ProfileSlice]) -> list[dict[str, Any]]:
    return [profile.model_dump() for profile in profiles]
