"""How much a model has lost or gained on rows that nobody trained on, with a bound for what rows by chance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np

from online.tasks.task import Figures, Rows, Scores
from runtime.errors import InputError
from runtime.proof.judging import cosines
from runtime.record import Record

FEWEST_ROWS = 30  # for the normal bound of a mean
CONFIDENCE = 0.95
WORST = math.exp(690)  # stands for what is no number, which JSON does not have
NEAR = "cosine to the champion's"  # of vectors that were the champion's before


class ShareChange(Record):
    """Of what is right, 1 at most: a mean before and after, and how far it may have fallen, a one-sided bound at 95 %.
    `guarded`: an update may not lower it by more than its budget."""

    name: str
    before: float
    after: float
    fall: float
    guarded: bool


class Change(Record):
    """Of perplexity, as shares: 0.03 is 3 % worse. `low` and `high` are one-sided bounds at 95 %, from paired rows."""

    domain: str
    rows: int
    before: float
    after: float
    change: float
    low: float
    high: float
    shares: tuple[ShareChange, ...] = ()

    @property
    def fall(self) -> float:
        """The worst of the guarded shares; 0 where there is none."""
        return max((share.fall for share in self.shares if share.guarded), default=0.0)


def change_of(domain: str, before: Scores, after: Scores) -> Change:
    """Rows are compared with themselves, so that easy and hard ones do not blur it. Raises InputError for too few."""
    if len(before.losses) < FEWEST_ROWS:
        raise InputError(
            f"hold-out of {domain}",
            got=f"{len(before.losses)} rows",
            expected=f"{FEWEST_ROWS} at least: fewer bound nothing",
            fix="hold out more",
        )
    mean, margin = _mean_and_margin(after.losses - before.losses)
    return Change(
        domain=domain,
        rows=len(before.losses),
        before=_exp(float(before.losses.mean())),
        after=_exp(float(after.losses.mean())),
        change=_exp(mean) - 1,
        low=_exp(mean - margin) - 1,
        high=_exp(mean + margin) - 1,
        shares=tuple(_shares(before, after)),
    )


def _shares(before: Scores, after: Scores) -> Iterator[ShareChange]:
    pairs = {name: (before.shares[name], after.shares[name]) for name in before.shares}
    if before.vectors is not None and after.vectors is not None:
        pairs[NEAR] = np.ones(len(before.losses)), cosines(before.vectors, after.vectors, by_label=False)
    for name, (first, second) in pairs.items():
        fallen, margin = _mean_and_margin(first - second)
        guarded = name == NEAR or name in before.guarded
        yield ShareChange(
            name=name, before=float(first.mean()), after=float(second.mean()), fall=min(fallen + margin, 1.0),
            guarded=guarded,
        )  # fmt: skip


def _mean_and_margin(differences: Figures) -> tuple[float, float]:
    """As bad as can be where a difference is no number."""
    mean = float(differences.mean())
    margin = NormalDist().inv_cdf(CONFIDENCE) * float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return (mean, margin) if math.isfinite(mean) else (math.log(WORST), 0.0)


# Between two hold-outs of as many rows, a mean rises by more than so many margins of one of them in 5 % of draws.
_ANOTHER = math.sqrt(2)


def elsewhere(found: Change) -> tuple[float, float]:
    """(high, fall) that a hold-out of as many other rows will find of the same two models, or less, at 95 %.

    A step that its own bound just allows would be refused by every other hold-out out of two.
    """
    mean, margin = math.log1p(found.change), math.log1p(found.high) - math.log1p(found.change)
    fall = max((_wider(share) for share in found.shares if share.guarded), default=0.0)
    return _exp(mean + (1 + _ANOTHER) * margin) - 1, fall


def _wider(share: ShareChange) -> float:
    margin = share.fall - (share.before - share.after)
    return min(share.fall + _ANOTHER * max(margin, 0.0), 1.0)


def halves(rows: Rows) -> tuple[Rows, Rows]:
    """To choose by, and to judge by: whoever judges by what was chosen by flatters itself. Neighbours stay together, as
    they are of one document."""
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def _exp(value: float) -> float:
    return math.exp(value) if value < math.log(WORST) else WORST
