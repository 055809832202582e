"""How far a model's outputs lie from the reference, and whether that is within the budget."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builders import corpus
from builders.artifacts import Checkpoint, Quality
from builders.errors import QualityError
from builders.spec import PrecisionSlice, Task
from runtime.encoder import Encoder, open_encoder
from runtime.executor import Tensors
from runtime.executor.onnxruntime import OnnxRuntimeExecutor
from runtime.settings import EncoderModelSettings, TokenizerSettings
from runtime.tokenizer import Tokenizer

HELD_OUT_TEXTS = 128


@dataclass(frozen=True)
class Outputs:
    """[texts, width], and what computed them."""

    values: NDArray[np.float32]
    executor: str


def measure(reference: NDArray[Any], candidate: NDArray[Any], task: Task, executor: str) -> Quality:
    """Compares two outputs of shape [texts, width]; see `Quality` for what is compared.

    A NaN or infinity anywhere gives cosine 0: it must never pass a budget.
    """
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    error = agreement = None
    if task != "embedding":
        error, agreement = _logit_error(a, b), _agreement(a, b)
        a, b = (a - a.mean(axis=0)).T, (b - b.mean(axis=0)).T
    cosines = _cosines(a, b)
    cosines = np.where(np.isfinite(b).all(), cosines, 0.0)
    return Quality(
        mean_cosine=float(cosines.mean()),
        worst_cosine=float(cosines.min()),
        max_abs_difference=float(np.nan_to_num(np.abs(reference - candidate), nan=np.inf).max()),
        texts=len(reference),
        executor=executor,
        logit_error=error,
        agreement=agreement,
    )


def _logit_error(reference: NDArray[np.float64], candidate: NDArray[np.float64]) -> float:
    """Root mean square difference of the worst label, over the standard deviation of the reference's logits from text
    to text (of all labels together: one that hardly moves decides little)."""
    spread = np.sqrt(np.square(reference - reference.mean(axis=0)).mean())
    errors = np.sqrt(np.square(candidate - reference).mean(axis=0))
    return float(np.nan_to_num(errors, nan=np.inf).max() / max(spread, 1e-6 * np.abs(reference).max(), 1e-30))


def _agreement(reference: NDArray[np.float64], candidate: NDArray[np.float64]) -> float:
    """Several labels: texts with the same highest one. One score: pairs of texts in the same order, of those that
    differ at all."""
    if reference.shape[1] > 1:
        return float((reference.argmax(axis=1) == candidate.argmax(axis=1)).mean())
    first, second = np.triu_indices(len(reference), k=1)
    order, found = (np.sign(scores[first, 0] - scores[second, 0]) for scores in (reference, candidate))
    return float((order == found)[order != 0].mean()) if order.any() else 1.0


def _cosines(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: NDArray[np.float64] = np.nan_to_num((a * b).sum(axis=1) / np.maximum(norms, 1e-30), nan=0.0)
    return cosines


def require_budget(quality: Quality, budget: PrecisionSlice, what: str) -> None:
    """Raises QualityError with the figures when `quality` misses the spec's budget."""
    error = quality.logit_error
    near = error is None or error <= budget.max_logit_error
    if near and quality.mean_cosine >= budget.min_mean_cosine and quality.worst_cosine >= budget.min_worst_cosine:
        return
    scores = "" if error is None or quality.agreement is None else (
        f", logits off by {error:.1%} of their spread (budget {budget.max_logit_error:.0%}), "
        f"{quality.agreement:.1%} of the decisions the same"
    )  # fmt: skip
    raise QualityError(
        f"{what} misses the quality budget on {quality.texts} held-out texts ({quality.executor}): "
        f"mean cosine {quality.mean_cosine:.5f} (budget {budget.min_mean_cosine}), "
        f"worst {quality.worst_cosine:.5f} (budget {budget.min_worst_cosine}){scores}. "
        "Choose a wider precision, give calibration_texts closer to your traffic, or lower the budget knowingly"
    )


def calibration_and_held_out(budget: PrecisionSlice) -> tuple[list[str], list[str]]:
    """Texts to calibrate with, and texts to judge with; no text is in both."""
    found = corpus.texts(budget.calibration_texts, budget.calibration_samples + HELD_OUT_TEXTS)
    return found[: budget.calibration_samples], found[budget.calibration_samples :]


def sample_requests(checkpoint: Checkpoint, texts: Sequence[str]) -> list[Tensors]:
    """Graph inputs for each text, tokenised as the service does. A reranker gets pairs of neighbouring texts."""
    tokenizer = Tokenizer(checkpoint.path("tokenizer.json"), tokenizer_settings(checkpoint))
    pairs = [*texts[1:], texts[0]] if checkpoint.task == "reranking" else None
    return [tokenizer.pad([item]) for item in tokenizer.encode(texts, pairs)]


def tokenizer_settings(checkpoint: Checkpoint) -> TokenizerSettings:
    """The same for checks and for the service, so that what is checked is what is served."""
    config = json.loads(checkpoint.path("config.json").read_text())
    prompts = checkpoint.prompts
    return TokenizerSettings(
        max_length=checkpoint.max_length,
        pad_id=int(config.get("pad_token_id") or 0),
        token_type_ids=checkpoint.token_type_ids,
        pair=checkpoint.task == "reranking",
        prompts=prompts.texts if prompts is not None else {},
        prompt_name=prompts.default if prompts is not None else None,
        lower_case=checkpoint.lower_case,
    )


def served_outputs(settings: EncoderModelSettings, files: Mapping[str, Path], requests: Sequence[Tensors]) -> Outputs:
    """The outputs as the service computes them, by the very settings that it is given."""
    with contextlib.closing(open_encoder(settings, files)) as encoder:
        return Outputs(np.concatenate(encoder.run(requests)), encoder.executor.description)


def graph_outputs(file: Path, requests: Sequence[Tensors], checkpoint: Checkpoint) -> NDArray[np.float32]:
    """The graph's outputs by ONNX Runtime, the reference executor: [texts, width]."""
    executor = OnnxRuntimeExecutor(file, threads=os.cpu_count() or 1)
    return np.concatenate(Encoder(executor, 1024, checkpoint.max_length).run(requests))
