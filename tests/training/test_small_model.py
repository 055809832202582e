"""A small language model, trained for seconds: the same twice, loadable, better than it began."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders.artifacts import file_digest
from builders.errors import InputError, SpecError
from builders.judging import corpus
from builders.training.recipe import TrainingProgress, TrainingRecipe, TrainingReport
from builders.training.text import END_OF_TEXT_ID, batches, split, train_tokenizer
from measure.small_model.folder import held_out_rows, train_small_model
from measure.small_model.judging import windows

TINY = TrainingRecipe(
    vocabulary=320, hidden=32, layers=1, heads=4, kv_heads=2, ffn=64, context=32, steps=20, tokens_per_step=512,
    learning_rate=0.02, held_out_share=0.01,
)  # fmt: skip
TEXTS = ["def f(x):\n    return x", "naïve café, 日本語 🚣", " leading and trailing \t\n", ""]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingReport, list[TrainingProgress]]:
    seen: list[TrainingProgress] = []
    out = tmp_path_factory.mktemp("small") / "model"
    report = train_small_model(out, seen.append, TINY)
    return out, report, seen


def test_the_same_seed_gives_the_same_weights(
    trained: tuple[Path, TrainingReport, list[TrainingProgress]], tmp_path: Path
) -> None:
    again = train_small_model(tmp_path / "again", recipe=TINY)
    assert again.weights_sha256 == trained[1].weights_sha256 == file_digest(trained[0] / "model.safetensors")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (trained[0] / "tokenizer.json").read_bytes()
    assert again.curve == trained[1].curve


def test_another_seed_gives_other_weights(
    trained: tuple[Path, TrainingReport, list[TrainingProgress]], tmp_path: Path
) -> None:
    other = train_small_model(tmp_path / "other", recipe=TINY.model_copy(update={"seed": 1, "steps": 1}))
    assert other.curve[0].train != trained[1].curve[0].train  # of the first step, before any update


def test_the_loss_falls(trained: tuple[Path, TrainingReport, list[TrainingProgress]]) -> None:
    _, report, seen = trained
    uniform = math.log(TINY.vocabulary)
    assert report.curve[-1].held_out < report.curve[0].held_out < uniform + 0.2
    assert report.held_out.perplexity_per_token < 0.8 * TINY.vocabulary
    assert [progress.step for progress in seen] == list(range(1, TINY.steps + 1))
    assert report.curve[-1].tokens == TINY.steps * TINY.tokens_per_step


def test_transformers_loads_the_folder(trained: tuple[Path, TrainingReport, list[TrainingProgress]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, report, _ = trained
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "llama"
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == END_OF_TEXT_ID
    assert len(tokenizer) == model.config.vocab_size == TINY.vocabulary
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    rows = torch.from_numpy(held_out_rows(folder))
    assert rows.shape == ((report.held_out.tokens) // TINY.context, TINY.context + 1)
    with torch.no_grad():
        loss = model(input_ids=rows, labels=rows).loss.item()
    # The same but for the few tokens that fill no row.
    assert math.exp(loss) == pytest.approx(report.held_out.perplexity_per_token, rel=0.01)


def test_report_and_curve_stand_beside_the_weights(
    trained: tuple[Path, TrainingReport, list[TrainingProgress]],
) -> None:
    folder, report, _ = trained
    assert TrainingReport.model_validate_json((folder / "training.json").read_text()) == report
    page = (folder / "training.html").read_text()
    assert page.count("<circle") == 2 * len(report.curve)
    assert "http:" not in page
    assert "https:" not in page
    assert "<script" not in page
    assert json.loads((folder / "config.json").read_text())["num_key_value_heads"] == TINY.kv_heads


def test_no_prose_is_on_both_sides_of_the_split() -> None:
    learnt, held_out = split(corpus.documents(), 0.1)
    assert 0.05 < len(held_out) / (len(learnt) + len(held_out)) < 0.15
    assert not _paragraphs(learnt) & _paragraphs(held_out)


def _paragraphs(documents: list[corpus.Document]) -> set[str]:
    parts = (
        " ".join(part.split()) for document in documents for text in document.passages for part in text.split("\n\n")
    )
    return {part for part in parts if len(part) >= 40}


@settings(max_examples=50, deadline=None)
@given(length=st.integers(2, 200), context=st.integers(1, 40))
def test_each_token_is_judged_once(length: int, context: int) -> None:
    stream = np.arange(length)
    targets = [target for part in windows(stream, context) for row in part for target in row[1:]]
    assert targets == list(range(1, length))
    assert all((row[1:] == row[:-1] + 1).all() for part in windows(stream, context) for row in part)


@settings(max_examples=50, deadline=None)
@given(window=st.integers(1, 20), rows=st.integers(1, 5), seed=st.integers(0, 5))
def test_an_epoch_shows_no_target_twice(window: int, rows: int, seed: int) -> None:
    stream = np.arange(window * rows * 4 + window)
    source = batches(stream, window, rows, np.random.default_rng(seed))
    epoch = [next(source) for _ in range(3)]
    assert all(batch.shape == (rows, window + 1) for batch in epoch)
    targets = np.concatenate([batch[:, 1:].ravel() for batch in epoch])
    assert len(set(targets)) == len(targets)


def test_the_tokenizer_has_every_byte() -> None:
    tokenizer = train_tokenizer(corpus.documents()[:3], 300)
    text = bytes(range(256)).decode("latin-1")
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden": 36}, "hidden"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"tokens_per_step": 100}, "tokens_per_step"),
        ({"context": 33, "tokens_per_step": 66}, "context"),
        ({"steps": 0}, "steps"),
        ({"vocabulary": 100}, "vocabulary"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"held_out_share": 1.0}, "held_out_share"),
        ({"layer": 2}, "layer"),
    ],
)
def test_sizes_that_make_no_llama_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises((SpecError, ValueError), match=said):
        TrainingRecipe(**{**TINY.model_dump(), **change})


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(InputError, match="already"):
        train_small_model(tmp_path, recipe=TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_too_little_text_leaves_nothing_behind(tmp_path: Path) -> None:
    huge = TINY.model_copy(update={"context": 1 << 20, "tokens_per_step": 1 << 20})
    with pytest.raises(InputError, match="to learn from"):
        train_small_model(tmp_path / "out", recipe=huge)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_training_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(progress: TrainingProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_small_model(tmp_path / "out", interrupt, TINY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
def test_the_optimiser_is_muon_but_for_rounding(arithmetic: str) -> None:
    """torch's own, which computes in bf16, is the reference."""
    import torch

    from builders.training.muon import Muon

    generator = torch.Generator().manual_seed(0)
    for shape in ((24, 40), (40, 24), (32, 32)):
        start = torch.randn(shape, generator=generator)
        ours, theirs = (start.clone().requires_grad_() for _ in range(2))
        optimisers = [
            Muon([ours], lr=0.02, weight_decay=0.1, dtype=getattr(torch, arithmetic)),
            torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        ]
        for _ in range(4):
            gradient = torch.randn(shape, generator=generator)
            for parameter, optimiser in zip((ours, theirs), optimisers, strict=True):
                parameter.grad = gradient.clone()
                optimiser.step()
        moved = (theirs - start).norm()
        assert (ours - theirs).norm() < 0.03 * moved  # of bf16's 8 bits, over five rounds
        assert ours.dtype == torch.float32


def test_an_update_is_equally_long_in_every_direction() -> None:
    import torch

    from builders.training.muon import orthogonal

    values = torch.linalg.svdvals(orthogonal(torch.randn(16, 48, generator=torch.Generator().manual_seed(1))))
    assert 0.5 < float(values.min()) <= float(values.max()) < 1.3
    assert not orthogonal(torch.zeros(4, 8)).any()


def test_a_cpu_without_bf16_makes_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from builders.store.processor import read_processor
    from builders.training import arithmetic, language

    steps = {}
    for flags in ("avx2 fma", "avx2 fma avx512_bf16"):
        processor = read_processor(f"flags : {flags}", (), 2)
        monkeypatch.setattr(arithmetic, "this_processor", lambda processor=processor: processor)
        steps[arithmetic.arithmetic()] = language.recipe_here().steps
    assert steps == {"float32": language.FP32_STEPS, "bfloat16": TrainingRecipe().steps}
    assert steps["float32"] < steps["bfloat16"]
