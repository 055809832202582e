"""`trireme compress` for language models: every step of a recipe judged, beside layers that are left out untrained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from builders.artifacts import Checkpoint
from builders.checkpoint import load_checkpoint
from builders.errors import SpecError
from builders.pipeline import compress
from builders.pipeline.differences import Difference
from builders.pipeline.judged_language import (
    LanguageFigures,
    judge_step,
    language_at_fault,
    language_differences,
    language_faster,
)
from builders.pipeline.recipe import truncated
from builders.pipeline.result import Build, Report
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
    """Raises SpecError for a spec without steps, and what `compress` of a build raises but for the budget."""
    if not spec.compress:
        raise SpecError(
            f"compress of {spec.name}", got="no steps", expected="at least one, such as `- prune: {amount: 0.3}`",
            fix="add compress to the spec",
        )  # fmt: skip
    store = Store(root / "store")
    built = compress.carried_out(Build(spec, "cpu", load_checkpoint(spec.model)), store, report)
    assert built.original is not None

    def row(name: str, checkpoint: Checkpoint, *notes: str) -> LanguageRow:
        return LanguageRow(name, checkpoint, judge_step(built, checkpoint, store, report), notes)

    steps = [
        row(f"{number} {step.name}", checkpoint, *compress.notes_of(checkpoint))
        for number, (step, checkpoint) in enumerate(zip(spec.compress, built.steps, strict=True))
    ]
    rows = [row("original", built.original), *steps]
    free = truncated(built, built.original.parameters - built.checkpoint.parameters, store, report)
    if free is not None:
        rows.append(row(*free, "no step: layers dropped, untrained"))
    return LanguageRecipe(tuple(rows), len(steps), language_at_fault(spec, [step.judged for step in steps]))
