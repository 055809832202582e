"""The command that judges a recipe of compression."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from builders.commands.options import DEFAULT_BUILD, BuildDir, JsonFlag, SpecArgument
from builders.errors import QualityError

if TYPE_CHECKING:
    from builders.pipeline.recipe import Recipe, RecipeRow


def compress(spec: SpecArgument, build_dir: BuildDir = DEFAULT_BUILD, as_json: JsonFlag = False) -> None:
    """Carries out the spec's `compress` and prints what each step costs and gives. Exit 1 over its budget."""
    from builders.commands import show
    from builders.pipeline.recipe import judged_recipe
    from builders.spec import load_spec

    with show.build_progress(quiet=as_json) as report:
        recipe = judged_recipe(load_spec(spec), build_dir, report)
    print(json.dumps(_json(recipe), indent=2)) if as_json else _print(recipe)
    if recipe.fault is not None:
        raise QualityError(recipe.fault)


def _json(recipe: Recipe) -> dict[str, Any]:
    rows = [
        {
            "name": row.name,
            "checkpoint": str(row.checkpoint.directory),
            "digest": row.checkpoint.digest,
            "notes": row.notes,
            **row.judged.model_dump(mode="json", exclude={"files"}),
        }
        for row in recipe.rows
    ]
    return {"rows": rows, "fault": recipe.fault}


_WIDTH = 128


def _print(recipe: Recipe) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console = Console(width=max(console.width, _WIDTH))  # a table that is cut says nothing
    table = Table()
    quality = recipe.rows[0].judged.quality
    headings = ("step", "M weights", "MB fp32", "cosine", "worst", "Spearman", "MRR", "recall@1", "@10", *(
        f"x {name}" for name in recipe.rows[0].judged.speeds
    ))  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "step" else "right")
    for row in recipe.rows:
        table.add_row(*_cells(row))
    console.print(table)
    console.print(f"{quality.texts} held-out texts; speed against the original's by CPU time", highlight=False)
    for row in recipe.rows:
        for note in row.notes:
            console.print(f"{row.name}: {note}", highlight=False, soft_wrap=True)
    for row in recipe.rows:
        console.print(f"{row.name}: {row.checkpoint.directory}", highlight=False, soft_wrap=True)


def _cells(row: RecipeRow) -> list[str]:
    judged, found = row.judged, row.judged.retrieval
    figures = [judged.quality.mean_cosine, judged.quality.worst_cosine, judged.spearman]
    figures += [found.mrr, found.recall_at_1, found.recall_at_10] if found else [None] * 3
    return [
        row.name,
        f"{judged.parameters / 1e6:.2f}",
        f"{judged.graph_bytes / 1e6:.1f}",
        *("" if figure is None else f"{figure:.3f}" for figure in figures),
        *(f"{speed:.2f}" for speed in judged.speeds.values()),
    ]
