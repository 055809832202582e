"""The gate: a candidate against the version it would follow, on text that neither was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from builders.training.text import TokenIds
from online.gate.architecture import differences
from online.gate.forgetting import Change, change_of, row_losses
from runtime.record import Record

_SHOWN = 3


class GateRefusal(StrEnum):
    ARCHITECTURE = "architecture"
    NOT_FINITE = "not_finite"
    NO_GAIN = "no_gain"
    FORGETTING = "forgetting"


class GateBudget(Record):
    """Shares of perplexity, each held by a bound at 95 %, not by the mean alone."""

    max_forgetting: float = Field(default=0.03, ge=0)  # of every old domain
    min_gain: float = Field(default=0.0, ge=0, lt=1)  # on the new text


class Objection(Record):
    name: GateRefusal
    why: str


class GateVerdict(Record):
    """`new` and `old` are empty where the models could not be compared."""

    budget: GateBudget
    new: Change | None
    old: tuple[Change, ...]
    objections: tuple[Objection, ...]

    @property
    def passed(self) -> bool:
        return not self.objections


def judge_candidate(
    previous: Path, candidate: Path, new: tuple[str, TokenIds], old: Mapping[str, TokenIds], budget: GateBudget
) -> GateVerdict:
    """Of two folders. `new` is the new domain's name and rows, `old` those of every earlier domain.

    Raises InputError for folders that hold no model, or hold-outs that are too small.
    """
    found = differences(previous, candidate)
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        why = "; ".join(found[:_SHOWN]) + more
        return GateVerdict(
            budget=budget, new=None, old=(), objections=(Objection(name=GateRefusal.ARCHITECTURE, why=why),)
        )
    models = [load_model(folder) for folder in (previous, candidate)]
    changes = {name: _change(name, rows, models) for name, rows in [new, *old.items()]}
    gained, kept = changes[new[0]], tuple(changes[name] for name in old)
    return GateVerdict(budget=budget, new=gained, old=kept, objections=_objections(gained, kept, budget))


def load_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", local_files_only=True)


def _change(name: str, rows: TokenIds, models: list[Any]) -> Change:
    before, after = (row_losses(model, rows) for model in models)
    return change_of(name, before, after)


def _objections(gained: Change, kept: tuple[Change, ...], budget: GateBudget) -> tuple[Objection, ...]:
    broken = [item.domain for item in (gained, *kept) if not np.isfinite(item.after)]
    if broken:
        why = f"its loss is no number on {', '.join(broken)}"
        return (Objection(name=GateRefusal.NOT_FINITE, why=why),)
    found = []
    if not gained.high < -budget.min_gain:
        why = f"{gained.domain}: perplexity {gained.change:+.1%}, at most {gained.high:+.1%}; "
        found.append(Objection(name=GateRefusal.NO_GAIN, why=f"{why}below {-budget.min_gain:+.1%} is asked for"))
    for item in kept:
        if not item.high <= budget.max_forgetting:
            why = f"{item.domain}: perplexity {item.change:+.1%}, up to {item.high:+.1%}; "
            found.append(Objection(name=GateRefusal.FORGETTING, why=f"{why}{budget.max_forgetting:+.1%} is allowed"))
    return tuple(found)
