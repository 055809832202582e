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

from builders.artifacts import Checkpoint, Quality
from builders.errors import QualityError
from builders.judging import corpus
from builders.spec import PrecisionSlice, Task
from runtime.encoding.encoder import Encoder, open_encoder
from runtime.encoding.executor.onnxruntime import OnnxRuntimeExecutor
from runtime.encoding.tokenizer import Tokenizer
from runtime.graph import Tensors
from runtime.proof.judging import cosines, logit_error
from runtime.settings import EncoderModelSettings, TokenizerSettings

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
    error = agreement = None
    if task != "embedding":
        error, agreement = logit_error(reference, candidate), _agreement(reference, candidate)
    found = cosines(reference, candidate, by_label=task != "embedding")
    return Quality(
        mean_cosine=float(found.mean()),
        worst_cosine=float(found.min()),
        max_abs_difference=float(np.nan_to_num(np.abs(reference - candidate), nan=np.inf).max()),
        texts=len(reference),
        executor=executor,
        logit_error=error,
        agreement=agreement,
    )


def _agreement(reference: NDArray[Any], candidate: NDArray[Any]) -> float:
    """Several labels: texts with the same highest one. One score: pairs of texts in the same order, of those that
    differ at all."""
    if reference.shape[1] > 1:
        return float((reference.argmax(axis=1) == candidate.argmax(axis=1)).mean())
    first, second = np.triu_indices(len(reference), k=1)
    order, found = (np.sign(scores[first, 0] - scores[second, 0]) for scores in (reference, candidate))
    return float((order == found)[order != 0].mean()) if order.any() else 1.0


def within_budget(quality: Quality, budget: PrecisionSlice) -> bool:
    error = quality.logit_error
    near = error is None or error <= budget.max_logit_error
    return near and quality.mean_cosine >= budget.min_mean_cosine and quality.worst_cosine >= budget.min_worst_cosine


def require_budget(quality: Quality, budget: PrecisionSlice, what: str) -> None:
    """Raises QualityError with the figures when `quality` misses the spec's budget."""
    if within_budget(quality, budget):
        return
    error = quality.logit_error
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


def sample_requests(
    checkpoint: Checkpoint, texts: Sequence[str], seconds: Sequence[str] | None = None
) -> list[Tensors]:  # fmt: skip
    """Graph inputs for each text, tokenised as the service does. A reranker gets pairs, of neighbouring texts where no
    `seconds` are given."""
    tokenizer = Tokenizer(checkpoint.path("tokenizer.json"), tokenizer_settings(checkpoint))
    pairs = seconds if seconds is not None else neighbours(checkpoint, texts)
    return [tokenizer.pad([item]) for item in tokenizer.encode(texts, pairs)]


def neighbours(checkpoint: Checkpoint, texts: Sequence[str]) -> list[str] | None:
    """The second texts of a reranker's pairs; None for other models."""
    return [*texts[1:], texts[0]] if checkpoint.task == "reranking" else None


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
