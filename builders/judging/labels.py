"""Classifiers where labels are given: how often they are right, and whether they know when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builders.judging.intervals import ConfidenceInterval, Indices, of_difference, of_figure, of_mean
from runtime.record import Record

_BINS = 15


class Labelled(Record):
    """Two classifiers on the same labelled texts, each figure with its 95 % interval.

    `calibration_error`: the mean distance between how sure a model is and how often it is right, over bins of texts of
    like confidence (Guo et al. 2017, "On Calibration of Modern Neural Networks"). `agreement`: texts with one answer.
    """

    texts: int
    accuracy: tuple[float, float]
    accuracy_intervals: tuple[ConfidenceInterval, ConfidenceInterval]
    accuracy_difference: ConfidenceInterval
    calibration_error: tuple[float, float]
    calibration_difference: ConfidenceInterval
    agreement: float
    agreement_interval: ConfidenceInterval


def labelled(reference: NDArray[Any], candidate: NDArray[Any], labels: Sequence[int]) -> Labelled:
    """Both are logits [texts, labels]."""
    answers, wanted = [logits.argmax(axis=1) for logits in (reference, candidate)], np.asarray(labels)
    right = [(answer == wanted).astype(np.float64) for answer in answers]
    sure = [_confidence(logits) for logits in (reference, candidate)]
    agree = (answers[0] == answers[1]).astype(np.float64)

    def worse_calibrated(chosen: Indices) -> float:
        before, after = (calibration_error(s[chosen], r[chosen]) for s, r in zip(sure, right, strict=True))
        return after - before

    errors = [calibration_error(s, r) for s, r in zip(sure, right, strict=True)]
    return Labelled(
        texts=len(wanted),
        accuracy=(float(right[0].mean()), float(right[1].mean())),
        accuracy_intervals=(of_mean(right[0]), of_mean(right[1])),
        accuracy_difference=of_difference(*right),
        calibration_error=(errors[0], errors[1]),
        calibration_difference=of_figure(len(wanted), worse_calibrated),
        agreement=float(agree.mean()),
        agreement_interval=of_mean(agree),
    )


def calibration_error(confidence: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """Over bins of equal width, each weighed by its texts."""
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    off = np.zeros(_BINS)
    np.add.at(off, bins, confidence - right)
    return float(np.abs(off).sum() / len(right))


def _confidence(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Softmax of the highest logit. What is not a number is sure of nothing."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    found: NDArray[np.float64] = np.nan_to_num(1 / np.exp(shifted).sum(axis=1), nan=0.0)
    return found
