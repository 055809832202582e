"""Encoders: fp32 graph -> weights of its products in 8 or 4 bits, as those of language models are.

An encoder reads its weights once for all tokens of a batch, so fewer bytes make files smaller and seldom an answer
faster. Most of its products stand behind norms that a residual sum reads too, where AWQ has no place for factors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from builders.artifacts import Checkpoint, OnnxGraph
from builders.graph import GRAPH_FILE, record_graph
from builders.judging.vectors import graph_outputs, measure, require_budget, sample_requests
from builders.quantize.linears import activations
from builders.quantize.rounding import JUDGED, to_round_by
from builders.quantize.scales import Floats
from builders.quantize.weight_only import Progress, WeightWriter, choose, form_of
from builders.spec import PrecisionSlice
from runtime.graph import Tensors


class _Encoder:
    """By the texts of `requests`; `reference` is the fp32 graph."""

    def __init__(self, reference: Path, checkpoint: Checkpoint, requests: Sequence[Tensors]) -> None:
        self._checkpoint, self._seen, self._judged = checkpoint, to_round_by(requests), requests[::JUDGED]
        self._expected = self.outputs(reference)

    def hessians(self, file: Path, names: Collection[str]) -> dict[str, Floats]:
        found: dict[str, Floats] = {}
        for name, tokens in activations(file, names, self._seen):
            product: Floats = tokens.T @ tokens
            found[name] = found[name] + product if name in found else product
        return found

    def loss(self, file: Path) -> float:
        quality = measure(self._expected, self.outputs(file), self._checkpoint.task, "ONNX Runtime")
        return 1 - quality.mean_cosine if quality.logit_error is None else quality.logit_error

    def outputs(self, file: Path) -> Floats:
        return graph_outputs(file, self._judged, self._checkpoint)


def quantize_encoder_weights(
    reference: OnnxGraph,
    checkpoint: Checkpoint,
    precision: Literal["w8", "w4"],
    budget: PrecisionSlice,
    calibration_texts: Sequence[str],
    held_out_texts: Sequence[str],
    out: Path,
    progress: Progress = lambda message: None,
    ranks: int = 1,
) -> OnnxGraph:
    """Writes `reference` with quantised weights into `out`; `ranks` will share every product.

    Raises QualityError over the budget on the held-out texts; UnsupportedError when there is too little to quantise.
    """
    source, file = reference.file_path, out / GRAPH_FILE
    subject = _Encoder(source, checkpoint, sample_requests(checkpoint, calibration_texts))
    with tempfile.TemporaryDirectory(prefix="trireme-weights-") as work:
        writer = WeightWriter(source, source, subject, Path(work), ranks, progress)
        recipe, chosen = choose(writer, 8 if precision == "w8" else 4, budget.rounding, file, form_of(budget))
        writer.write(recipe, file)
    held_out = sample_requests(checkpoint, held_out_texts)
    expected = graph_outputs(source, held_out, checkpoint)
    quality = measure(expected, graph_outputs(file, held_out, checkpoint), checkpoint.task, "ONNX Runtime")
    require_budget(quality, budget, f"{precision} graph of {checkpoint.source}")
    return record_graph(out, precision, quality, reference.digest).model_copy(update={"rounding": chosen})
