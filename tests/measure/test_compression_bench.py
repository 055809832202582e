"""`make bench-compression`: recipes that the model can take, what is said of one that misses its aim; the preset."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from builders.artifacts import Quality
from builders.checkpoint.widths import LayerWidths, Widths
from builders.compress.plan import Teacher, check
from builders.judging.intervals import ConfidenceInterval
from builders.judging.retrieval import Retrieval
from builders.pipeline.judged import StepFigures
from builders.pipeline.judged_language import LanguageFigures
from builders.spec import load_spec
from measure.bench import compression
from measure.bench.compression_language import (
    LanguageBenchRecipe,
    LanguageBenchRow,
    language_recipes,
    language_rows,
    language_table,
    language_verdict,
)
from measure.bench.compression_recipes import PRESET, QUICK_MINUTES, BenchRecipe, recipes
from measure.bench.compression_table import BenchRow
from tests.compress.test_spec import WIDTHS


def _judged(cosine: float, speed: float) -> StepFigures:
    interval = ConfidenceInterval(low=0.5, high=1.5)
    names = ("x openvino", "x onnxruntime", "mean_cosine", "spearman", "mrr", "mrr_ratio")
    return StepFigures(
        directory=Path(), files=(), parameters=17_000_000, graph_bytes=68_000_000, stored_bytes=69_000_000,
        flops_per_token=1.1e7,
        quality=Quality(mean_cosine=cosine, worst_cosine=0.8, max_abs_difference=0.1, texts=128, executor="x"),
        cosines=(cosine,), spearman=0.9, retrieval=Retrieval(ranks=(1, 2, 4)), mrr_ratio=0.95,
        speeds={"openvino": speed, "onnxruntime": speed}, intervals=dict.fromkeys(names, interval),
    )  # fmt: skip


def test_the_model_can_take_every_recipe() -> None:
    found = recipes()
    assert len({recipe.name for recipe in found}) == len(found) >= 16
    for recipe in found:
        for quick in (False, True):
            steps = recipe.spec(quick).compress
            check(steps, WIDTHS, 1, teacher=Teacher(WIDTHS, "embedding"))
            minutes = [step.distil.minutes for step in steps if step.distil is not None]
            minutes += [asked.minutes for asked in [recipe.spec(quick).precision.qat] if asked is not None]
            assert not quick or all(each is not None and each <= QUICK_MINUTES for each in minutes)
    whole = sum(step.distil.minutes or 0 for recipe in found for step in _own(recipe) if step.distil is not None)
    assert whole <= 36  # of the hour that a run may take


def _own(recipe: BenchRecipe) -> list:  # type: ignore[type-arg]
    """Steps that no other recipe has carried out before it."""
    steps = list(recipe.spec().compress)
    student = load_spec(PRESET).compress
    return steps[len(student) :] if tuple(steps[: len(student)]) == student and "int8" not in recipe.name else steps


def test_the_preset_is_the_student_of_the_bench() -> None:
    spec = load_spec(PRESET)
    widths = check(spec.compress, WIDTHS, 1, teacher=Teacher(WIDTHS, "embedding"))
    assert len(widths.layers) == 3
    assert widths.hidden == WIDTHS.hidden
    student = next(recipe for recipe in recipes() if recipe.name == "student 0, 2, 5")
    made, preset = student.spec(), spec
    assert made.compress == preset.compress  # and with it all that its key in the store depends on
    assert made.model == preset.model
    assert made.precision.calibration_samples == preset.precision.calibration_samples
    assert made.parallel == preset.parallel


def test_a_recipe_that_misses_its_aim_is_refused_with_the_figure() -> None:
    step = {"prune": {"amount": 0.3}}
    recipe = BenchRecipe("pruned", (step,), aim={"min_mean_cosine": 0.94, "min_speedup": 1.9})
    assert compression.verdict(recipe, _judged(0.87, 2.0)) == "refused: min_mean_cosine 0.870 of 0.94"
    assert compression.verdict(recipe, _judged(0.95, 2.0)).startswith("meets min_mean_cosine 0.94 (0.950)")
    assert compression.verdict(BenchRecipe("free", (step,)), _judged(0.1, 0.1)) == ""


def test_how_much_of_another_recipes_distance_is_gone() -> None:
    found = [recipe for recipe in recipes() if recipe.against]
    names = [recipe.name for recipe in recipes()]
    assert found
    for recipe in found:
        assert recipe.against in names[: names.index(recipe.name)]  # judged before
    before, after = (
        BenchRow(name, _judged(0.9, 1.0).model_copy(update={"cosines": cosines}), "")
        for name, cosines in (("int8", (0.99, 0.98, 0.97)), ("trained", (0.995, 0.99, 0.985)))
    )
    assert compression.lessened(after, before) == "50% of the distance of int8 gone (50% to 50%)"
    assert compression.lessened(BenchRow("trained", None, "refused: diverged"), before) == "refused: diverged"


def test_the_table_has_a_cell_for_every_heading() -> None:
    rows = [BenchRow("student", _judged(0.9, 2.0), "x"), BenchRow("none", None, "refused: training diverged")]
    lines = compression.table(rows).splitlines()
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert "| 17.00 | 69.0 | 68.0 | 11.0 | 2.00 (0.50" in lines[2]
    assert lines[3].endswith("| refused: training diverged |")


LLAMA = Widths(
    model_type="llama", hidden=256, head_size=32, group=2, layers=(LayerWidths(heads=8, ffn=768),) * 4
)  # fmt: skip


def test_the_language_model_can_take_every_recipe(tmp_path: Path) -> None:
    found = language_recipes()
    assert len({recipe.name for recipe in found}) == len(found)
    for recipe in found:
        for quick in (False, True):
            steps = recipe.spec(tmp_path, quick).compress
            check(steps, LLAMA, 1, teacher=Teacher(LLAMA, "generation"))
            assert not quick or all(step.distil.minutes <= QUICK_MINUTES for step in steps if step.distil is not None)


def _language(ratio: float, speed: float) -> LanguageFigures:
    names = ("perplexity_ratio", "agreement", "divergence", "speed")
    interval = ConfidenceInterval(low=0.5, high=1.5)
    return LanguageFigures(
        directory=Path(), files=(), parameters=3_000_000, graph_bytes=12_000_000, stored_bytes=12_000_000,
        flops_per_token=6e6, tokens=100, losses=(4.0 + math.log(ratio),), reference_losses=(4.0,), agreement=(0.8,),
        divergence=(0.1,), speed=speed, executor="openvino", intervals=dict.fromkeys(names, interval),
    )  # fmt: skip


def test_a_language_recipe_that_misses_its_aim_is_refused_with_the_figure() -> None:
    recipe = LanguageBenchRecipe("less", aim={"max_perplexity_ratio": 1.15, "min_speedup": 1.1})
    assert language_verdict(recipe, _language(1.2, 1.0)) == (
        "refused: max_perplexity_ratio 1.200 of 1.15, min_speedup 1.000 of 1.1"
    )
    assert language_verdict(recipe, _language(1.1, 1.2)).startswith("meets max_perplexity_ratio 1.15 (1.100)")
    rows = [LanguageBenchRow("x", _language(1.1, 1.2), "y"), LanguageBenchRow("z", None, "refused: diverged")]
    lines = language_table(rows).splitlines()
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


def test_a_quick_run_without_the_language_model_says_so(tmp_path: Path) -> None:
    assert "`make demo-generate` trains it" in language_rows(tmp_path, True, "", lambda stage, message: None)


@pytest.mark.slow
def test_a_quick_run_judges_one_recipe(tmp_path: Path) -> None:
    recipe = next(recipe for recipe in recipes() if recipe.name == "FFN rank 256, plain SVD")
    row = compression.measured(recipe, True, tmp_path, lambda stage, message: None)
    assert row.verdict.startswith("refused: min_mean_cosine 0.")
