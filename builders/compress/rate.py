"""How fast a model is moved towards the original where nobody says: as fast as undoes nothing of what it has.

A student of a few layers has all to learn, and a high rate is best. A model that a gentle step left near the original
would be moved away first, and a training of some minutes would not bring it back.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

HIGHEST = 1e-3
SHARE = 1 / 30  # of the training: a trial
_TRIED = (HIGHEST, HIGHEST / 4)
LOWEST = HIGHEST / 16  # taken untried


def rate_by_trial(model: Any, trial: Callable[[float], float], start: float, keep: Path) -> float:
    """The highest rate by which a short training makes the loss less than `start`.

    `trial` trains `model` in place and gives the loss then; the weights are put back after it. What was found is kept
    in `keep`, so that a training which is resumed goes on at its rate.
    """
    if keep.is_file():
        return float(json.loads(keep.read_text()))
    found = next((rate for rate in _TRIED if _put_back(model, trial, rate) < start), LOWEST)
    keep.parent.mkdir(parents=True, exist_ok=True)
    part = keep.with_name(f"{keep.name}.part")
    part.write_text(json.dumps(found))
    part.replace(keep)
    return found


def _put_back(model: Any, trial: Callable[[float], float], rate: float) -> float:
    import torch

    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    try:
        return trial(rate)
    finally:
        with torch.no_grad():
            for name, value in model.state_dict().items():
                value.copy_(before[name])


def told(asked: float | None, rate: float) -> str:
    """For a step's notes."""
    if asked is not None or rate == HIGHEST:
        return f"learning rate {rate:g}"
    return f"learning rate {rate:g}: short trials of higher ones made it worse"
