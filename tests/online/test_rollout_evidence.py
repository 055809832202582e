"""What is promised of the bets, against arithmetic done in another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online.rollout import evidence
from online.rollout.evidence import Floats
from online.rollout.policy import Metric
from online.rollout.seen import BADNESS

BINARY = BADNESS[Metric.ERRORS]
shares = st.floats(0.01, 0.9)
rates = st.floats(0.0, 0.9)
means = st.lists(st.floats(0, 1), min_size=11, max_size=11).filter(lambda values: sum(values) > 0.1)


def _grown(bet: Floats, chances: Floats) -> Floats:
    """Expected factor of wealth by one request: over its bin and side, whose `chances` sum to one."""
    return np.tensordot(chances, np.exp(bet), 2)


def _one_request(name: str, badness: Floats, share: float, margin: float) -> Floats:
    """Log factors [sides, bins, bets] of one request, by the functions themselves."""
    none, each = np.zeros((len(badness), len(badness))), np.eye(len(badness))
    if name == "harm":
        sides = evidence.harm(badness, each, none, share), evidence.harm(badness, none, each, share)
    else:
        sides = evidence.safety(badness, each, none, share, margin), evidence.safety(badness, none, each, share, margin)
    return np.stack(sides)


@given(share=shares, canary=means, champion=means)
def test_harm_earns_nothing_while_it_is_no_worse(share: float, canary: list[float], champion: list[float]) -> None:
    """Exactly, for any distribution of badness: the expected factor of one request is at most 1."""
    badness = BADNESS[Metric.QUALITY]
    old, new = (np.array(values) / sum(values) for values in (champion, canary))
    if new @ badness > old @ badness:
        old, new = new, old
    chances = np.stack([share * new, (1 - share) * old])
    assert (_grown(_one_request("harm", badness, share, 0), chances) <= 1 + 1e-9).all()


@given(share=shares, canary=means, champion=means, margin=st.floats(0.001, 0.3))
def test_safety_earns_nothing_while_the_canary_is_worse_by_the_margin(
    share: float, canary: list[float], champion: list[float], margin: float
) -> None:
    badness = BADNESS[Metric.QUALITY]
    old, new = (np.array(values) / sum(values) for values in (champion, canary))
    if new @ badness < old @ badness:
        old, new = new, old
    margin = max(min(margin, float(new @ badness - old @ badness)), 1e-6)
    worse = new @ badness - old @ badness >= margin
    chances = np.stack([share * new, (1 - share) * old])
    grown = _grown(_one_request("safety", badness, share, margin), chances)
    assert (grown <= 1 + 1e-9).all() or not worse


@given(values=means, rate=st.floats(0.01, 0.99))
def test_excess_earns_nothing_below_its_rate(values: list[float], rate: float) -> None:
    badness, chances = BADNESS[Metric.QUALITY], np.array(values) / sum(values)
    rate = max(rate, float(chances @ badness))
    grown = chances @ np.exp(evidence.excess(badness, np.eye(11), rate))
    assert (grown <= 1 + 1e-9).all()


@given(share=st.floats(0.01, 0.5), chance=st.floats(0.001, 0.9), kept=st.floats(0, 1))
def test_mirrored_requests_that_fail_together_earn_nothing(share: float, chance: float, kept: float) -> None:
    """A mirrored request is judged as one half of the traffic, though both versions see the same requests: they fail
    together (`kept`), or apart, and wealth is expected to shrink or stay."""
    none, one = np.array([0.0, 0.0]), np.array([0.0, 1.0])
    both = evidence.harm(BINARY, one, one, 0.5)
    only_new, only_old = evidence.harm(BINARY, one, none, 0.5), evidence.harm(BINARY, none, one, 0.5)
    apart = chance * (1 - kept)
    grown = kept * chance * np.exp(both) + apart / 2 * (np.exp(only_new) + np.exp(only_old)) + 1 - kept * chance - apart
    assert (grown <= 1 + 1e-9).all()


def test_harm_is_the_likelihood_ratio_of_failures() -> None:
    """For failures alone: a binomial with the odds against one with the share, by logarithms of each."""
    found = evidence.harm(BINARY, np.array([90.0, 7.0]), np.array([880.0, 3.0]), 0.1)
    odds = 3.0
    theta = odds * 0.1 / (odds * 0.1 + 0.9)
    expected = 7 * math.log(theta / 0.1) + 3 * math.log((1 - theta) / 0.9)
    assert found[list(evidence.ODDS).index(odds)] == pytest.approx(expected)


def test_nothing_seen_is_no_evidence() -> None:
    nothing = np.zeros(2)
    for logs in (evidence.harm(BINARY, nothing, nothing, 0.1), evidence.safety(BINARY, nothing, nothing, 0.1, 0.01)):
        assert evidence.mixed(logs) == 0


def test_failures_of_the_champion_alone_are_no_sign_of_harm() -> None:
    assert evidence.mixed(evidence.harm(BINARY, np.array([500.0, 0.0]), np.array([300.0, 200.0]), 0.5)) < 0


def test_the_mean_of_wealth_bears_any_size() -> None:
    assert evidence.mixed(np.array([2000.0, -2000.0])) == pytest.approx(2000 - math.log(2))
