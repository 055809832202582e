"""`trireme compress`: every step of a recipe judged, beside what costs nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from builders.artifacts import Checkpoint, OnnxGraph
from builders.checkpoint import load_checkpoint
from builders.checkpoint.widths import Widths
from builders.errors import SpecError
from builders.pipeline import compress, static
from builders.pipeline.differences import Difference, differences, faster
from builders.pipeline.judged import StepFigures, at_fault, judge, judge_graphs, plain
from builders.pipeline.result import Build, Report
from builders.pipeline.space import spread
from builders.spec import DeploymentSpec, PruneSlice, StepSlice
from builders.store.store import Store


@dataclass(frozen=True)
class RecipeRow:
    """`notes`: what the step had to say. `judged` is against the original. `made` is a checkpoint, or a graph alone."""

    name: str
    made: Checkpoint | OnnxGraph
    judged: StepFigures
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """The original, whose speed shows what noise alone does; then `steps` steps; then the free baselines.

    `fault` says which step is to blame where the budget is missed.
    """

    rows: tuple[RecipeRow, ...]
    steps: int
    fault: str | None

    @property
    def last(self) -> RecipeRow:
        return self.rows[self.steps]

    def against(self) -> list[tuple[str, str, tuple[Difference, ...]]]:
        """(name, name of what it is held against, differences): the last step against the original, then against each
        baseline."""
        original, last, free = self.rows[0], self.last, self.rows[self.steps + 1 :]
        found = [(last.name, original.name, (*differences(original.judged, last.judged), *faster(last.judged)))]
        return found + [(last.name, row.name, differences(row.judged, last.judged)) for row in free]


def carried_out(spec: DeploymentSpec, store: Store, report: Report) -> tuple[Build, Checkpoint]:
    """All steps of a spec, and the original. Raises SpecError for a spec without steps, and what `compress` of a build
    raises but for the budget."""
    if not spec.compress:
        raise SpecError(
            f"compress of {spec.name}", got="no steps", expected="at least one, such as `- prune: {amount: 0.3}`",
            fix="add compress to the spec",
        )  # fmt: skip
    built = compress.carried_out(Build(spec, "cpu", load_checkpoint(spec.model)), store, report)
    assert built.original is not None
    return built, built.original


def named_steps(built: Build) -> list[tuple[str, Checkpoint]]:
    names = [f"{number} {step.name}" for number, step in enumerate(built.spec.compress)]
    return list(zip(names, built.steps, strict=True))


def judged_recipe(spec: DeploymentSpec, root: Path, report: Report = lambda stage, message: None) -> Recipe:
    """Raises what `carried_out` does."""
    store = Store(root / "store")
    built, original = carried_out(spec, store, report)

    def row(name: str, checkpoint: Checkpoint, *notes: str) -> RecipeRow:
        return RecipeRow(name, checkpoint, judge(built, checkpoint, store, report), notes)

    steps = [row(name, made, *compress.notes_of(made)) for name, made in named_steps(built)]
    rows = [row("original", original), *steps]
    free = truncated(built, rows[0].judged.parameters - steps[-1].judged.parameters, store, report)
    if free is not None:
        rows.append(row(*free, "no step: layers dropped, untrained"))
    if original.task == "embedding":
        rows.append(static_row(built, store, report))
    return Recipe(tuple(rows), len(steps), at_fault(spec, [step.judged for step in steps]))


def truncated(built: Build, gone: int, store: Store, report: Report) -> tuple[str, Checkpoint] | None:
    """The baseline of some layers alone, without about `gone` weights: its name, and its checkpoint."""
    assert built.original is not None
    kept = layers_as_small(compress.widths_of(built.original), gone)
    if not kept:
        return None
    step = StepSlice(prune=PruneSlice(what=("layers",), keep_layers=kept, importance="magnitude"))
    alone = replace(built, spec=built.spec.model_copy(update={"compress": (step,)}), checkpoint=built.original)
    shorter = compress.carried_out(alone, store, report).checkpoint
    return f"truncate to layers {', '.join(map(str, kept))}", shorter


def static_row(built: Build, store: Store, report: Report) -> RecipeRow:
    """The baseline without layers, of the original model."""
    assert built.original is not None
    whole = plain(built, built.original, store, report)
    alone = static.export(whole, store, report)
    graph = alone.served_graph
    report("compress", "static against the original")
    judged = judge_graphs(whole, alone, store, stored_bytes=graph.bytes)
    return RecipeRow("static", graph, judged, ("no layers: the mean of a text's token vectors",))


def layers_as_small(widths: Widths, gone: int) -> tuple[int, ...]:
    """Numbers of the layers, spread evenly from the first to the last, without which about `gone` weights less remain.
    At least one is dropped; of a single layer none can be."""
    layers = len(widths.layers)
    if layers < 2:
        return ()
    weights = sum(inputs * outputs for _, _, (inputs, outputs) in widths.matrices())
    count = max(1, min(layers - 1, round(layers - gone * layers / weights)))
    return spread(layers, count)
