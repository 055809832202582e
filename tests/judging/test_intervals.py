"""Intervals: how wide they are, how often they hold what is true, and the words that they allow."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from builders.judging import intervals
from builders.judging.intervals import ConfidenceInterval, of_difference, of_figure, of_mean, of_median, of_ratio
from builders.judging.labels import calibration_error, labelled
from builders.judging.retrieval import retrieval, spearman, spearman_interval
from builders.judging.speed import speed_ratios


def test_of_a_mean_is_as_wide_as_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found, half = of_mean(values), 1.96 * values.std() / math.sqrt(400)
    assert found.low == pytest.approx(values.mean() - half, abs=0.05)
    assert found.high == pytest.approx(values.mean() + half, abs=0.05)


def test_what_is_true_lies_inside_about_nineteen_times_in_twenty() -> None:
    source = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        found = of_mean(source.exponential(1.0, 100))
        held += found.low <= 1.0 <= found.high
    assert 175 <= held <= 199


def test_pairs_show_what_two_intervals_apart_hide() -> None:
    """Texts differ far more than the two models: only the paired difference shows which is better."""
    hard = np.random.default_rng(3).normal(0, 1, 300)
    better = hard + 0.05 + np.random.default_rng(4).normal(0, 0.1, 300)
    assert of_mean(hard).high > of_mean(better).low
    assert of_difference(hard, better).against(0) == "better"
    assert of_difference(better, hard).against(0) == "worse"
    assert of_difference(hard, hard).against(0) == "no difference shown"
    found = of_ratio(np.exp(hard), np.exp(hard) * 1.1)
    assert found.low == pytest.approx(1.1)
    assert found.high == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("low", "high", "more", "said"),
    [
        (0.1, 0.3, True, "better"),
        (0.1, 0.3, False, "worse"),
        (-0.3, -0.1, True, "worse"),
        (-0.3, -0.1, False, "better"),
        (-0.1, 0.3, True, "no difference shown"),
        (0.0, 0.3, True, "no difference shown"),
        (math.nan, math.nan, True, "no difference shown"),
    ],
)
def test_a_word_only_where_all_of_it_lies_on_one_side(low: float, high: float, more: bool, said: str) -> None:
    assert ConfidenceInterval(low=low, high=high).against(0.0, more_is_better=more) == said


def test_the_same_each_time() -> None:
    values = [0.1, 0.5, 0.7, 0.2]
    assert of_mean(values) == of_mean(values)
    assert of_figure(4, lambda chosen: float(np.take(values, chosen).mean())) == of_mean(values)


def test_of_a_median_by_rounds() -> None:
    assert of_median([1.2, 1.0, 1.3, 1.1, 1.2, 1.4]) == ConfidenceInterval(low=1.0, high=1.4)
    with pytest.raises(ValueError, match="5 rounds, of 6"):
        of_median([1.0] * 5)
    time = SimpleNamespace(now=0.0)

    def work(seconds: float) -> None:
        time.now += seconds

    ratios = speed_ratios(lambda: work(40), lambda: work(20), intervals.MEDIAN_ROUNDS, lambda: time.now)
    assert ratios == [2.0] * intervals.MEDIAN_ROUNDS  # however long they take


def test_what_is_not_a_number_is_not_found() -> None:
    vectors = np.eye(4, dtype=np.float32)
    assert retrieval(vectors, vectors).mrr == 1
    assert retrieval(np.full((4, 4), np.nan, np.float32), vectors).ranks == (4, 4, 4, 4)
    assert retrieval(vectors * 0, vectors * 0).ranks == (4, 4, 4, 4)


def test_a_text_that_is_drawn_twice_makes_no_pair_with_itself() -> None:
    """Else every draw would hold pairs alike in both, and flatter any model."""
    source = np.random.default_rng(5)
    first, second = (source.normal(size=(40, 8)).astype(np.float32) for _ in range(2))
    found = spearman_interval(first, second)
    assert found.low <= spearman(first, second) <= found.high
    assert -0.3 < found.low < found.high < 0.3
    whole = spearman_interval(first, first)
    assert (whole.low, whole.high) == (pytest.approx(1), pytest.approx(1))


def test_calibration_error_by_hand() -> None:
    sure, right = np.array([0.95, 0.95, 0.55, 0.55]), np.array([1.0, 1.0, 0.0, 1.0])
    assert calibration_error(sure, right) == pytest.approx((2 * 0.05 + abs(1.1 - 1.0)) / 4)
    assert calibration_error(np.ones(3), np.ones(3)) == 0


def test_classifiers_on_labels() -> None:
    source = np.random.default_rng(6)
    labels = source.integers(0, 3, 300).tolist()
    good = np.eye(3)[labels] * 2 + source.normal(size=(300, 3))
    guesses = source.normal(size=(300, 3))
    found = labelled(good, guesses, labels)
    assert found.accuracy[0] > 0.7 > 0.5 > found.accuracy[1]
    assert found.accuracy_difference.against(0) == "worse"
    assert found.agreement == pytest.approx(float((good.argmax(1) == guesses.argmax(1)).mean()))
    same = labelled(good, good, labels)
    assert same.accuracy_difference.against(0) == "no difference shown"
    assert same.agreement == 1
    louder = labelled(good * 2, good * 50, labels)  # twice: as sure as such a distribution allows
    assert louder.accuracy[0] == louder.accuracy[1]
    assert louder.calibration_difference.against(0, more_is_better=False) == "worse"
