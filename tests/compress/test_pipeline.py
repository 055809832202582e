"""`compress` as a stage: cached, resumed, judged against the original, and the step at fault named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builders import pipeline
from builders.artifacts import Quality
from builders.commands import compressing as command
from builders.errors import InputError, QualityError, SpecError
from builders.pipeline.judged import StepFigures, at_fault
from builders.pipeline.recipe import judged_recipe, layers_as_small
from builders.spec import DeploymentSpec
from tests.compress.test_spec import WIDTHS
from tests.compress.tiny import compressing
from tests.conftest import save_tiny

PRUNE: dict[str, object] = {"prune": {"amount": 0.4, "tokens": 1000}}
FACTOR: dict[str, object] = {"low_rank": {"rank": 8, "tokens": 1000}}


def _said(spec: DeploymentSpec, root: Path, until: pipeline.Stage = "compress") -> tuple[pipeline.Build, list[str]]:
    said: list[str] = []
    return pipeline.build(spec, "cpu", root, until, lambda stage, message: said.append(f"{stage} {message}")), said


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all: what one test has built is there for the next, as for users."""
    return tmp_path_factory.mktemp("compress")


def test_steps_are_made_once_and_a_new_one_starts_from_the_last(tiny_bert: Path, root: Path) -> None:
    first, _ = _said(compressing(tiny_bert, [PRUNE]), root)
    assert first.original is not None
    assert first.checkpoint == first.steps[-1]
    assert first.checkpoint.parameters < first.original.parameters
    there = set((root / "store" / "compress").iterdir())
    again, said = _said(compressing(tiny_bert, [PRUNE, FACTOR]), root)
    assert [line for line in said if "step 0: prune: heads 4 ->" in line and "(unchanged)" in line]
    assert again.steps[0] == first.steps[0]
    assert again.steps[1].digest != again.steps[0].digest
    assert {found.name for found in (root / "store" / "compress").iterdir()} > {found.name for found in there}
    _, said = _said(compressing(tiny_bert, [PRUNE, FACTOR]), root)
    assert [line for line in said if "step 1: low_rank: ranks of" in line and "(unchanged)" in line]


def test_the_whole_way_with_ranks(tiny_bert: Path, root: Path) -> None:
    """Precision's own budget is against the compressed fp32 graph, and the version carries its proof."""
    spec = compressing(tiny_bert, [PRUNE, FACTOR], parallel={"tensor": 2}, engine={"targets": ["sm89"]})
    built, _ = _said(spec, root, "repository")
    assert built.served is not None
    assert built.served.worst_cosine > 0.9999  # type: ignore[union-attr]
    assert built.partition is not None
    assert built.entry is not None


def test_over_budget_the_step_at_fault_is_named(tiny_bert: Path, root: Path) -> None:
    spec = compressing(tiny_bert, [PRUNE, FACTOR], budget={"min_mean_cosine": 0.99999})
    with pytest.raises(QualityError) as caught:
        _said(spec, root)
    assert "budget.min_mean_cosine is 0.99999" in str(caught.value)
    assert "step 0 (prune) is at fault (after each step: prune 0.9" in str(caught.value)
    assert caught.value.exit_code == 1


def _judged(tmp_path: Path, cosine: float, speed: float) -> StepFigures:
    quality = Quality(mean_cosine=cosine, worst_cosine=cosine, max_abs_difference=0, texts=8, executor="x")
    return StepFigures(
        directory=tmp_path, files=(), parameters=1, graph_bytes=1, stored_bytes=1, flops_per_token=1, quality=quality,
        cosines=(), spearman=None, retrieval=None, mrr_ratio=None, speeds={"openvino": speed}, intervals={},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("cosines", "speed", "said"),
    [
        ([0.95, 0.80], 2.0, "step 1 (low_rank) is at fault (after each step: prune 0.9500, low_rank 0.8000)"),
        ([0.80, 0.85], 2.0, "step 0 (prune) is at fault"),
        ([0.80, 0.95], 2.0, None),  # the second made good what the first broke
        ([float("nan")] * 2, 2.0, "step 0 (prune)"),
        ([0.95, 0.95], 1.2, "budget.min_speedup is 1.5, and 1.2000 is left: step 1"),
    ],
)
def test_the_step_since_which_it_is_missed(
    tiny_bert: Path, tmp_path: Path, cosines: list[float], speed: float, said: str | None
) -> None:
    spec = compressing(tiny_bert, [PRUNE, FACTOR], budget={"min_mean_cosine": 0.9, "min_speedup": 1.5})
    found = at_fault(spec, [_judged(tmp_path, cosine, speed) for cosine in cosines])
    assert (found is None) if said is None else (found is not None and said in found)


def test_a_recipe_stands_beside_what_is_free(
    tiny_bert: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = compressing(tiny_bert, [PRUNE])
    recipe = judged_recipe(spec, root)
    assert [row.name for row in recipe.rows] == ["original", "0 prune", "truncate to layers 0", "static"]
    original, pruned, _, static = (row.judged for row in recipe.rows)
    assert original.quality is not None
    assert original.quality.worst_cosine > 0.99999
    assert original.mrr_ratio == 1
    assert static.flops_per_token == 0
    assert static.parameters < original.parameters
    rounds = static.intervals["x onnxruntime"]
    assert rounds.low <= static.speeds["onnxruntime"] <= rounds.high
    assert pruned.parameters < original.parameters
    assert pruned.retrieval is not None
    assert pruned.retrieval.pairs >= 700
    assert set(pruned.speeds) == {"openvino", "onnxruntime"}
    file = tmp_path / "spec.yaml"
    file.write_text(spec.model_dump_json(exclude_defaults=True))
    command.compress(str(file), root, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["fault"] is None
    assert [row["name"] for row in found["rows"]] == [row.name for row in recipe.rows]
    command.compress(str(file), root, as_json=False)
    assert "truncate" in capsys.readouterr().out


def test_truncation_is_as_small_as_the_recipe() -> None:
    weights = sum(inputs * outputs for _, _, (inputs, outputs) in WIDTHS.matrices())
    assert layers_as_small(WIDTHS, weights // 2) == (0, 2, 5)
    assert layers_as_small(WIDTHS, 0) == (0, 1, 2, 4, 5)
    assert layers_as_small(WIDTHS, weights) == (0,)


def test_a_classifier_is_pruned_by_its_labels(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "m", "bert", "classification")
    labels = tmp_path / "labels.tsv"
    labels.write_text("".join(f"{number % 3}\ttext about {number} things\n" for number in range(30)))
    taylor = {"prune": {"amount": 0.4, "importance": "taylor", "labels": str(labels)}}
    built, _ = _said(compressing(source, [taylor], "classification"), tmp_path)
    assert built.checkpoint.labels == 3
    labels.write_text("7\tno such label\n")
    with pytest.raises(InputError, match="got '7'; expected a number under 3, a tab and a text"):
        _said(compressing(source, [taylor], "classification"), tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "got 0 different texts"), (b"one line\n", "got 1 different texts"), (b"\xff\xfe\x00", "UTF-8 file")],
)
def test_texts_that_are_none(tiny_bert: Path, tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes(content)
    spec = compressing(tiny_bert, [PRUNE], precision={"calibration_texts": str(file)})
    with pytest.raises(InputError) as caught:
        _said(spec, tmp_path)
    assert said in str(caught.value)


def test_texts_that_are_too_few(tiny_bert: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"this is the text of line {number}\n" for number in range(500)))
    step = {"prune": {"amount": 0.4, "importance": "magnitude", "refit": "least_squares"}}
    with pytest.raises(InputError, match=r"expected at least 20000 \(prune.refit_tokens\)"):
        _said(compressing(tiny_bert, [step], precision={"calibration_texts": str(file)}), tmp_path)


def test_a_recipe_without_steps(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="got no steps"):
        judged_recipe(compressing(tiny_bert, []), tmp_path)


def test_int8_of_a_pruned_model_is_judged_against_the_pruned_one(tiny_bert: Path, root: Path) -> None:
    """Within its budget, or refused with its figures: precision's, against the fp32 graph of what prune left."""
    loose = {"cpu": "int8", "min_mean_cosine": 0.5, "min_worst_cosine": 0.0}
    built, _ = _said(compressing(tiny_bert, [PRUNE], precision=loose), root, "qualify")
    assert isinstance(built.served, Quality)
    assert 0.5 <= built.served.mean_cosine < 1
    assert "DequantizeLinear" in built.graph("int8").operators
    assert built.graph("int8").source_digest == built.graph("fp16").digest
    assert built.graph("fp16").source_digest == built.checkpoint.digest != built.original.digest  # type: ignore[union-attr]
    strict = {"cpu": "int8", "min_mean_cosine": 0.9999999, "min_worst_cosine": 0.9999999}
    with pytest.raises(QualityError, match=r"int8 of .* after prune: .*min_mean_cosine=0\.9999999"):
        _said(compressing(tiny_bert, [PRUNE], precision=strict), root, "qualify")
