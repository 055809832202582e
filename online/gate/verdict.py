"""The gate: a candidate against the version it would follow, on text that neither was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import Field

from online.gate.architecture import differences
from online.gate.forgetting import WORST, Change, change_of
from online.tasks.task import LearningTask, Rows
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
    max_fall: float = Field(default=0.05, ge=0, le=1)  # of each guarded share of every old domain

    def holds(self, high: float, fall: float) -> bool:
        """Of one old domain's bounds. What is no number holds nothing."""
        return high <= self.max_forgetting and fall <= self.max_fall


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
    task: LearningTask, previous: Path, candidate: Path, new: tuple[str, Rows], old: Mapping[str, Rows],
    budget: GateBudget,
) -> GateVerdict:  # fmt: skip
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
    if (broken := _broken(candidate)) is not None:
        return GateVerdict(budget=budget, new=None, old=(), objections=(_not_finite(f"its weight {broken}"),))
    models = [task.load(folder) for folder in (previous, candidate)]
    changes = {name: _change(task, name, rows, models) for name, rows in [new, *old.items()]}
    gained, kept = changes[new[0]], tuple(changes[name] for name in old)
    return GateVerdict(budget=budget, new=gained, old=kept, objections=_objections(gained, kept, budget))


def _broken(candidate: Path) -> str | None:
    """A weight that is not a number."""
    import torch
    from safetensors import safe_open

    with safe_open(candidate / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            if not torch.isfinite(tensors.get_tensor(name)).all():
                return str(name)
    return None


def _not_finite(what: str) -> Objection:
    return Objection(name=GateRefusal.NOT_FINITE, why=f"{what} is no number")


def _change(task: LearningTask, name: str, rows: Rows, models: list[Any]) -> Change:
    before, after = (task.scores(model, rows) for model in models)
    return change_of(name, before, after)


def _objections(gained: Change, kept: tuple[Change, ...], budget: GateBudget) -> tuple[Objection, ...]:
    broken = [item.domain for item in (gained, *kept) if item.after >= WORST]
    if broken:
        return (_not_finite(f"its loss on {', '.join(broken)}"),)
    found = []
    if not gained.high < -budget.min_gain:
        why = f"{gained.domain}: perplexity {gained.change:+.1%}, at most {gained.high:+.1%}; "
        found.append(Objection(name=GateRefusal.NO_GAIN, why=f"{why}below {-budget.min_gain:+.1%} is asked for"))
    for item in kept:
        if not item.high <= budget.max_forgetting:
            why = f"{item.domain}: perplexity {item.change:+.1%}, up to {item.high:+.1%}; "
            found.append(Objection(name=GateRefusal.FORGETTING, why=f"{why}{budget.max_forgetting:+.1%} is allowed"))
        for share in item.shares:
            if share.guarded and not share.fall <= budget.max_fall:
                why = f"{item.domain}: {share.name} {share.before:.3f} -> {share.after:.3f}, down by {share.fall:.3f} "
                why += f"at most; {budget.max_fall:g} is allowed"
                found.append(Objection(name=GateRefusal.FORGETTING, why=why))
    return tuple(found)
