"""Losses that stay are no drift, losses that rise are, and one odd row is neither."""

from __future__ import annotations

import math

import numpy as np
import pytest

from online.loop.drift import ALARM, known, rise, watched
from online.loop.records import DriftState


def test_the_usual_raises_no_alarm_and_a_rise_of_one_spread_does_soon() -> None:
    """Ten thousand rows each, of losses as skewed as exponential ones: false alarms in a few series of a hundred."""
    random = np.random.default_rng(0)
    late, alarms = [], 0
    for _ in range(100):
        quiet = np.cumsum(random.exponential(1.0, 10_000) - 1.0 - 0.3)
        alarms += (quiet - np.minimum(np.minimum.accumulate(quiet), 0)).max() >= ALARM
        state, count = DriftState(), 0
        while rise(state) < ALARM:
            state = watched(state, [2.0 + random.standard_normal()], 1.0, 1.0, 0)
            count += 1
        late.append(count)
    assert alarms <= 4
    assert np.median(late) < 60


@pytest.mark.parametrize("odd", [1e9, math.nan, math.inf])
def test_one_odd_row_is_no_drift(odd: float) -> None:
    assert rise(watched(DriftState(), [odd, *[1.0] * 5], 1.0, 1.0, 7)) < ALARM


def test_it_goes_on_where_it_stood() -> None:
    losses = np.random.default_rng(1).normal(1.5, 1.0, 50)
    whole = watched(DriftState(), losses, *known(np.array([0.0, 1.0, 2.0])), 9)
    half = watched(DriftState(), losses[:20], 1.0, 1.0, 4)
    again = watched(DriftState.model_validate_json(half.model_dump_json()), losses[20:], 1.0, 1.0, 9)
    assert again.model_dump() == pytest.approx(whole.model_dump())
