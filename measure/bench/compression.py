"""`make bench-compression`: recipes of compression on MiniLM, judged as `trireme compare` does, beside what is free.

Each recipe's checkpoint, graph and figures stay in the store, so a run that was stopped goes on, and a second one only
prints. Behind them come recipes of the small language model that `make demo-generate` trains, judged on text that it
has never seen; it is trained first where it is not there, but for a quick run, which then leaves them out and says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from builders.__main__ import run
from builders.checkpoint import load_checkpoint
from builders.commands import show
from builders.errors import CheckError
from builders.judging.intervals import of_ratio
from builders.pipeline.compare import compared
from builders.pipeline.compress import notes_of
from builders.pipeline.judged import StepFigures, figures, missed
from builders.pipeline.recipe import static_row
from builders.pipeline.result import Build, Report
from builders.store.processor import this_processor
from builders.store.store import Store
from measure.bench.compression_language import language_rows
from measure.bench.compression_recipes import QUICK_MINUTES, BenchRecipe, recipes

PAGE = "bench-compression.md"
_HEAD = (
    "recipe", "M weights", "MB stored", "MB graph", "MFLOP a token", "x OpenVINO", "x ONNX Runtime", "cosine", "worst",
    "Spearman", "MRR", "of the original's", "verdict",
)  # fmt: skip


@dataclass(frozen=True)
class BenchRow:
    """`judged` is None where a step refused itself. `verdict`: what of its aim a recipe misses, or that it meets it."""

    name: str
    judged: StepFigures | None
    verdict: str
    notes: tuple[str, ...] = ()


def measured(recipe: BenchRecipe, quick: bool, root: Path, report: Report) -> BenchRow:
    """Against the original in fp32."""
    spec, original = recipe.spec(quick), BenchRecipe("original").spec()
    try:
        found = compared(("original", recipe.name), (original, spec), None, root, report)
    except CheckError as error:
        return BenchRow(recipe.name, None, f"refused: {error}")
    side = found.sides[1]
    notes = tuple(notes_of(side.checkpoint)) if recipe.steps else ()
    return BenchRow(recipe.name, side.judged, verdict(recipe, side.judged), notes)


def verdict(recipe: BenchRecipe, judged: StepFigures) -> str:
    if not recipe.aim:
        return ""
    budget, executor = recipe.budget, recipe.spec().cpu_executor
    over = missed(judged, budget, executor)
    said = ", ".join(f"{key} {value:.3f} of {getattr(budget, key)}" for key, value in over.items())
    if said:
        return f"refused: {said}"
    there = figures(judged, executor)
    return "meets " + ", ".join(f"{key} {limit} ({there[key]:.3f})" for key, limit in recipe.aim.items())


def lessened(row: BenchRow, before: BenchRow) -> str:
    """How much of the distance to the original, 1 - cosine, is gone: of the means, on the same draws of texts."""
    if row.judged is None or before.judged is None:
        return row.verdict
    distances = [[1 - cosine for cosine in each.judged.cosines] for each in (before, row) if each.judged is not None]
    left = sum(distances[1]) / sum(distances[0])
    found = of_ratio(*distances)
    said = f"{1 - left:.0%} of the distance of {before.name} gone ({1 - found.high:.0%} to {1 - found.low:.0%})"
    return f"{row.verdict}; {said}" if row.verdict else said


def without_layers(root: Path, report: Report) -> BenchRow:
    """The free baseline that has no recipe."""
    spec, store = BenchRecipe("original").spec(), Store(root / "store")
    original = load_checkpoint(spec.model)
    found = static_row(Build(spec, "cpu", original, original=original), store, report)
    return BenchRow("no layers: static", found.judged, "")


def table(rows: Sequence[BenchRow]) -> str:
    """In Markdown, intervals in brackets."""
    lines = [_HEAD, tuple("---" for _ in _HEAD), *(_cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: BenchRow) -> tuple[str, ...]:
    found = row.judged
    if found is None or found.quality is None or found.retrieval is None:
        return (row.name, *("" for _ in _HEAD[2:]), row.verdict)

    def spread(value: float, key: str, digits: int) -> str:
        low, high = found.intervals[key].low, found.intervals[key].high
        return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    return (
        row.name,
        f"{found.parameters / 1e6:.2f}",
        f"{found.stored_bytes / 1e6:.1f}",
        f"{found.graph_bytes / 1e6:.1f}",
        f"{found.flops_per_token / 1e6:.1f}",
        *(spread(found.speeds[name], f"x {name}", 2) for name in ("openvino", "onnxruntime")),
        spread(found.quality.mean_cosine, "mean_cosine", 3),
        f"{found.quality.worst_cosine:.3f}",
        spread(found.spearman or 0.0, "spearman", 3),
        spread(found.retrieval.mrr, "mrr", 3),
        spread(found.mrr_ratio or 0.0, "mrr_ratio", 3),
        row.verdict,
    )


def page(rows: Sequence[BenchRow], quick: bool) -> str:
    processor = this_processor()
    cut = f" A quick run: no training is longer than {QUICK_MINUTES} minutes." if quick else ""
    notes = [f"- {row.name}: {'; '.join(row.notes)}" for row in rows if row.notes]
    return "\n".join(
        [f"{processor.name}, {processor.cores} cores; 95 % intervals in brackets.{cut}", "", table(rows), "", *notes]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-compression", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    parser.add_argument("--quick", action="store_true", help="fewer recipes, with short training: under ten minutes")
    parser.add_argument("--only", default="", help="recipes whose name holds this text")
    options = parser.parse_args()
    asked: list[Any] = [each for each in recipes() if (each.quick or not options.quick) and options.only in each.name]
    rows: list[BenchRow] = []
    with show.build_progress(quiet=False) as report:
        for number, recipe in enumerate(asked, 1):
            report("compress", f"recipe {number} of {len(asked)}: {recipe.name}")
            row = measured(recipe, options.quick, options.build_dir, report)
            before = next((each for each in rows if each.name == recipe.against), None)
            rows.append(row if before is None else replace(row, verdict=lessened(row, before)))
        if not options.only:
            rows.append(without_layers(options.build_dir, report))
        language = language_rows(options.build_dir, options.quick, options.only, report)
    text = "\n".join([page(rows, options.quick), "", language])
    options.build_dir.mkdir(parents=True, exist_ok=True)
    (options.build_dir / PAGE).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    run(main)
