"""How much a model has lost or gained on rows of text that nobody trained on, with a bound for what rows by chance."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builders.training.text import TokenIds
from runtime.errors import InputError
from runtime.record import Record

FEWEST_ROWS = 30  # for the normal bound of a mean
CONFIDENCE = 0.95
_BATCH = 16


class Change(Record):
    """Of perplexity, as shares: 0.03 is 3 % worse. `low` and `high` are one-sided bounds at 95 %, from paired rows."""

    domain: str
    rows: int
    before: float
    after: float
    change: float
    low: float
    high: float


def row_losses(model: Any, rows: TokenIds) -> NDArray[np.float64]:
    """Mean nats a token of each row of [rows, window + 1]."""
    import torch

    found = []
    training = model.training
    model.eval()
    with torch.no_grad():
        for first in range(0, len(rows), _BATCH):
            ids = torch.from_numpy(np.ascontiguousarray(rows[first : first + _BATCH]))
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            found.append(losses.mean(1).double().numpy())
    model.train(training)
    return np.concatenate(found)


def change_of(domain: str, before: NDArray[np.float64], after: NDArray[np.float64]) -> Change:
    """Rows are compared with themselves, so that easy and hard ones do not blur it. Raises InputError for too few."""
    if len(before) < FEWEST_ROWS:
        raise InputError(
            f"hold-out of {domain}",
            got=f"{len(before)} rows",
            expected=f"{FEWEST_ROWS} at least: fewer bound nothing",
            fix="hold out more text",
        )
    differences = after - before
    mean = float(differences.mean())
    margin = NormalDist().inv_cdf(CONFIDENCE) * float(differences.std(ddof=1)) / math.sqrt(len(differences))
    if not math.isfinite(mean):
        mean, margin = math.inf, 0.0
    return Change(
        domain=domain,
        rows=len(before),
        before=_exp(float(before.mean())),
        after=_exp(float(after.mean())),
        change=_exp(mean) - 1,
        low=_exp(mean - margin) - 1,
        high=_exp(mean + margin) - 1,
    )


def halves(rows: TokenIds) -> tuple[TokenIds, TokenIds]:
    """To choose by, and to judge by: whoever judges by what was chosen by flatters itself. Neighbours stay together, as
    they are of one document."""
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
