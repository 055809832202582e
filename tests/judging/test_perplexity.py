"""The perplexity of a graph is that of its model, and nothing that is not a number passes a budget."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from builders.artifacts import GenerationQuality
from builders.errors import InputError, QualityError
from builders.judging.perplexity import (
    logits_perplexity,
    model_logits,
    model_perplexity,
    require_perplexity,
    token_rows,
)
from tests.generators import TEXTS, generator_checkpoint, make_generator, save_generator


def test_perplexity_of_a_model_is_transformers_own_loss(tmp_path: Path) -> None:
    import torch

    rows = token_rows(generator_checkpoint(save_generator(tmp_path, "llama")), TEXTS, 8, 40)
    model = make_generator("llama")
    with torch.no_grad():
        loss = model(input_ids=torch.from_numpy(rows), labels=torch.from_numpy(rows)).loss
    assert model_perplexity(model, rows) == pytest.approx(math.exp(loss), rel=1e-5)
    assert logits_perplexity(model_logits(model, rows), rows) == pytest.approx(math.exp(loss), rel=1e-5)


def test_rows_begin_as_texts_do_and_never_pass_the_length(tmp_path: Path) -> None:
    folder = save_generator(tmp_path, "llama")
    rows = token_rows(generator_checkpoint(folder), TEXTS)
    assert rows.shape == (32, 96)  # the checkpoint's positions
    assert (rows[:, 0] == 2).all()
    assert (rows[:, 1:] == 3).any()  # texts end
    assert token_rows(generator_checkpoint(folder), TEXTS[:8]).shape[0] < 32
    with pytest.raises(InputError, match="expected at least 95"):
        token_rows(generator_checkpoint(folder), ["a short text"])


@pytest.mark.parametrize("perplexity", [20.5, math.nan, math.inf])
def test_a_missed_budget_gives_the_figures(perplexity: float) -> None:
    quality = GenerationQuality(perplexity=perplexity, reference_perplexity=20, tokens=4064, executor="test")
    with pytest.raises(QualityError, match=r"4064 held-out tokens .*20\.000 of the fp32 checkpoint, budget 1\.02"):
        require_perplexity({"GPTQ": quality}, 1.02, "w4 graph")


def test_a_budget_that_is_met() -> None:
    quality = GenerationQuality(perplexity=20.1, reference_perplexity=20, tokens=10, executor="test")
    assert require_perplexity({"worse": quality, "better": quality}, 1.01, "w8 graph") is quality
    assert quality.ratio == pytest.approx(1.005)


def test_logits_without_a_number_have_no_perplexity() -> None:
    rows = np.ones((2, 4), np.int64)
    logits = np.zeros((2, 4, 8), np.float32)
    assert logits_perplexity(logits, rows) == pytest.approx(8)
    logits[1, 2, 3] = np.nan
    assert math.isnan(logits_perplexity(logits, rows))
