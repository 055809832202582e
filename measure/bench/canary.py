"""`make bench-canary`: simulated rollouts, judged by the e-processes of `online.rollout` and by a watched z-test.

Each row simulates rollouts at one share of the traffic and looks at each of them by several schedules. A false rollback
stops a version that is no worse; a false promotion lets through one that is worse by the margin. Both must stay within
alpha at every schedule. The functions are those that decide in a real rollout.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from online.rollout import evidence
from online.rollout.policy import Metric
from online.rollout.seen import BADNESS

ALPHA, MARGIN = 0.05, 0.01
RUNS = 2000
_CHUNK = 50  # rollouts in memory at once
_ROW_S = 240.0
_BADNESS = BADNESS[Metric.ERRORS]
Looks = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class CanaryRow:
    """Shares of requests that fail, at the champion and at the canary, which gets `share` of `requests`."""

    champion: float
    canary: float
    share: float
    requests: int


ROLLBACK_ROWS = (
    CanaryRow(0.01, 0.01, 0.1, 5000),
    CanaryRow(0.001, 0.001, 0.1, 5000),
    CanaryRow(0.2, 0.2, 0.5, 5000),
    CanaryRow(0.01, 0.03, 0.1, 5000),
    CanaryRow(0.01, 0.1, 0.1, 5000),
    CanaryRow(0.01, 0.1, 0.01, 10000),
    CanaryRow(0.01, 1.0, 0.01, 5000),
)
PROMOTION_ROWS = (
    CanaryRow(0.01, 0.02, 0.5, 5000),
    CanaryRow(0.0, 0.01, 0.5, 5000),
    CanaryRow(0.01, 0.02, 0.1, 10000),
    CanaryRow(0.01, 0.01, 0.5, 5000),
    CanaryRow(0.0, 0.0, 0.5, 5000),
)


def schedules(requests: int) -> dict[str, Looks]:
    """When the counters are looked at, in requests."""
    return {
        "each": np.arange(1, requests + 1),
        "50": np.arange(50, requests + 1, 50),
        "500": np.arange(500, requests + 1, 500),
        "doubling": 2 ** np.arange(4, int(math.log2(requests)) + 1),
    }


@dataclass(frozen=True)
class Simulated:
    """Cumulative, [rollouts, requests]"""

    canary: Floats
    canary_failed: Floats
    champion: Floats
    champion_failed: Floats

    def bins(self) -> tuple[Floats, Floats]:
        """[rollouts, requests, good and bad] at the canary and at the champion"""
        return (
            np.stack([self.canary - self.canary_failed, self.canary_failed], -1),
            np.stack([self.champion - self.champion_failed, self.champion_failed], -1),
        )


def simulate(row: CanaryRow, runs: int, random: np.random.Generator) -> Simulated:
    at_canary = random.random((runs, row.requests)) < row.share
    failed = random.random((runs, row.requests)) < np.where(at_canary, row.canary, row.champion)
    total, bad = np.cumsum(at_canary, 1, dtype=float), np.cumsum(at_canary & failed, 1, dtype=float)
    seen = np.arange(1.0, row.requests + 1)
    return Simulated(total, bad, seen - total, np.cumsum(failed, 1, dtype=float) - bad)


def e_rollback(counts: Simulated, row: CanaryRow) -> NDArray[np.bool_]:
    """Whether wealth is 1/alpha or more, at each request."""
    return evidence.mixed(evidence.harm(_BADNESS, *counts.bins(), row.share)) >= -math.log(ALPHA)


def e_promotion(counts: Simulated, row: CanaryRow) -> NDArray[np.bool_]:
    return evidence.mixed(evidence.safety(_BADNESS, *counts.bins(), row.share, MARGIN)) >= -math.log(ALPHA)


def z_rollback(counts: Simulated, row: CanaryRow) -> NDArray[np.bool_]:
    """Two shares compared by a pooled z-test, one-sided at alpha, as if looked at once."""
    return _z(counts, 0.0) > 1.6449


def z_promotion(counts: Simulated, row: CanaryRow) -> NDArray[np.bool_]:
    return _z(counts, MARGIN) < -1.6449


def _z(counts: Simulated, margin: float) -> Floats:
    canary, champion = np.maximum(counts.canary, 1), np.maximum(counts.champion, 1)
    pooled = (counts.canary_failed + counts.champion_failed) / (canary + champion)
    deviation = np.sqrt(pooled * (1 - pooled) * (1 / canary + 1 / champion))
    difference = counts.canary_failed / canary - counts.champion_failed / champion - margin
    return np.where(deviation > 0, difference / np.maximum(deviation, 1e-12), 0.0)


Test = Callable[[Simulated, CanaryRow], NDArray[np.bool_]]


def stops(row: CanaryRow, tests: dict[str, tuple[Test, str]], runs: int, seed: int) -> tuple[dict[str, Floats], int]:
    """For each test and its schedule, the request at which each rollout stopped, nan where none did; and how many
    rollouts there was time for."""
    random, end = np.random.default_rng(seed), time.monotonic() + _ROW_S
    found: dict[str, list[Floats]] = {name: [] for name in tests}
    done = 0
    while done < runs and time.monotonic() < end:
        counts = simulate(row, min(_CHUNK, runs - done), random)
        verdicts = {test: test(counts, row) for test in {test for test, _ in tests.values()}}
        for name, (test, schedule) in tests.items():
            looks = schedules(row.requests)[schedule]
            seen = verdicts[test][:, looks - 1]
            found[name].append(np.where(seen.any(1), looks[seen.argmax(1)], np.nan))
        done += len(counts.canary)
    return {name: np.concatenate(parts) for name, parts in found.items()}, done


def table(title: str, rows: tuple[CanaryRow, ...], ours: Test, theirs: Test, runs: int) -> None:
    tests = {f"e {name}": (ours, name) for name in schedules(1024)} | {"z 50": (theirs, "50")}
    print(f"\n{title}\nchampion canary  share requests |" + "".join(f"{name:>20}" for name in tests))
    for number, row in enumerate(rows):
        found, done = stops(row, tests, runs, number)
        shown = "".join(f"{_shown(at):>20}" for at in found.values())
        short = "" if done == runs else f"  ({done} rollouts: no time for more)"
        print(f"{row.champion:8.1%} {row.canary:6.1%} {row.share:6.0%} {row.requests:8d} |{shown}{short}", flush=True)


def _shown(at: Floats) -> str:
    stopped = at[~np.isnan(at)]
    return f"{len(stopped) / len(at):.1%}" + (f" at {np.median(stopped):,.0f}" if len(stopped) else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=RUNS)
    runs = parser.parse_args().runs
    started = time.process_time()
    print(f"{runs} rollouts a row, alpha {ALPHA:.0%}; how many stop, and at which request (median)")
    table("rolled back, by how often it is looked at", ROLLBACK_ROWS, e_rollback, z_rollback, runs)
    table(f"promoted, against a margin of {MARGIN:.0%}", PROMOTION_ROWS, e_promotion, z_promotion, runs)
    print(f"\n{time.process_time() - started:.0f} s of CPU")


if __name__ == "__main__":
    main()
