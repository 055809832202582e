"""Recipes of `make bench-compression` for the small language model: rounded weights, fewer of them, and students.

Judged by the executor that serves, on documents that the model was not trained on, without the top-level modules by
which recipes calibrate and learn. Speed is of prompts and decoding together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builders.errors import CheckError
from builders.judging.corpus import Document
from builders.pipeline.compare import served
from builders.pipeline.compress import notes_of
from builders.pipeline.judged_language import LanguageFigures, judge_language, language_figures, missed_by_language
from builders.pipeline.result import Build, Report
from builders.spec import BudgetSlice, DeploymentSpec
from builders.store.store import Store
from builders.training.text import TokenIds
from measure.bench.compression_recipes import shortened
from measure.bench.compression_table import BenchRow, markdown, notes, spread, word
from measure.small_model.folder import held_out_rows, train_small_model

FOLDER = "small-model"  # of the build directory, as `make demo-generate` has it
CONTEXT = 512
ROWS = 32  # of the judged text, at most
_HEAD = ("x OpenVINO", "perplexity", "of the original's", "same next token", "divergence")


@dataclass(frozen=True)
class LanguageBenchRecipe:
    """As `BenchRecipe`, of the small language model."""

    name: str
    steps: tuple[dict[str, Any], ...] = ()
    precision: str = "fp32"
    rounding: str = "auto"
    aim: dict[str, float] = field(default_factory=dict)
    quick: bool = False

    @property
    def budget(self) -> BudgetSlice:
        return BudgetSlice.model_validate({"max_perplexity_ratio": 1e9, **self.aim})

    def spec(self, folder: Path, quick: bool = False) -> DeploymentSpec:
        steps = [shortened(step) for step in self.steps] if quick else list(self.steps)
        precision = {"cpu": self.precision, "max_perplexity_ratio": 2.0}
        return DeploymentSpec.model_validate(
            {
                "name": "bench-compression",
                "model": {"source": str(folder), "task": "generation", "max_length": CONTEXT},
                "compress": steps,
                "budget": self.budget.model_dump(exclude_defaults=True) if steps else None,
                "precision": precision if self.precision == "fp32" else {**precision, "rounding": self.rounding},
            }
        )


def language_recipes() -> tuple[LanguageBenchRecipe, ...]:
    """Layers 0, 1 and 3 stay of four; 576 neurons of 768 in each layer, on average."""
    fewer = {"prune": {"what": ["ffn"], "ffn": 576}}
    rank = {"low_rank": {"parts": "ffn", "rank": 128}}
    near = {"max_perplexity_ratio": 1.01}
    return (
        LanguageBenchRecipe("original", quick=True),
        LanguageBenchRecipe("w8, to the nearest", precision="w8", aim={"max_perplexity_ratio": 1.005}, quick=True),
        LanguageBenchRecipe("w4, to the nearest", precision="w4", rounding="nearest", quick=True),
        LanguageBenchRecipe("w4, GPTQ", precision="w4", rounding="gptq", aim=near, quick=True),
        LanguageBenchRecipe("w4, AWQ", precision="w4", rounding="awq", aim=near, quick=True),
        LanguageBenchRecipe(
            "w4, AWQ and GPTQ", precision="w4", rounding="awq+gptq", aim=near, quick=True
        ),
        LanguageBenchRecipe("layers 0, 1, 3, untrained", ({"prune": {"what": ["layers"], "keep_layers": [0, 1, 3]}},)),
        LanguageBenchRecipe(
            "student 0, 1, 3, 3 min", (_taught(3, student_layers=[0, 1, 3]),),
            aim={"max_perplexity_ratio": 1.05, "min_speedup": 1.2},
        ),
        LanguageBenchRecipe("FFN 576", (fewer,), quick=True),
        LanguageBenchRecipe(
            "FFN 576, each layer alike, by magnitude",
            ({"prune": {"what": ["ffn"], "ffn": 576, "importance": "magnitude", "ranking": "uniform"}},),
        ),
        LanguageBenchRecipe(
            "FFN 576, 2 min", (fewer, _taught(2)), aim={"max_perplexity_ratio": 1.03, "min_speedup": 1.05}, quick=True
        ),
        LanguageBenchRecipe("FFN 576, 2 min, w4", (fewer, _taught(2)), "w4", aim={"max_perplexity_ratio": 1.08}),
        LanguageBenchRecipe("FFN rank 128, whitened", (rank,)),
        LanguageBenchRecipe(
            "FFN rank 128, plain SVD", ({"low_rank": {"method": "plain", "parts": "ffn", "rank": 128}},),
            aim={"max_perplexity_ratio": 1.5},
        ),
        LanguageBenchRecipe("codebooks of 4 bits", ({"cluster": {"bits": 4}},)),
    )  # fmt: skip


def _taught(minutes: float, **more: Any) -> dict[str, Any]:
    return {"distil": {"minutes": minutes, "losses": {"soft_labels": 1.0}, **more}}


LanguageBenchRow = BenchRow[LanguageFigures]


def language_rows(root: Path, quick: bool, only: str, report: Report) -> str:
    """The table of all that were asked for, in Markdown; in a quick run without the model, a word on that."""
    asked = [each for each in language_recipes() if (each.quick or not quick) and only in each.name]
    folder = root / FOLDER
    if not asked:
        return ""
    if not (folder / "config.json").is_file():
        if quick:
            return f"No recipes of the small language model: it is not in {folder}. `make demo-generate` trains it."
        report("compress", f"the small language model is trained into {folder}")
        train_small_model(folder)
    store, judged_by = Store(root / "store"), held_out_rows(folder, _calibrates_nothing)[:ROWS]
    original = served(LanguageBenchRecipe("original").spec(folder), store, report)
    rows = []
    for number, recipe in enumerate(asked, 1):
        report("compress", f"language recipe {number} of {len(asked)}: {recipe.name}")
        rows.append(measured(recipe, original, judged_by, folder, quick, store, report))
    said = f"The small language model: {judged_by[:, 1:].size} tokens of documents that it was not trained on."
    return "\n".join([said, "", language_table(rows), "", *notes(rows)])


def _calibrates_nothing(document: Document) -> bool:
    return "/" in document.name or document.name.startswith("topic ")


def measured(
    recipe: LanguageBenchRecipe, original: Build, judged_by: TokenIds, folder: Path, quick: bool, store: Store,
    report: Report,
) -> LanguageBenchRow:  # fmt: skip
    """Against the original in fp32."""
    try:
        built = served(recipe.spec(folder, quick), store, report)
    except CheckError as error:
        return LanguageBenchRow(recipe.name, None, f"refused: {error}")
    judged = judge_language(original, built, store, judged_by)
    said = notes_of(built.checkpoint) if recipe.steps else []
    rounding = built.served_graph.rounding
    if rounding is not None:
        said.append(rounding.summary)
    return LanguageBenchRow(recipe.name, judged, language_verdict(recipe, judged), tuple(said))


def language_verdict(recipe: LanguageBenchRecipe, judged: LanguageFigures) -> str:
    if not recipe.aim:
        return ""
    budget = recipe.budget
    return word(recipe.aim, budget, missed_by_language(judged, budget), language_figures(judged))


def language_table(rows: Sequence[LanguageBenchRow]) -> str:
    """In Markdown, intervals in brackets."""
    return markdown(_HEAD, rows, _cells)


def _cells(found: LanguageFigures) -> tuple[str, ...]:
    return (
        spread(found, found.speed, "speed", 2),
        f"{found.perplexity:.2f}",
        spread(found, found.perplexity_ratio, "perplexity_ratio", 4),
        spread(found, found.mean_agreement, "agreement", 3),
        spread(found, found.mean_divergence, "divergence", 4),
    )
