"""The baseline without layers, as a graph that is judged and timed as any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from builders.artifacts import OnnxGraph
from builders.compress.judged import outputs
from builders.compress.static import TOKENS, as_encoder, token_vectors
from builders.compress.texts import CalibrationText
from builders.export.encoder import graph_module, write_graph
from builders.export.sentence import head_modules
from builders.export.weights import load_encoder
from builders.graph import GRAPH_FILE, record_graph, require_standard
from builders.judging import corpus, vectors
from builders.pipeline.result import Build, Report
from builders.store.store import Store


def export(built: Build, store: Store, report: Report) -> Build:
    """`built` with the graph of its checkpoint's static form in place of its own."""
    checkpoint = built.checkpoint.model_copy(update={"pooling": "mean"})
    precision = built.spec.precision

    def run(out: Path) -> OnnxGraph:
        import torch

        texts, head = CalibrationText(checkpoint, precision), head_modules(checkpoint)
        model = load_encoder(checkpoint)
        batches = texts.batches(TOKENS, "of the static baseline")
        module = as_encoder(token_vectors(model, batches), model.config)
        write_graph(module, head, checkpoint, "fp32", out / GRAPH_FILE)
        require_standard(out / GRAPH_FILE)
        _, held_out = vectors.calibration_and_held_out(precision)
        requests = vectors.sample_requests(checkpoint, held_out)
        rows = [{key: torch.from_numpy(value) for key, value in each.items()} for each in requests]
        wanted = outputs(graph_module(module, head, checkpoint), rows)
        found = vectors.graph_outputs(out / GRAPH_FILE, requests, checkpoint)
        quality = vectors.measure(wanted, found, checkpoint.task, "ONNX Runtime")
        return record_graph(out, "fp32", quality, checkpoint.digest)

    report("compress", "static: token vectors from calibration text")
    item, _ = store.get_or_build(
        "static",
        {
            "checkpoint": checkpoint.model_dump(mode="json", exclude={"source"}),
            "texts": corpus.corpus_key(precision.calibration_texts),
            "left out": precision.calibration_samples,
        },
        OnnxGraph,
        run,
    )
    return replace(built, checkpoint=checkpoint, graphs=(item,))
