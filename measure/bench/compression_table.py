"""What both tables of `make bench-compression` share: rows, cells, and the word on an aim."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from builders.pipeline.judged import StepFigures
from builders.pipeline.judged_language import LanguageFigures
from builders.spec import BudgetSlice

JudgedFigures = TypeVar("JudgedFigures", bound=StepFigures | LanguageFigures)
_HEAD = ("recipe", "M weights", "MB stored", "MB graph", "MFLOP a token")


@dataclass(frozen=True)
class BenchRow(Generic[JudgedFigures]):
    """`judged` is None where a step refused itself. `verdict`: what of its aim a recipe misses, or that it meets it."""

    name: str
    judged: JudgedFigures | None
    verdict: str
    notes: tuple[str, ...] = ()


def word(
    aim: Mapping[str, float], budget: BudgetSlice, over: Mapping[str, float], there: Mapping[str, float | None]
) -> str:
    """`over`: figures that miss the budget, which holds the aim; `there`: all of them."""
    if over:
        return "refused: " + ", ".join(f"{key} {value:.3f} of {getattr(budget, key)}" for key, value in over.items())
    return "meets " + ", ".join(f"{key} {limit} ({there[key]:.3f})" for key, limit in aim.items())


def markdown(
    head: Sequence[str],
    rows: Sequence[BenchRow[JudgedFigures]],
    cells: Callable[[JudgedFigures], Sequence[str]],
) -> str:
    """`head` and `cells` are of the columns between the sizes and the verdict."""
    whole = (*_HEAD, *head, "verdict")
    lines: list[Sequence[str]] = [whole, ["---"] * len(whole)]
    for row in rows:
        found = row.judged
        between = [""] * len(whole[2:]) if found is None else [*_sizes(found), *cells(found)]
        lines.append([row.name, *between, row.verdict])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def notes(rows: Sequence[BenchRow[JudgedFigures]]) -> list[str]:
    return [f"- {row.name}: {'; '.join(row.notes)}" for row in rows if row.notes]


def spread(found: StepFigures | LanguageFigures, value: float, key: str, digits: int) -> str:
    """With its interval in brackets."""
    low, high = found.intervals[key].low, found.intervals[key].high
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _sizes(found: StepFigures | LanguageFigures) -> tuple[str, ...]:
    return (
        f"{found.parameters / 1e6:.2f}",
        f"{found.stored_bytes / 1e6:.1f}",
        f"{found.graph_bytes / 1e6:.1f}",
        f"{found.flops_per_token / 1e6:.1f}",
    )
