"""The command that looks for a recipe of compression."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from builders.commands.options import DEFAULT_BUILD, BuildDir, JsonFlag, SpecArgument

if TYPE_CHECKING:
    from builders.pipeline.search import Found


def search(
    spec: SpecArgument,
    trials: Annotated[int, typer.Option(min=1, help="in all, those of earlier runs among them")] = 40,
    minutes: Annotated[float, typer.Option(min=0, help="after which no new trial begins")] = 30.0,
    distil_minutes: Annotated[
        float, typer.Option(min=0, help="of training for each of the best five, all threads together; 0: none")
    ] = 2.0,
    seed: Annotated[int, typer.Option(min=0, help="of what is proposed; times differ all the same")] = 0,
    build_dir: BuildDir = DEFAULT_BUILD,
    as_json: JsonFlag = False,
) -> None:
    """Tries recipes of `compress` within the spec's budget, timed by what serves, trains the best few for a short time,
    and writes the best as a spec.

    The spec's own steps stand beside, and are not part of what is chosen. What was tried is kept: run it again, and it
    goes on.
    """
    from builders.commands import show
    from builders.pipeline.front import recipe_text, search_page
    from builders.pipeline.search import require_chosen, searched
    from builders.spec import load_spec

    loaded = load_spec(spec)
    with show.build_progress(quiet=as_json) as report:
        found = searched(loaded, build_dir, trials, minutes, seed, report, distil_minutes)
    folder = build_dir / loaded.name / "search"
    page, recipe = folder / "front.html", folder / "recipe.yaml"
    page.write_text(search_page(loaded, found), encoding="utf-8")
    if found.chosen is None:
        recipe.unlink(missing_ok=True)  # an earlier one may stand for another budget
    else:
        recipe.write_text(recipe_text(loaded, found.chosen), encoding="utf-8")
    if as_json:
        print(json.dumps({**_json(found), "page": str(page)}, indent=2))
    chosen = require_chosen(found)
    if not as_json:
        _print(found, loaded.cpu_executor)
        print(f"{chosen.trial.told}: {recipe}\n{page}")


def _json(found: Found) -> dict[str, Any]:
    from builders.commands import figures
    from builders.pipeline.space import Tried

    def of(each: Tried) -> dict[str, Any]:
        steps = [step.model_dump(mode="json", exclude_none=True) for step in each.steps]
        return {
            "number": each.number, "steps": steps, "cosine": each.cosine, "worst": each.worst, "speed": each.speed,
            "parameters": each.parameters, "missed": each.missed,
        }  # fmt: skip

    finalists = [
        {**of(each.trial), "judged": figures.as_json(each.judged), "misses": each.missed} for each in found.finalists
    ]
    return {
        "trials": [of(each) for each in found.trials],
        "resumed": found.resumed,
        "own": None if found.own is None else of(found.own),
        "finalists": finalists,
        "chosen": None if found.chosen is None else found.chosen.trial.number,
    }


def _print(found: Found, executor: str) -> None:
    from builders.commands import figures

    figures.say(f"{len(found.trials)} trials, {found.resumed} of them from earlier runs; speed on {executor}")
    shown = found.front + ([found.own] if found.own else [])
    for each in shown:
        mark = "the spec's own: " if each is found.own else ""
        figures.say(f"{mark}{each.told}: cosine {each.cosine:.3f}, worst {each.worst:.3f}, {each.speed:.2f} x as fast")
    figures.print_table("finalist", [(each.trial.told, each.judged) for each in found.finalists])
