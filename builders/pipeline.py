"""The whole way, as one fold: it reads like the diagram in the README. The only importer of all stages."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from platform import machine
from typing import Literal

from builders import corpus, graph, quality
from builders.artifacts import (
    Checkpoint,
    Engine,
    OnnxGraph,
    Partition,
    Quality,
    RankFiles,
    RepositoryEntry,
    ServedQuality,
)
from builders.checkpoint import load_checkpoint
from builders.engine import tensorrt
from builders.export import encoder
from builders.partition import served as served_ranks
from builders.partition.shard import partition_graph
from builders.partition.verify import verify_partition
from builders.quality import HELD_OUT_TEXTS
from builders.quantize import int8, smoothquant
from builders.repository import config, layout
from builders.spec import DeploymentSpec, Platform
from builders.store import Store, folder_digest, source_digest, tool_versions
from runtime import batching, tokenizer
from runtime import encoder as serving_encoder
from runtime.executor import onnxruntime, openvino, ranks

Stage = Literal["checkpoint", "export", "quantize", "partition", "qualify", "engine", "repository"]
Report = Callable[[Stage, str], None]
_RUNTIME = (batching, tokenizer, serving_encoder, onnxruntime, openvino, ranks)  # what computes the checked figures
_PARTITION_SAMPLES = 4  # real texts that a partition is proven with, beside random inputs


@dataclass(frozen=True)
class Build:
    """What a build has come to so far; later fields are None or empty when it stopped earlier."""

    spec: DeploymentSpec
    platform: Platform
    checkpoint: Checkpoint
    graphs: tuple[OnnxGraph, ...] = ()
    partition: Partition | None = None
    ranks: RankFiles | None = None
    served: Quality | None = None
    engines: tuple[Engine, ...] = ()
    entry: RepositoryEntry | None = None

    def graph(self, precision: str) -> OnnxGraph:
        return next(item for item in self.graphs if item.precision == precision)

    @property
    def served_graph(self) -> OnnxGraph:
        """The graph that the platform runs or builds from."""
        wanted = self.spec.precision_on(self.platform)
        return self.graph("fp32" if wanted == "bf16" else wanted)


def build(
    spec: DeploymentSpec, platform: Platform, root: Path, until: Stage, report: Report = lambda stage, message: None
) -> Build:
    """Checkpoint -> export -> quantise -> partition (several ranks) -> qualify (CPU) or engine (GPU) -> repository.

    Each comes from the store if it is there.

    Raises the errors of `builders.errors`; whatever happens, no stage leaves anything half-written.
    """
    if platform == "gpu":
        tensorrt.require_tensorrt(spec.engine.flavour)
        if spec.parallel.ranks > 1 and until == "repository":
            config.require_rank_backend(spec)
    store = Store(root / "store")
    result = Build(spec, platform, load_checkpoint(spec.model))
    report("checkpoint", f"{result.checkpoint.architecture}, {result.checkpoint.parameters / 1e6:.1f} M parameters")
    steps: dict[Stage, Callable[[Build, Store, Report], Build]] = {
        "export": _export,
        "quantize": _quantize,
        "partition": _partition,
        "qualify": _qualify,
        "engine": _engines,
        "repository": lambda built, _, report: _repository(built, root, report),
    }
    for stage, step in steps.items():
        if until == "checkpoint":
            break
        result = step(result, store, report)
        if stage == until:
            break
    return result


def _wanted_precisions(built: Build) -> tuple[str, ...]:
    """fp32 is always there, as the reference. INT8 starts from fp16, so that both worlds share one small graph."""
    wanted = built.spec.precision_on(built.platform)
    return ("fp32",) if wanted in ("fp32", "bf16") else ("fp32", "fp16")


def _export(built: Build, store: Store, report: Report) -> Build:
    checkpoint, texts_file = built.checkpoint, built.spec.precision.calibration_texts
    graphs = []
    for precision in _wanted_precisions(built):
        report("export", f"{precision}")
        item, hit = store.get_or_build(
            "export",
            {
                "checkpoint": checkpoint.model_dump(mode="json", exclude={"source"}),
                "precision": precision,
                "texts": corpus.corpus_key(texts_file),
                "tools": tool_versions("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime"),
                "code": source_digest(encoder, graph, quality),
            },
            OnnxGraph,
            lambda out, precision=precision: encoder.export_encoder(  # type: ignore[misc]
                checkpoint, precision, corpus.texts(texts_file, HELD_OUT_TEXTS), out
            ),
        )
        graphs.append(item)
        report("export", _done(f"{precision}, {item.bytes / 1e6:.1f} MB", hit))
    return replace(built, graphs=tuple(graphs))


def _quantize(built: Build, store: Store, report: Report) -> Build:
    if built.spec.precision_on(built.platform) != "int8":
        return built
    budget, checkpoint = built.spec.precision, built.checkpoint
    source, reference = built.graph("fp16"), built.graph("fp32")

    def run(out: Path) -> OnnxGraph:
        calibration, held_out = quality.calibration_and_held_out(budget)
        return int8.quantize_int8(
            source, reference, checkpoint, budget, calibration, held_out, out, lambda text: report("quantize", text)
        )

    report("quantize", "int8")
    item, hit = store.get_or_build(
        "quantize",
        {
            "graph": source.digest,
            "reference": reference.digest,
            "checkpoint": checkpoint.digest,
            "budget": budget.model_dump(mode="json", exclude={"cpu", "gpu", "calibration_texts"}),
            "texts": corpus.corpus_key(budget.calibration_texts),
            "tools": tool_versions("onnx", "onnx-ir", "onnxruntime", "tokenizers"),
            "code": source_digest(int8, smoothquant, graph, quality, corpus, *_RUNTIME),
        },
        OnnxGraph,
        run,
    )
    report("quantize", _done(f"int8, {item.bytes / 1e6:.1f} MB, {item.quality.summary}", hit))
    return replace(built, graphs=(*built.graphs, item))


def _partition(built: Build, store: Store, report: Report) -> Build:
    """Shares the graph out, and keeps the result only when rank processes have computed what the whole graph does."""
    parallel, source, checkpoint = built.spec.parallel, built.served_graph, built.checkpoint
    if parallel.ranks == 1:
        return built
    texts_file = built.spec.precision.calibration_texts

    def run(out: Path) -> Partition:
        found = partition_graph(source.file_path, parallel.tensor, parallel.pipeline, out)
        report("partition", f"{parallel.ranks} rank processes against the whole graph")
        samples = quality.sample_requests(checkpoint, corpus.texts(texts_file, _PARTITION_SAMPLES))
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
            "ranks", {"partition": item.digest, **code}, RankFiles, lambda out: served_ranks.write_rank_files(item, out)
        )
    megabytes, ideal = item.rank_bytes / 1e6, item.ideal_bytes / 1e6
    report("partition", _done(f"proven equal; {megabytes:.1f} MB a rank at most, ideal {ideal:.1f}", hit))
    return replace(built, partition=item, ranks=rank_files)


def _qualify(built: Build, store: Store, report: Report) -> Build:
    """Runs the graph with the executor and the arithmetic that will serve it, on this CPU, against fp32."""
    if built.platform != "cpu":
        return built
    budget, checkpoint, served = built.spec.precision, built.checkpoint, built.served_graph
    part = built.ranks or served
    settings = layout.encoder_settings(built.spec, "cpu", [part])
    files = {target: part.path(name) for target, name in settings.files.items()}

    def run(out: Path) -> ServedQuality:
        _, held_out = quality.calibration_and_held_out(budget)
        requests = quality.sample_requests(checkpoint, held_out)
        outputs = quality.served_outputs(settings, files, requests)
        reference = quality.graph_outputs(built.graph("fp32").file_path, requests, checkpoint)
        measured = quality.measure(reference, outputs.values, checkpoint.task, outputs.executor)
        quality.require_budget(measured, budget, f"{budget.cpu} service of {checkpoint.source}")
        return ServedQuality(directory=out, files=(), quality=measured)

    report("qualify", f"{budget.cpu} on {built.spec.serving.executor}")
    item, hit = store.get_or_build(
        "qualify",
        {
            "served": part.digest,
            "reference": built.graph("fp32").digest,
            "checkpoint": checkpoint.digest,
            "processor": _processor(),
            "budget": budget.model_dump(mode="json", exclude={"gpu", "calibration_texts"}),
            "settings": settings.model_dump(mode="json"),
            "texts": corpus.corpus_key(budget.calibration_texts),
            "tools": tool_versions("openvino", "onnxruntime", "tokenizers"),
            "code": source_digest(quality, corpus, *_RUNTIME),
        },
        ServedQuality,
        run,
    )
    report("qualify", _done(item.quality.summary, hit))
    return replace(built, served=item.quality)


def _processor() -> str:
    """What the arithmetic of the CPU executor depends on: a build folder may move to another machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    flags = next((line for line in lines if line.startswith("flags")), "")
    wide = sorted(flag for flag in flags.split() if flag.startswith(("avx", "amx")))
    return " ".join([machine(), *wide])


def _engines(built: Build, store: Store, report: Report) -> Build:
    """One engine for each target, and of a partition for each rank."""
    if built.platform != "gpu":
        return built
    engine, source, partition = built.spec.engine, built.served_graph, built.partition
    ranks: Sequence[tuple[int, int]] = [(0, 0)]
    if partition is not None:
        ranks = [(stage, rank) for stage in range(partition.pipeline) for rank in range(partition.tensor)]
    engines = []
    for target, (stage, rank) in itertools.product(engine.targets, ranks):
        name = target if partition is None else f"{target} stage {stage} rank {rank}"
        report("engine", f"{engine.flavour} {name} {source.precision}")

        def run(out: Path, target: str = target, stage: int = stage, rank: int = rank) -> Engine:
            options = (engine.flavour, target, engine.profiles, out)
            if partition is None:
                return tensorrt.build_engine(source, *options)
            return tensorrt.build_rank_engine(partition, stage, rank, source.precision, *options)

        item, hit = store.get_or_build(
            "engine",
            {
                "graph": source.digest if partition is None else partition.digest,
                "rank": (stage, rank),
                "flavour": engine.flavour,
                "target": target,
                "profiles": [profile.model_dump() for profile in engine.profiles],
                "tools": tool_versions(engine.flavour, "polygraphy"),
                "code": source_digest(tensorrt),
            },
            Engine,
            run,
        )
        engines.append(item)
        report("engine", _done(f"{name} {item.precision}, {item.bytes / 1e6:.1f} MB", hit))
    return replace(built, engines=tuple(engines))


def _repository(built: Build, root: Path, report: Report) -> Build:
    parts = built.engines if built.platform == "gpu" else (built.ranks or built.served_graph,)
    folder = repository_path(root, built.spec, built.platform)
    report("repository", str(folder))
    stages = built.partition.stages if built.partition is not None else ()
    entry, unchanged = layout.publish(built.spec, built.platform, built.checkpoint, parts, folder, stages)
    report("repository", _done(f"{entry.ensemble} version {entry.version}", unchanged))
    return replace(built, entry=entry)


def repository_path(root: Path, spec: DeploymentSpec, platform: Platform) -> Path:
    return root / spec.name / platform / "model_repository"


def _done(text: str, hit: bool) -> str:
    return f"{text} (unchanged)" if hit else text
