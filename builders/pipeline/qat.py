"""The quantised graph of an encoder, trained towards the model that it was made of."""

from __future__ import annotations

from pathlib import Path

from builders.artifacts import Checkpoint, OnnxGraph
from builders.checkpoint.widths import FAMILIES
from builders.errors import UnsupportedError
from builders.judging import vectors
from builders.pipeline import teaching
from builders.pipeline.opened import opened
from builders.pipeline.result import Build, Report, done
from builders.qat.train import as_training, train_rounded
from builders.spec import QatSlice
from builders.store.store import Store


def require_trainable(checkpoint: Checkpoint) -> None:
    """Raises UnsupportedError for a model whose layers training does not know."""
    if checkpoint.model_type not in FAMILIES:
        raise UnsupportedError(
            f"precision.qat: checkpoint {checkpoint.source}", got=f"model type {checkpoint.model_type}",
            expected=f"one of {', '.join(FAMILIES)}", fix="remove precision.qat, or use a model of these types",
        )  # fmt: skip


def trained(built: Build, graph: OnnxGraph, asked: QatSlice, store: Store, report: Report) -> OnnxGraph:
    """`graph`, as post-training quantisation left it, with other numbers. It stays in the store, whatever comes of
    this. The teacher is the model in fp32: what `compress` left, where it did anything."""
    checkpoint, budget, reference = built.checkpoint, built.spec.precision, built.graph("fp32")
    training = as_training(asked, graph.precision)
    inputs = {
        "graph": graph.digest,
        "reference": reference.digest,
        "budget": budget.model_dump(mode="json", exclude={"cpu", "gpu", "calibration_texts"}),
        **teaching.inputs(checkpoint, budget, "float32"),
    }

    def run(out: Path) -> OnnxGraph:
        _, held_out = vectors.calibration_and_held_out(budget)
        line = teaching.lines(report, "quantize", "qat")
        with teaching.teaching(checkpoint, training, inputs, store, line, "qat", train_rounded) as lesson:
            return train_rounded(
                graph, reference, checkpoint, opened(checkpoint), training, budget, lesson, held_out, out
            )

    report("quantize", f"{graph.precision}, trained")
    item, hit = store.get_or_build("quantize", inputs, OnnxGraph, run)
    report("quantize", done(f"{graph.precision}, trained, {item.quality.summary}", hit))
    return item
