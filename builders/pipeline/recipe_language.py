"""`trireme compress` for language models: every step of a recipe judged, beside layers that are left out untrained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from builders.artifacts import Checkpoint
from builders.pipeline import compress
from builders.pipeline.differences import Difference
from builders.pipeline.judged_language import (
    LanguageFigures,
    judge_step,
    language_at_fault,
    language_differences,
    language_faster,
)
from builders.pipeline.recipe import carried_out, named_steps, truncated
from builders.pipeline.result import Report
from builders.spec import DeploymentSpec
from builders.store.store import Store


@dataclass(frozen=True)
class LanguageRow:
    """`notes`: what the step had to say. `judged` is against the original."""

    name: str
    made: Checkpoint
    judged: LanguageFigures
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LanguageRecipe:
    """As `Recipe`: the original, then `steps` steps, then the free baseline."""

    rows: tuple[LanguageRow, ...]
    steps: int
    fault: str | None

    def against(self) -> list[tuple[str, str, tuple[Difference, ...]]]:
        """(name, name of what it is held against, differences): the last step against the original, then against the
        baseline."""
        original, last, free = self.rows[0], self.rows[self.steps], self.rows[self.steps + 1 :]
        # The original's agreement with itself is 1, and its divergence 0.
        near = [
            each
            for each in language_differences(original.judged, last.judged)
            if each.figure not in ("agreement", "divergence")
        ]
        found = [(last.name, original.name, (*near, language_faster(last.judged)))]
        return found + [(last.name, row.name, language_differences(row.judged, last.judged)) for row in free]


def judged_language_recipe(
    spec: DeploymentSpec, root: Path, report: Report = lambda stage, message: None
) -> LanguageRecipe:  # fmt: skip
    """Raises what `carried_out` does."""
    store = Store(root / "store")
    built, original = carried_out(spec, store, report)

    def row(name: str, checkpoint: Checkpoint, *notes: str) -> LanguageRow:
        return LanguageRow(name, checkpoint, judge_step(built, checkpoint, store, report), notes)

    steps = [row(name, made, *compress.notes_of(made)) for name, made in named_steps(built)]
    rows = [row("original", original), *steps]
    free = truncated(built, original.parameters - built.checkpoint.parameters, store, report)
    if free is not None:
        rows.append(row(*free, "no step: layers dropped, untrained"))
    return LanguageRecipe(tuple(rows), len(steps), language_at_fault(spec, [step.judged for step in steps]))
