"""The recipes of `make bench-compression`: each a spec's `compress`, the precision that is served, and an aim."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from builders.spec import BudgetSlice, DeploymentSpec, load_spec

PRESET = "minilm-small"
QUICK_MINUTES = 0.5  # of training, at most, in a quick run
_WIDTHS: dict[str, Any] = {"what": ["heads", "ffn"], "heads": 8, "ffn": 1088}
_REFIT = {"prune": {**_WIDTHS, "refit": "least_squares"}}
_RANK = {"low_rank": {"parts": "ffn", "rank": 256}}
_SMALLER = {"prune": {"what": ["ffn"], "ffn": 1152, "refit": "least_squares"}}


@dataclass(frozen=True)
class BenchRecipe:
    """`steps` and `qat` as a spec has them. `aim`: keys of a spec's `budget`; a recipe that misses one is refused.
    `against`: the recipe whose distance to the original it is to lessen. `quick`: a quick run has it too."""

    name: str
    steps: tuple[dict[str, Any], ...] = ()
    precision: str = "fp32"
    aim: dict[str, float] = field(default_factory=dict)
    quick: bool = False
    qat: dict[str, Any] | None = None
    rounding: str = "auto"
    blocks: str = "symmetric"
    against: str = ""

    def spec(self, quick: bool = False) -> DeploymentSpec:
        """On the model, the texts and the executor of the preset."""
        preset = load_spec(PRESET)
        steps = [shortened(step) for step in self.steps] if quick else list(self.steps)
        return DeploymentSpec.model_validate(
            {
                "name": "bench-compression",
                "model": preset.model.model_dump(),
                "compress": steps,
                "budget": self.budget.model_dump() if steps else None,
                "precision": {
                    "cpu": self.precision, "rounding": self.rounding, "blocks": self.blocks,
                    "qat": self._training(quick), "min_mean_cosine": 0.9, "min_worst_cosine": 0.8,
                },
                "serving": {"executor": preset.serving.executor, "length_buckets": preset.serving.length_buckets},
            }
        )  # fmt: skip

    @property
    def budget(self) -> BudgetSlice:
        return BudgetSlice.model_validate({"min_mean_cosine": 0.0, **self.aim})

    def _training(self, quick: bool) -> dict[str, Any] | None:
        if self.qat is None or not quick:
            return self.qat
        return {**self.qat, "minutes": min(self.qat["minutes"], QUICK_MINUTES)}


def shortened(step: dict[str, Any]) -> dict[str, Any]:
    """As a quick run has it."""
    if "distil" not in step:
        return step
    asked = step["distil"]
    return {"distil": {**asked, "minutes": min(asked["minutes"], QUICK_MINUTES), "text_tokens": 50_000}}


def recipes() -> tuple[BenchRecipe, ...]:
    """The preset's student is the very one that `trireme build` makes: a store has it once."""
    student = tuple(step.model_dump(mode="json", exclude_none=True) for step in load_spec(PRESET).compress)
    recovered = _recovery(student, 5)
    return (
        BenchRecipe("original", quick=True),
        BenchRecipe("original, bf16", precision="bf16"),
        BenchRecipe("original, w8", precision="w8"),
        BenchRecipe("original, w4, to the nearest", precision="w4", rounding="nearest", quick=True),
        BenchRecipe(
            "original, w4, GPTQ", precision="w4", rounding="gptq", against="original, w4, to the nearest",
            aim={"min_mean_cosine": 0.988}, quick=True,
        ),
        BenchRecipe("original, w4, AWQ", precision="w4", rounding="awq", against="original, w4, to the nearest"),
        BenchRecipe("original, w4, AWQ and GPTQ", precision="w4", rounding="awq+gptq", against="original, w4, GPTQ"),
        BenchRecipe(
            "original, w4, GPTQ, QAT 3 min", precision="w4", rounding="gptq", qat={"minutes": 3},
            against="original, w4, GPTQ",
        ),
        BenchRecipe(
            "original, w4, GPTQ, zero points", precision="w4", rounding="gptq", blocks="asymmetric",
            against="original, w4, GPTQ",
        ),
        BenchRecipe("original, int8, to the nearest", precision="int8", rounding="nearest"),
        BenchRecipe("original, int8", precision="int8", against="original, int8, to the nearest", quick=True),
        BenchRecipe(
            "original, int8, QAT 3 min", precision="int8", qat={"minutes": 3}, against="original, int8"
        ),
        BenchRecipe("layers 0, 2, 5, untrained", (_layers(0, 2, 5),), quick=True),
        BenchRecipe("layers 0, 2, 3, 5, untrained", (_layers(0, 2, 3, 5),)),
        BenchRecipe(
            "student 0, 2, 5", student, aim={"min_mean_cosine": 0.94, "min_mrr_ratio": 0.98, "min_speedup": 1.9},
            quick=True,
        ),
        BenchRecipe("student 0, 2, 5, int8", student, "int8", {"min_speedup": 3.0}),
        BenchRecipe("256 of 384 wide, 3 min", (_recovery(student, 3, student_width=256),)),
        BenchRecipe("student 0, 2, 5, codebooks of 4 bits", (*student, {"cluster": {"bits": 4}})),
        BenchRecipe("heads 8, FFN 1088", ({"prune": _WIDTHS},)),
        BenchRecipe("heads 8, FFN 1088, each layer alike", ({"prune": {**_WIDTHS, "ranking": "uniform"}},)),
        BenchRecipe("heads 8, FFN 1088, by magnitude", ({"prune": {**_WIDTHS, "importance": "magnitude"}},)),
        BenchRecipe("heads 8, FFN 1088, refit", (_REFIT,), quick=True),
        BenchRecipe(
            "heads 8, FFN 1088, refit, 5 min", (_REFIT, recovered), aim={"min_mean_cosine": 0.95, "min_speedup": 1.4}
        ),
        BenchRecipe("FFN rank 256, whitened", (_RANK,)),
        BenchRecipe(
            "FFN rank 256, whitened, 2 min", (_RANK, _recovery(student, 2)),
            aim={"min_mean_cosine": 0.97, "min_speedup": 1.15},
        ),
        BenchRecipe(
            "student, FFN 1152, rank 256, 5 min", (*student, _SMALLER, _RANK, recovered), aim={"min_speedup": 2.3}
        ),
        BenchRecipe("codebooks of 4 bits", ({"cluster": {"bits": 4}},), quick=True),
        BenchRecipe(
            "FFN rank 256, plain SVD",
            ({"low_rank": {"method": "plain", "parts": "ffn", "rank": 256}},),
            aim={"min_mean_cosine": 0.9}, quick=True,
        ),
        BenchRecipe(
            "half of the weights zero, by magnitude",
            ({"sparsify": {"pattern": "unstructured", "amount": 0.5, "method": "magnitude"}},),
            aim={"min_mean_cosine": 0.9, "min_speedup": 1.2}, quick=True,
        ),
        BenchRecipe(
            "half of the weights zero, more and more in 2 min",
            ({"distil": {**recovered["distil"], "minutes": 2, "sparsity": {"amount": 0.5}}},),
            aim={"min_mean_cosine": 0.9, "min_speedup": 1.2},
        ),
        BenchRecipe("first 3 layers, taught by the last, 2 min", (_exits(recovered, 2),)),
        BenchRecipe("2:4, SparseGPT", ({"sparsify": {"pattern": "2:4"}},), aim={"min_speedup": 1.2}),
    )  # fmt: skip


def _exits(training: dict[str, Any], minutes: float) -> dict[str, Any]:
    return {"distil": {**training["distil"], "minutes": minutes, "exits": [2, 3, 4], "exit": 3}}


def _layers(*numbers: int) -> dict[str, Any]:
    return {"prune": {"what": ["layers"], "keep_layers": list(numbers), "importance": "magnitude"}}


def _recovery(student: tuple[dict[str, Any], ...], minutes: float, **more: Any) -> dict[str, Any]:
    """The preset's training for what a step left, so many minutes long, with `more` keys."""
    asked = {key: value for key, value in student[0]["distil"].items() if key != "student_layers"}
    return {"distil": {**asked, "minutes": minutes, **more}}
