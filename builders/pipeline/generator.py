"""Language models: checkpoint -> graph with caches -> weights in 8 or 4 bits -> the CPU service, each within the
perplexity budget. Engines are not judged: that takes the GPU they are for.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from builders.artifacts import GenerationQuality, OnnxGraph, ServedQuality
from builders.export import decoder, seq2seq
from builders.judging import corpus, perplexity, vectors
from builders.pipeline.result import Build, Report, done
from builders.quantize import weight_only
from builders.repository import directories
from builders.store.closure import tool_versions
from builders.store.processor import this_processor
from builders.store.store import Store
from runtime.generation.opening import open_executor
from runtime.settings import GeneratorModelSettings, ServedModel


def export(built: Build, store: Store, report: Report) -> Build:
    """fp32 always, as the reference; the GPU's graphs start from fp16."""
    checkpoint, texts_file = built.checkpoint, built.spec.precision.calibration_texts
    write = seq2seq.export_seq2seq if checkpoint.task == "seq2seq" else decoder.export_decoder
    graphs = []
    for precision in ("fp32", "fp16") if built.platform == "gpu" else ("fp32",):
        report("export", precision)

        def run(out: Path, precision: str = precision) -> OnnxGraph:
            _, held_out = vectors.calibration_and_held_out(built.spec.precision)
            return write(checkpoint, precision, held_out, out)  # type: ignore[arg-type]  # one of the two above

        item, hit = store.get_or_build(
            "export",
            {
                "checkpoint": checkpoint.model_dump(mode="json", exclude={"source"}),
                "precision": precision,
                "texts": corpus.corpus_key(texts_file),
                "samples": built.spec.precision.calibration_samples,
                "processor": this_processor().model_dump(mode="json"),  # perplexities are measured on it
                "tools": tool_versions("onnxscript"),  # which torch.onnx imports for us
            },
            OnnxGraph,
            run,
        )
        graphs.append(item)
        report("export", done(f"{precision}, {item.bytes / 1e6:.1f} MB, {item.quality.summary}", hit))
    return replace(built, graphs=tuple(graphs))


def quantize(built: Build, store: Store, report: Report) -> Build:
    """Weights alone; what the products compute in stays that of the graph: fp32 on CPU, fp16 on a GPU."""
    wanted = built.spec.precision_on(built.platform)
    if wanted not in ("w8", "w4"):
        return built
    budget, checkpoint = built.spec.precision, built.checkpoint
    source, reference = built.graphs[-1], built.graph("fp32")
    ranks = built.spec.parallel.tensor

    def run(out: Path) -> OnnxGraph:
        calibration, held_out = vectors.calibration_and_held_out(budget)
        ratio, progress = budget.max_perplexity_ratio, lambda text: report("quantize", f"{wanted}: {text}")
        return weight_only.quantize_weights(
            source, reference, checkpoint, wanted, ratio, calibration, held_out, out, progress, ranks, budget.rounding,
            weight_only.form_of(budget),
        )  # fmt: skip

    report("quantize", wanted)
    item, hit = store.get_or_build(
        "quantize",
        {
            "graph": source.digest,
            "reference": reference.digest,
            "checkpoint": checkpoint.digest,
            "scheme": wanted,
            "ranks": ranks,
            "ratio": budget.max_perplexity_ratio,
            "rounding": [budget.rounding, budget.blocks, budget.ranges],
            "samples": budget.calibration_samples,
            "texts": corpus.corpus_key(budget.calibration_texts),
            "processor": this_processor().model_dump(mode="json"),
        },
        OnnxGraph,
        run,
    )
    report("quantize", done(f"{wanted}, {item.bytes / 1e6:.1f} MB, {item.judged}", hit))
    return replace(built, graphs=(*built.graphs, item))


def service_settings(built: Build) -> GeneratorModelSettings:
    """What the CPU service of this build is told, before it has a version."""
    spec, part = built.spec, built.ranks or built.served_graph
    served = ServedModel(
        ensemble=spec.name, version=1, precision=spec.precision.cpu, model_digest=part.digest, spec_digest=spec.digest
    )
    return directories.generator_settings(spec, "cpu", built.checkpoint, [part], built.partition, served)


def qualify(built: Build, store: Store, report: Report) -> Build:
    """Judges the graph once more, by the executor that serves it on this CPU, where that is not plain ONNX Runtime."""
    spec, checkpoint, reference = built.spec, built.checkpoint, built.graph("fp32")
    part = built.ranks or built.served_graph
    if built.platform != "cpu":
        return built
    settings = service_settings(built)
    if settings.executor == "onnxruntime":
        return built  # it judged the graph where that was made

    tools = tool_versions("openvino" if settings.executor == "openvino" else "onnxruntime")

    def run(out: Path) -> ServedQuality:
        _, held_out = vectors.calibration_and_held_out(spec.precision)
        rows = perplexity.token_rows(checkpoint, held_out)
        files = {key: part.path(name) for key, name in settings.files.items()}
        executor = open_executor(settings.model_copy(update={"slots": len(rows)}), files)
        try:
            found = perplexity.executor_perplexity(executor, settings.capacities, rows)
        finally:
            executor.close()
        assert isinstance(reference.quality, GenerationQuality)
        measured = GenerationQuality(
            perplexity=found,
            reference_perplexity=reference.quality.perplexity,
            tokens=rows[:, 1:].size,
            executor=f"{settings.executor}, {', '.join(f'{name} {version}' for name, version in tools.items())}",
        )
        what = f"{spec.precision.cpu} service of {checkpoint.source}"
        perplexity.require_perplexity({settings.executor: measured}, spec.precision.max_perplexity_ratio, what)
        return ServedQuality(directory=out, files=(), quality=measured)

    report("qualify", f"{spec.precision.cpu} on {settings.executor}")
    item, hit = store.get_or_build(
        "qualify",
        {
            "served": part.digest,
            "reference": reference.digest,
            "checkpoint": checkpoint.digest,
            "processor": this_processor().model_dump(mode="json"),
            "ratio": spec.precision.max_perplexity_ratio,
            "settings": settings.model_dump(
                mode="json", include={"executor", "files", "threads", "capacities", "rank_cache"}
            ),
            "samples": spec.precision.calibration_samples,
            "texts": corpus.corpus_key(spec.precision.calibration_texts),
        },
        ServedQuality,
        run,
    )
    report("qualify", done(item.quality.summary, hit))
    return replace(built, served=item.quality)
