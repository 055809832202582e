"""One language model beside another on the same tokens: losses, the likeliest next token, and divergence.

Both read the true tokens before each one (teacher forcing), through their caches, as they are served. Tokens of one row
hang together, so intervals draw rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builders.judging.intervals import ConfidenceInterval, Indices, of_figure
from builders.judging.perplexity import Ids

Step = Callable[[int, Ids], NDArray[Any]]  # (place, tokens [rows, 1]) -> logits behind them [rows, vocabulary]
ByRow = NDArray[np.float64]  # [rows], the mean over a row's tokens


@dataclass(frozen=True)
class SideBySide:
    """By row. Losses in nats; `agreement`: the share of tokens for which both find the same one likeliest;
    `divergence`: Kullback-Leibler, of the candidate's next-token probabilities from the reference's, in nats."""

    reference_losses: ByRow
    losses: ByRow
    agreement: ByRow
    divergence: ByRow


def side_by_side(rows: Ids, reference: Step, candidate: Step) -> SideBySide:
    """`rows` [rows, length]; every token but the first is predicted. What is not a number agrees with nothing, and
    its loss is infinite."""
    found: list[list[ByRow]] = [[], [], [], []]
    for at in range(rows.shape[1] - 1):
        ids, targets = np.ascontiguousarray(rows[:, at : at + 1]), rows[:, at + 1 : at + 2]
        wanted, given = (_log_softmax(step(at, ids)) for step in (reference, candidate))
        found[0].append(-np.take_along_axis(wanted, targets, axis=1)[:, 0])
        found[1].append(np.nan_to_num(-np.take_along_axis(given, targets, axis=1)[:, 0], nan=np.inf))
        sound = np.isfinite(given).all(axis=1)
        found[2].append(((wanted.argmax(axis=1) == given.argmax(axis=1)) & sound).astype(np.float64))
        divergence = (np.exp(wanted) * (wanted - given)).sum(axis=1)
        found[3].append(np.where(sound, np.maximum(divergence, 0.0), np.inf))
    return SideBySide(*(np.stack(parts, axis=1).mean(axis=1) for parts in found))


def _log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    shifted: NDArray[np.float64] = values - np.log(np.exp(values).sum(axis=1, keepdims=True))
    return shifted


def perplexity(losses: ByRow) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(losses.mean()))


def perplexity_ratio_interval(reference: ByRow, candidate: ByRow) -> ConfidenceInterval:
    return of_figure(len(reference), lambda some: perplexity(candidate[some] - reference[some]))


def perplexity_difference(reference: ByRow, candidate: ByRow) -> ConfidenceInterval:
    """Of the candidate's less the reference's, on the same draws of rows."""

    def difference(some: Indices) -> float:
        return perplexity(candidate[some]) - perplexity(reference[some])

    return of_figure(len(reference), difference)
