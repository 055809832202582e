"""A graph after post-training quantisation -> the same graph, trained towards the model in fp32."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from builders.artifacts import Checkpoint, OnnxGraph, Quality
from builders.compress.distil import PAGE, Teaching, distil
from builders.compress.importance import Forward
from builders.compress.judged import by_text
from builders.compress.texts import CalibrationText, batches
from builders.errors import ParityError, QualityError
from builders.graph import GRAPH_FILE, record_graph, require_standard
from builders.judging.vectors import graph_outputs, measure, require_budget, sample_requests
from builders.qat.graph import read_graph, replace_constants
from builders.qat.model import RoundedModel
from builders.spec import DistilSlice, PrecisionSlice, QatSlice

if TYPE_CHECKING:
    from pathlib import Path

    from runtime.graph import Tensors

_GPTQ_TOKENS = 24_000  # with 1,000, GPTQ fits these, and others come out worse than by rounding to the nearest
_EMA = 0.97  # decay: each step's gradient is mostly noise of rounding
_CHECKED = 32  # texts on which the graph is compared with the model that was trained
# Of what rounding costs: the graph is in fp16 and the training was not, so that some values are rounded to the other
# side, and each is an error as large as rounding makes. MiniLM: 0.4.
_MOST_OFF = 2.0
_ROOM = 1e-5  # and as much as fp16 may cost where rounding costs next to nothing


_RATES = {"int8": 3e-5, "w4": 1e-4}


def as_training(asked: QatSlice, precision: str) -> DistilSlice:
    """Towards the model itself, on its own outputs, with an average of the weights as the result."""
    return DistilSlice(
        minutes=asked.minutes,
        tokens=asked.tokens,
        text_tokens=asked.text_tokens,
        batch_tokens=asked.batch_tokens,
        learning_rate=asked.learning_rate or _RATES[precision],
        optimiser="adamw",
        ema=_EMA,
        seed=asked.seed,
    )


def train_rounded(
    graph: OnnxGraph,
    reference: OnnxGraph,
    checkpoint: Checkpoint,
    models: tuple[Any, Callable[[Any], Forward]],
    asked: DistilSlice,
    budget: PrecisionSlice,
    teaching: Teaching,
    held_out_texts: Sequence[str],
    out: Path,
) -> OnnxGraph:
    """Writes `graph` with other numbers into `out`, and a page with the loss curve beside it.

    `models`: one of the checkpoint, which is changed, and the whole way to a model's outputs. Raises DivergedError
    where training made nothing better, ParityError where the graph computes something else than was trained, and
    QualityError where it misses the budget, or is no nearer to `reference` than `graph`.
    """
    model, as_forward = models
    changed, texts = RoundedModel(model, read_graph(graph.file_path)), CalibrationText(checkpoint, budget)
    changed.round_by_gptq(teaching.model, teaching.forward, batches(texts.requests(_GPTQ_TOKENS, 1)))
    distil(asked, model, as_forward, checkpoint, texts, teaching)
    file = out / GRAPH_FILE
    replace_constants(graph.file_path, changed.arrays(), file)
    require_standard(file)
    held_out = sample_requests(checkpoint, held_out_texts)
    expected, found = (graph_outputs(each, held_out, checkpoint) for each in (reference.file_path, file))
    _require_same(as_forward(model), held_out[:_CHECKED], found[:_CHECKED], expected[:_CHECKED], checkpoint)
    quality = measure(expected, found, checkpoint.task, "ONNX Runtime")
    require_budget(quality, budget, f"trained {graph.precision} graph of {checkpoint.source}")
    _require_nearer(graph, quality)
    record = record_graph(out, graph.precision, quality, graph.digest)
    shutil.copyfile(teaching.scratch / PAGE, out / "qat.html")  # beside the graph, and no part of it
    return record


def _require_nearer(graph: OnnxGraph, trained: Quality) -> None:
    """What is trained for may come nearer while the outputs do not."""
    before = graph.quality
    assert isinstance(before, Quality)
    if not trained.mean_cosine > before.mean_cosine:
        raise QualityError(
            f"precision.qat made the {graph.precision} graph no better: on {trained.texts} held-out texts its mean "
            f"cosine was {before.mean_cosine:.5f} and is {trained.mean_cosine:.5f}; lower precision.qat.learning_rate, "
            "train longer, or remove precision.qat"
        )


def _require_same(
    forward: Forward, requests: Sequence[Tensors], found: Any, expected: Any, checkpoint: Checkpoint
) -> None:
    """What was trained is what was written."""
    import torch

    with torch.no_grad():
        trained = np.concatenate(
            [forward(**{name: torch.from_numpy(array) for name, array in each.items()}).numpy() for each in requests]
        )
    off, cost = (1 - float(np.mean(by_text(trained, other))) for other in (found, expected))
    if not off <= _MOST_OFF * cost + _ROOM:  # a graph that is not what was trained is far from both
        raise ParityError(
            f"trained graph of {checkpoint.source}: its outputs are {off:.2e} away from those of the model that "
            f"was trained, which is {cost:.2e} away from fp32; the graph is not used"
        )
