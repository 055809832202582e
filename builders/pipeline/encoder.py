"""Encoders: checkpoint -> graphs -> INT8 -> the figures of the very service."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from builders.artifacts import OnnxGraph, ServedQuality
from builders.export import encoder
from builders.judging import corpus, vectors
from builders.judging.vectors import HELD_OUT_TEXTS
from builders.pipeline import qat
from builders.pipeline.result import Build, Report, done
from builders.quantize import encoder_weights, int8
from builders.quantize.forms import FORMS
from builders.repository import directories
from builders.store.closure import tool_versions
from builders.store.processor import this_processor
from builders.store.store import Store


def export(built: Build, store: Store, report: Report) -> Build:
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
                "tools": tool_versions("onnxscript"),  # which torch.onnx imports for us
            },
            OnnxGraph,
            lambda out, precision=precision: encoder.export_encoder(  # type: ignore[misc]
                checkpoint, precision, corpus.texts(texts_file, HELD_OUT_TEXTS), out
            ),
        )
        graphs.append(item)
        report("export", done(f"{precision}, {item.bytes / 1e6:.1f} MB", hit))
    return replace(built, graphs=tuple(graphs))


def _wanted_precisions(built: Build) -> tuple[str, ...]:
    """fp32 is always there, as the reference. INT8 starts from fp16, so that both worlds share one small graph; dynamic
    INT8 from fp32, the only type that its operator reads."""
    wanted = built.spec.precision_on(built.platform)
    return ("fp32", "fp16") if wanted in ("fp16", "int8", "fp8") else ("fp32",)


def quantize(built: Build, store: Store, report: Report) -> Build:
    wanted = built.spec.precision_on(built.platform)
    if wanted in ("w8", "w4"):
        return _weights_alone(built, wanted, store, report)
    form = FORMS.get(wanted)
    if form is None:
        return built
    budget, checkpoint = built.spec.precision, built.checkpoint
    source, reference = built.graph(form.source), built.graph("fp32")
    trained = budget.qat if form.precision == "int8" else None
    if trained is not None:
        qat.require_trainable(checkpoint)

    def run(out: Path) -> OnnxGraph:
        calibration, held_out = vectors.calibration_and_held_out(budget)
        return int8.quantize_linears(
            source,
            reference,
            checkpoint,
            budget,
            calibration,
            held_out,
            out,
            lambda text: report("quantize", text),
            form,
        )

    report("quantize", form.precision)
    item, hit = store.get_or_build(
        "quantize",
        {
            "form": form.precision,
            "graph": source.digest,
            "reference": reference.digest,
            "checkpoint": checkpoint.digest,
            "budget": budget.model_dump(mode="json", exclude={"cpu", "gpu", "calibration_texts", "qat"}),
            "texts": corpus.corpus_key(budget.calibration_texts),
        },
        OnnxGraph,
        run,
    )
    report("quantize", done(f"{form.precision}, {item.bytes / 1e6:.1f} MB, {item.judged}", hit))
    if trained is not None:
        item = qat.trained(built, item, trained, store, report)
    return replace(built, graphs=(*built.graphs, item))


def _weights_alone(built: Build, wanted: Literal["w8", "w4"], store: Store, report: Report) -> Build:
    budget, checkpoint, reference = built.spec.precision, built.checkpoint, built.graph("fp32")
    ranks = built.spec.parallel.tensor
    trained = budget.qat if wanted == "w4" else None
    if trained is not None:
        qat.require_trainable(checkpoint)
        # Training knows the graph's products by the model's weights, which AWQ scales.
        budget = budget.model_copy(update={"rounding": "gptq" if budget.rounding == "auto" else budget.rounding})

    def run(out: Path) -> OnnxGraph:
        calibration, held_out = vectors.calibration_and_held_out(budget)
        return encoder_weights.quantize_encoder_weights(
            reference, checkpoint, wanted, budget, calibration, held_out, out,
            lambda text: report("quantize", f"{wanted}: {text}"), ranks,
        )  # fmt: skip

    report("quantize", wanted)
    item, hit = store.get_or_build(
        "quantize",
        {
            "reference": reference.digest,
            "checkpoint": checkpoint.digest,
            "scheme": wanted,
            "ranks": ranks,
            "budget": budget.model_dump(mode="json", exclude={"cpu", "gpu", "calibration_texts", "qat"}),
            "texts": corpus.corpus_key(budget.calibration_texts),
        },
        OnnxGraph,
        run,
    )
    report("quantize", done(f"{wanted}, {item.bytes / 1e6:.1f} MB, {item.judged}", hit))
    if trained is not None:
        item = qat.trained(built, item, trained, store, report)
    return replace(built, graphs=(*built.graphs, item))


def qualify(built: Build, store: Store, report: Report) -> Build:
    """Runs the graph with the executor and the arithmetic that will serve it, on this CPU, against fp32."""
    if built.platform != "cpu":
        return built
    budget, checkpoint, served = built.spec.precision, built.checkpoint, built.served_graph
    part = built.ranks or served
    settings = directories.encoder_settings(built.spec, "cpu", [part])
    files = {target: part.path(name) for target, name in settings.files.items()}

    def run(out: Path) -> ServedQuality:
        _, held_out = vectors.calibration_and_held_out(budget)
        requests = vectors.sample_requests(checkpoint, held_out)
        outputs = vectors.served_outputs(settings, files, requests)
        reference = vectors.graph_outputs(built.graph("fp32").file_path, requests, checkpoint)
        measured = vectors.measure(reference, outputs.values, checkpoint.task, outputs.executor)
        vectors.require_budget(measured, budget, f"{budget.cpu} service of {checkpoint.source}")
        return ServedQuality(directory=out, files=(), quality=measured)

    report("qualify", f"{budget.cpu} on {built.spec.cpu_executor}")
    item, hit = store.get_or_build(
        "qualify",
        {
            "served": part.digest,
            "reference": built.graph("fp32").digest,
            "checkpoint": checkpoint.digest,
            "processor": this_processor().model_dump(mode="json"),
            "budget": budget.model_dump(mode="json", exclude={"gpu", "calibration_texts"}),
            "settings": settings.model_dump(mode="json"),
            "texts": corpus.corpus_key(budget.calibration_texts),
        },
        ServedQuality,
        run,
    )
    report("qualify", done(item.quality.summary, hit))
    return replace(built, served=item.quality)
