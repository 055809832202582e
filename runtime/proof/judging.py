"""How far outputs lie from the reference's: the arithmetic of the checks, at build time and where a model serves.

A figure that a kind of model is judged by stands in one place: `encoder_figures` or `generator_figures`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

_SMALLEST = 1e-12  # of a budget, so that a share of it is a number
_LEAST_RMS = 0.05  # rounding of half precision moves log-probabilities by hundredths


@dataclass(frozen=True)
class Figure:
    """One measured value and its bound. `ideal` is what equals give. A value that is not a number is never within."""

    name: str
    value: float
    limit: float
    bound: Literal["least", "most"]
    ideal: float

    @property
    def within(self) -> bool:
        if not math.isfinite(self.value):
            return False
        return self.value >= self.limit if self.bound == "least" else self.value <= self.limit

    @property
    def spent(self) -> float:
        """Share of what the budget allows."""
        if not math.isfinite(self.value):
            return math.inf
        worse = self.ideal - self.value if self.bound == "least" else self.value - self.ideal
        return max(0.0, worse) / max(abs(self.limit - self.ideal), _SMALLEST)

    def __str__(self) -> str:
        return f"{self.name} {self.value:.5f} (at {self.bound} {self.limit:.6g})"


def cosines(reference: NDArray[Any], candidate: NDArray[Any], by_label: bool) -> NDArray[np.float64]:
    """Cosine of each row of two arrays [texts, width].

    `by_label`: of each column instead, centred over the texts, which is Pearson's correlation. A value that is not
    finite anywhere makes all of them 0.
    """
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    if not np.isfinite(b).all():
        return np.zeros(a.shape[1] if by_label else len(a))
    if by_label:
        a, b = (a - a.mean(axis=0)).T, (b - b.mean(axis=0)).T
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    found: NDArray[np.float64] = np.nan_to_num((a * b).sum(axis=1) / np.maximum(norms, 1e-30), nan=0.0)
    return found


def logit_error(reference: NDArray[Any], candidate: NDArray[Any]) -> float:
    """Root mean square difference of the worst label, over the standard deviation of the reference's logits from text
    to text (of all labels together: one that hardly moves decides little)."""
    spread = np.sqrt(np.square(reference - reference.mean(axis=0)).mean())
    errors = np.sqrt(np.square(candidate - reference).mean(axis=0))
    return float(np.nan_to_num(errors, nan=np.inf).max() / max(spread, 1e-6 * np.abs(reference).max(), 1e-30))


@dataclass(frozen=True)
class EncoderBudget:
    """`by_label`: classifiers and rerankers, whose scores are compared label by label over all texts. Correlation is
    blind to a shift and to a scale, so `max_logit_error` bounds them too."""

    min_mean_cosine: float
    min_worst_cosine: float
    by_label: bool
    max_logit_error: float | None = None


def encoder_figures(reference: NDArray[Any], candidate: NDArray[Any], budget: EncoderBudget) -> tuple[Figure, ...]:
    """Both [texts, width]. Another shape is as far away as can be."""
    found, error = np.zeros(1), math.inf
    if reference.shape == candidate.shape:
        found = cosines(reference, candidate, budget.by_label)
        error = logit_error(reference, candidate)
    figures = (
        Figure("mean cosine", float(found.mean()), budget.min_mean_cosine, "least", 1.0),
        Figure("worst cosine", float(found.min()), budget.min_worst_cosine, "least", 1.0),
    )
    if budget.max_logit_error is None:
        return figures
    return (*figures, Figure("logit error", error, budget.max_logit_error, "most", 0.0))


def generator_figures(
    reference: Sequence[float], candidate: Sequence[float], max_perplexity_ratio: float
) -> tuple[Figure, ...]:
    """Of log-probabilities of the same tokens, teacher-forced.

    The ratio of perplexities is the spec's own budget. It is a mean, in which errors of either sign cancel, so the
    differences themselves are bounded too: noise of variance v in log-probabilities costs about v / 2 of
    log-perplexity (the second-order term of the KL divergence), so a budget of r stands for sqrt(2 ln r). Twice that
    is allowed, because real errors have heavier tails than such noise.
    """
    a, b = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
    ratio = rms = math.inf
    if a.shape == b.shape and np.isfinite(b).all():
        ratio = math.exp(min(float((a - b).mean()), 700.0))
        rms = float(np.sqrt(np.square(a - b).mean()))
    most = max(2 * math.sqrt(2 * math.log(max_perplexity_ratio)), _LEAST_RMS)
    return (
        Figure("perplexity ratio", ratio, max_perplexity_ratio, "most", 1.0),
        Figure("log-probability difference", rms, most, "most", 0.0),
    )


def within(figures: Sequence[Figure]) -> bool:
    return all(figure.within for figure in figures)


def spent(figures: Sequence[Figure]) -> float:
    """Share of the budget that is used up, by the figure that uses most; more than 1 is out of budget."""
    return max(figure.spent for figure in figures)


def figures_text(figures: Sequence[Figure]) -> str:
    return ", ".join(map(str, figures))
