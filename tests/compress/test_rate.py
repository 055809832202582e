"""The learning rate where nobody gives one: the highest by which a short trial makes the model no worse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from builders.compress.rate import HIGHEST, LOWEST, rate_by_trial
from tests.compress.test_distil import _built, _notes
from tests.compress.test_distil import texts as texts


@pytest.mark.parametrize(
    ("losses", "rate"), [([0.9], HIGHEST), ([2.0, 0.9], HIGHEST / 4), ([2.0, float("inf")], LOWEST)]
)
def test_the_highest_that_makes_it_better(tmp_path: Path, losses: list[float], rate: float) -> None:
    """The weights are what they were, also where a trial was cut short; the second time nothing is tried."""
    model = torch.nn.Linear(3, 2)
    before = [parameter.clone() for parameter in model.parameters()]
    tried: list[float] = []

    def trial(rate: float) -> float:
        tried.append(rate)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += rate
        return losses[len(tried) - 1]

    keep = tmp_path / "scratch" / "rate.json"
    assert rate_by_trial(model, trial, 1.0, keep) == rate
    assert tried == [HIGHEST, HIGHEST / 4][: len(losses)]
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))
    assert rate_by_trial(model, trial, 1.0, keep) == rate
    assert len(tried) == len(losses)


def test_a_rate_that_is_given_is_taken_as_it_is(tiny_bert: Path, texts: Path, tmp_path: Path) -> None:
    training = {"tokens": 20_000, "text_tokens": 4_000, "batch_tokens": 512, "student_layers": [1]}
    tried = _notes(_built(tiny_bert, [{"distil": training}], texts, tmp_path / "tried"))
    assert "learning rate 0.001" in tried
    given = _notes(_built(tiny_bert, [{"distil": {**training, "learning_rate": 2e-4}}], texts, tmp_path / "given"))
    assert "learning rate 0.0002" in given
