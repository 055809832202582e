"""E-processes: bets against a null hypothesis. Under it, nobody's wealth is expected to grow, at any time.

So the chance that wealth ever reaches 1/alpha is at most alpha (Ville's inequality), however often and whenever it is
looked at; a test of fixed size watched that way breaks its promise. Waudby-Smith and Ramdas, 2024, "Estimating means of
bounded random variables by betting". Each request lands at the canary with probability `share`, whatever it is like:
that coin is all that the comparison rests on, so rates may drift, as long as they drift for both.

All functions return the logarithm of wealth by bet, [..., bets], for counts [..., bins]; a mixture of bets is a bet
too. Wealth of one stage multiplies that of the next: add the logarithms.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ODDS = np.array([1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0])  # of a bad request at the canary against the champion
STAKES = np.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.6, 0.9])  # shares of the most that one may bet


def harm(badness: Floats, canary: Floats, champion: Floats, share: float) -> Floats:
    """Against "the canary's requests are no worse on average". Bad requests alone tell: of them, the canary should have
    `share`. A bet that it has `odds` times as many pays for each by its badness."""
    theta = ODDS * share / (ODDS * share + 1 - share)  # of the bad requests, where the odds are so
    return canary @ _logs(badness, theta / share - 1) + champion @ _logs(badness, (1 - theta) / (1 - share) - 1)


def safety(badness: Floats, canary: Floats, champion: Floats, share: float, margin: float) -> Floats:
    """Against "the canary is worse by `margin` or more", on average. Each good request at the canary earns a little;
    with no requests there is no evidence, and with few there is little."""
    stakes = STAKES / (1 / share - margin)  # a bad request at the canary may cost all of it, no more
    at_canary = np.log1p(np.multiply.outer(margin - badness / share, stakes))
    at_champion = np.log1p(np.multiply.outer(margin + badness / (1 - share), stakes))
    found: Floats = canary @ at_canary + champion @ at_champion
    return found


def excess(badness: Floats, counts: Floats, rate: float) -> Floats:
    """Against "bad on average by `rate` at most", for one version alone."""
    return counts @ _logs(badness / rate - 1, STAKES)


def mixed(logs: Floats) -> Floats:
    """Log of the mean wealth over the last axis."""
    top = logs.max(-1, keepdims=True)
    found: Floats = top[..., 0] + np.log(np.exp(logs - top).mean(-1))
    return found


def _logs(values: Floats, stakes: Floats) -> Floats:
    """[bins, bets]"""
    found: Floats = np.log1p(np.multiply.outer(values, stakes))
    return found
