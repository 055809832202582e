"""Commands that judge: a recipe of compression step by step, and one model against another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from builders.commands.options import DEFAULT_BUILD, BuildDir, JsonFlag, SpecArgument
from builders.errors import InputError, QualityError

if TYPE_CHECKING:
    from builders.artifacts import Artifact
    from builders.judging.labels import Labelled
    from builders.pipeline.compare import Comparison
    from builders.pipeline.judged import StepFigures
    from builders.pipeline.recipe import Recipe
    from builders.spec import DeploymentSpec, Pooling


def compress(spec: SpecArgument, build_dir: BuildDir = DEFAULT_BUILD, as_json: JsonFlag = False) -> None:
    """Carries out the spec's `compress` and prints what each step costs and gives. Exit 1 over its budget."""
    from builders.commands import show
    from builders.pipeline.recipe import judged_recipe
    from builders.spec import load_spec

    asked = load_spec(spec)
    if asked.generates:
        _compress_language(asked, build_dir, as_json)
        return
    with show.build_progress(quiet=as_json) as report:
        recipe = judged_recipe(asked, build_dir, report)
    print(json.dumps(_recipe_json(recipe), indent=2)) if as_json else _print_recipe(recipe)
    if recipe.fault is not None:
        raise QualityError(recipe.fault)


def _compress_language(spec: DeploymentSpec, build_dir: Path, as_json: bool) -> None:
    from builders.commands import figures, show
    from builders.pipeline.recipe_language import judged_language_recipe

    with show.build_progress(quiet=as_json) as report:
        recipe = judged_language_recipe(spec, build_dir, report)
    if as_json:
        rows = [
            {"name": row.name, "checkpoint": str(row.made.directory), "digest": row.made.digest, "notes": row.notes,
             **figures.language_json(row.judged)} for row in recipe.rows
        ]  # fmt: skip
        against = [
            {"name": name, "against": other, "figures": figures.difference_json(found)}
            for name, other, found in recipe.against()
        ]
        print(json.dumps({"rows": rows, "differences": against, "fault": recipe.fault}, indent=2))
    else:
        figures.print_language_table("step", [(row.name, row.judged) for row in recipe.rows])
        figures.say(figures.language_heading(recipe.rows[0].judged, "the original"))
        figures.say(*(figures.interval_line(row.name, row.judged) for row in recipe.rows))
        for name, other, found in recipe.against():
            figures.say(*figures.difference_lines(name, other, found))
        figures.say(*(f"{row.name}: {note}" for row in recipe.rows for note in row.notes))
        figures.say(*(f"{row.name}: {row.made.directory}" for row in recipe.rows))
    if recipe.fault is not None:
        raise QualityError(recipe.fault)


def _recipe_json(recipe: Recipe) -> dict[str, Any]:
    from builders.commands import figures

    rows = [_row_json(row.name, row.made, row.judged, notes=row.notes) for row in recipe.rows]
    against = [
        {"name": name, "against": other, "figures": figures.difference_json(found)}
        for name, other, found in recipe.against()
    ]
    return {"rows": rows, "differences": against, "fault": recipe.fault}


def _row_json(name: str, made: Artifact, judged: StepFigures, **more: Any) -> dict[str, Any]:
    from builders.commands import figures

    return {"name": name, "checkpoint": str(made.directory), "digest": made.digest, **more, **figures.as_json(judged)}


def _print_recipe(recipe: Recipe) -> None:
    from builders.commands import figures

    figures.print_table("step", [(row.name, row.judged) for row in recipe.rows])
    quality = recipe.rows[0].judged.quality
    assert quality is not None
    figures.say(f"{quality.texts} held-out texts; speed against the original's by CPU time")
    figures.say(*(figures.interval_line(row.name, row.judged) for row in recipe.rows))
    for name, other, found in recipe.against():
        figures.say(*figures.difference_lines(name, other, found))
    figures.say(*(f"{row.name}: {note}" for row in recipe.rows for note in row.notes))
    figures.say(*(f"{row.name}: {row.made.directory}" for row in recipe.rows))


SideArgument = Annotated[
    str, typer.Argument(help="spec file or preset; or a folder, packaged:all-MiniLM-L6-v2 or a Hugging Face id")
]


def compare(
    first: SideArgument,
    second: SideArgument,
    task: Annotated[
        Literal["embedding", "classification", "reranking", "generation"] | None,
        typer.Option(help="of checkpoints; default: the other side's spec, or embedding"),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=8, help="tokens, of checkpoints; default: the other side's spec, or 256")
    ] = None,
    pooling: Annotated[
        Literal["mean", "cls", "max", "lasttoken", "mean_sqrt_len_tokens", "weightedmean"] | None,
        typer.Option(help="of checkpoints; default: the other side's spec, or their own"),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="classifiers: UTF-8 file, a label's number, a tab and a text in each line")
    ] = None,
    build_dir: BuildDir = DEFAULT_BUILD,
    as_json: JsonFlag = False,
) -> None:
    """Judges SECOND against FIRST: size, speed and quality, with intervals; a word only where these allow it.

    A spec stands for what it serves on a CPU, with its compress and precision; a checkpoint for itself, in fp32.
    """
    from builders.commands import show
    from builders.pipeline.compare import compared

    specs = _sides((first, second), task, max_length, pooling)
    if any(spec.generates for spec in specs):
        _compare_language((first, second), specs, labels, build_dir, as_json)
        return
    with show.build_progress(quiet=as_json) as report:
        found = compared((first, second), specs, labels, build_dir, report)
    print(json.dumps(_comparison_json(found), indent=2)) if as_json else _print_comparison(found)


def _compare_language(
    names: tuple[str, str],
    specs: tuple[DeploymentSpec, DeploymentSpec],
    labels: Path | None,
    build_dir: Path,
    as_json: bool,
) -> None:
    from builders.commands import figures, show
    from builders.pipeline.compare import compared_language

    if labels is not None:
        raise InputError(
            "--labels", got="a language model", expected="classifiers of two labels or more", fix="leave --labels out"
        )
    with show.build_progress(quiet=as_json) as report:
        found = compared_language(names, specs, build_dir, report)
    if as_json:
        sides = [
            {"name": side.name, "checkpoint": str(side.checkpoint.directory), "digest": side.checkpoint.digest,
             "served": side.served, **figures.language_json(side.judged)} for side in found.sides
        ]  # fmt: skip
        print(json.dumps({"sides": sides, "differences": figures.difference_json(found.differences)}, indent=2))
        return
    rows = [(f"{name} ({side.served})", side.judged) for name, side in zip("AB", found.sides, strict=True)]
    figures.say(*(f"{name}: {side.name}" for name, side in zip("AB", found.sides, strict=True)))
    figures.print_language_table("model", rows)
    figures.say(figures.language_heading(rows[0][1], "A"))
    figures.say(*(figures.interval_line(name, judged) for name, judged in rows))
    figures.say(*figures.difference_lines("B", "A", found.differences))


def _sides(
    names: tuple[str, str], task: str | None, max_length: int | None, pooling: Pooling | None
) -> tuple[DeploymentSpec, DeploymentSpec]:  # fmt: skip
    from builders.spec import DeploymentSpec, load_spec, resolve_spec_path

    files = [resolve_spec_path(name).is_file() for name in names]
    specs = [load_spec(name) if is_file else None for name, is_file in zip(names, files, strict=True)]
    if all(files) and (task, max_length, pooling) != (None, None, None):
        raise InputError(
            "--task, --max-length and --pooling", got="two specs, which say it themselves", expected="a checkpoint",
            fix="leave these options out",
        )  # fmt: skip
    like = next((spec for spec in specs if spec is not None), None)
    longest = max_length or (like.model.max_length if like else 256)
    precision = {} if like is None else {
        "calibration_texts": like.precision.calibration_texts,
        "calibration_samples": like.precision.calibration_samples,
    }  # fmt: skip

    def alone(name: str) -> DeploymentSpec:
        chosen = task or (like.model.task if like else "embedding")
        pooled = like.model.model_dump(include={"pooling", "normalize"}) if like and chosen == like.model.task else {}
        given: dict[str, Any] = {"pooling": pooling} if pooling is not None else pooled
        return DeploymentSpec.model_validate(
            {
                "name": "compared",
                "model": {"source": name, "task": chosen, "max_length": longest, **given},
                "precision": {"cpu": "fp32", **precision},
                **({} if chosen in ("generation", "seq2seq") else {"serving": {"length_buckets": [longest]}}),
            }
        )

    first, second = (spec or alone(name) for spec, name in zip(specs, names, strict=True))
    return first, second


def _comparison_json(found: Comparison) -> dict[str, Any]:
    from builders.commands import figures

    sides = [_row_json(side.name, side.checkpoint, side.judged, served=side.served) for side in found.sides]
    labelled = None if found.labelled is None else found.labelled.model_dump(mode="json")
    return {"sides": sides, "differences": figures.difference_json(found.differences), "labelled": labelled}


def _print_comparison(found: Comparison) -> None:
    from builders.commands import figures
    from builders.judging.vectors import HELD_OUT_TEXTS

    first, second = found.sides
    rows = [(f"{name} ({side.served})", side.judged) for name, side in zip("AB", found.sides, strict=True)]
    figures.say(*(f"{name}: {side.name}" for name, side in zip("AB", found.sides, strict=True)))
    figures.print_table("model", rows)
    figures.say(f"{HELD_OUT_TEXTS} held-out texts; cosines, Spearman and speed against A, by CPU time")
    figures.say(*(figures.interval_line(name, judged) for name, judged in rows))
    figures.say(*figures.difference_lines("B", "A", found.differences))
    if second.judged.quality is not None and second.judged.quality.agreement is not None:
        figures.say(f"B against A: {second.judged.quality.agreement:.1%} of the decisions the same")
    if second.judged.quality is None:
        figures.say(f"no cosines: vectors of {first.checkpoint.width} and {second.checkpoint.width} numbers")
    if found.labelled is not None:
        figures.say(*_of_labels(found.labelled))


def _of_labels(found: Labelled) -> list[str]:
    accuracy, error = found.accuracy_difference, found.calibration_difference
    return [
        f"{found.texts} labelled texts, one answer of both to {found.agreement:.1%} ({found.agreement_interval})",
        f"B against A: accuracy {found.accuracy[0]:.3f} -> {found.accuracy[1]:.3f}: {accuracy.against(0)} "
        f"(by {accuracy})",
        f"B against A: calibration error {found.calibration_error[0]:.3f} -> {found.calibration_error[1]:.3f}: "
        f"{error.against(0, more_is_better=False)} (by {error})",
    ]
