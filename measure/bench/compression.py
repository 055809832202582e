"""`make bench-compression`: recipes of compression on MiniLM, judged as `trireme compare` does, beside what is free.

Each recipe's checkpoint, graph and figures stay in the store, so a run that was stopped goes on, and a second one only
prints. Behind them come recipes of the small language model that `make demo-generate` trains, judged on text that it
has never seen; it is trained first where it is not there, but for a quick run, which then leaves them out and says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
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
from measure.bench.compression_table import BenchRow, markdown, notes, spread, word

PAGE = "bench-compression.md"
_HEAD = ("x OpenVINO", "x ONNX Runtime", "cosine", "worst", "Spearman", "MRR", "of the original's")

EncoderRow = BenchRow[StepFigures]


def measured(recipe: BenchRecipe, quick: bool, root: Path, report: Report) -> EncoderRow:
    """Against the original in fp32."""
    spec, original = recipe.spec(quick), BenchRecipe("original").spec()
    try:
        found = compared(("original", recipe.name), (original, spec), None, root, report)
    except CheckError as error:
        return EncoderRow(recipe.name, None, f"refused: {error}")
    side = found.sides[1]
    notes = tuple(notes_of(side.checkpoint)) if recipe.steps else ()
    return EncoderRow(recipe.name, side.judged, verdict(recipe, side.judged), notes)


def verdict(recipe: BenchRecipe, judged: StepFigures) -> str:
    if not recipe.aim:
        return ""
    budget, executor = recipe.budget, recipe.spec().cpu_executor
    return word(recipe.aim, budget, missed(judged, budget, executor), figures(judged, executor))


def lessened(row: EncoderRow, before: EncoderRow) -> str:
    """How much of the distance to the original, 1 - cosine, is gone: of the means, on the same draws of texts."""
    if row.judged is None or before.judged is None:
        return row.verdict
    distances = [[1 - cosine for cosine in each.judged.cosines] for each in (before, row) if each.judged is not None]
    left = sum(distances[1]) / sum(distances[0])
    found = of_ratio(*distances)
    said = f"{1 - left:.0%} of the distance of {before.name} gone ({1 - found.high:.0%} to {1 - found.low:.0%})"
    return f"{row.verdict}; {said}" if row.verdict else said


def without_layers(root: Path, report: Report) -> EncoderRow:
    """The free baseline that has no recipe."""
    spec, store = BenchRecipe("original").spec(), Store(root / "store")
    original = load_checkpoint(spec.model)
    found = static_row(Build(spec, "cpu", original, original=original), store, report)
    return EncoderRow("no layers: static", found.judged, "")


def table(rows: Sequence[EncoderRow]) -> str:
    """In Markdown, intervals in brackets."""
    return markdown(_HEAD, rows, _cells)


def _cells(found: StepFigures) -> tuple[str, ...]:
    if found.quality is None or found.retrieval is None:
        return tuple("" for _ in _HEAD)
    return (
        *(spread(found, found.speeds[name], f"x {name}", 2) for name in ("openvino", "onnxruntime")),
        spread(found, found.quality.mean_cosine, "mean_cosine", 3),
        f"{found.quality.worst_cosine:.3f}",
        spread(found, found.spearman or 0.0, "spearman", 3),
        spread(found, found.retrieval.mrr, "mrr", 3),
        spread(found, found.mrr_ratio or 0.0, "mrr_ratio", 3),
    )


def page(rows: Sequence[EncoderRow], quick: bool) -> str:
    processor = this_processor()
    cut = f" A quick run: no training is longer than {QUICK_MINUTES} minutes." if quick else ""
    said = f"{processor.name}, {processor.cores} cores; 95 % intervals in brackets.{cut}"
    return "\n".join([said, "", table(rows), "", *notes(rows)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench-compression", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    parser.add_argument("--quick", action="store_true", help="fewer recipes, with short training: under ten minutes")
    parser.add_argument("--only", default="", help="recipes whose name holds this text")
    options = parser.parse_args()
    asked: list[Any] = [each for each in recipes() if (each.quick or not options.quick) and options.only in each.name]
    rows: list[EncoderRow] = []
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
