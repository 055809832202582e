"""Zeros: which weights they take, and what is lost with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from builders.compress.inputs import Inputs, matrices_of, observed
from builders.compress.sparsify import _compensated, keep
from builders.spec import SparsifySlice
from tests.compress.tiny import Tiny

TWO_OF_FOUR = SparsifySlice()


def test_two_of_each_four_stay_and_the_largest_do() -> None:
    scores = torch.tensor([[1.0, 4, 3, 2, 9, 0, 0, 8]])
    assert keep(scores, TWO_OF_FOUR).tolist() == [[False, True, True, False, True, False, False, True]]
    half = SparsifySlice(pattern="unstructured", amount=0.75)
    assert keep(scores, half).tolist() == [[False] * 4 + [True] + [False] * 2 + [True]]


@pytest.mark.parametrize("asked", [TWO_OF_FOUR, SparsifySlice(pattern="unstructured", amount=0.5)])
def test_the_rest_of_a_row_makes_up_for_it(asked: SparsifySlice) -> None:
    """Less squared error of the outputs than the same share of zeros by size, and never more zeros than asked."""
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 160, generator=source, dtype=torch.float64)
    mixed = torch.randn(40, 160, generator=source, dtype=torch.float64)
    x = torch.randn(2000, 40, generator=source, dtype=torch.float64) @ mixed  # inputs that tell of each other
    x += torch.randn(2000, 160, generator=source, dtype=torch.float64)
    moment = x.T @ x / len(x)

    def lost(made: torch.Tensor) -> float:
        return float((x @ (made - weight).T).square().sum())

    made = _compensated(weight, moment, asked)
    assert int((made == 0).sum()) == weight.numel() // 2
    if asked.amount is None:
        assert bool(((made.reshape(24, -1, 4) == 0).sum(-1) == 2).all())
    by_input = weight * keep(weight.abs() * moment.diagonal().sqrt(), asked)
    assert lost(made) < 0.7 * lost(by_input) < lost(torch.zeros_like(weight))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_half_of_a_models_weights_become_zero(tiny_bert: Path, method: str) -> None:
    tiny = Tiny.of(tiny_bert)
    before = tiny.outputs()
    notes = tiny.carry_out({"sparsify": {"method": method, "tokens": 500}})
    assert notes == ["50.0% of the layers' weights are 0, which makes no file smaller and no answer faster here"]
    for module in matrices_of(tiny.model).values():
        assert bool(((module.weight.reshape(len(module.weight), -1, 4) == 0).sum(-1) >= 2).all())
    assert not np.allclose(before, tiny.outputs(), atol=1e-3)


def test_what_matrices_read_is_of_real_tokens_alone(tiny_bert: Path) -> None:
    tiny = Tiny.of(tiny_bert)
    name, module = next(iter(matrices_of(tiny.model).items()))
    batches, seen = tiny.batches(6), []
    with torch.no_grad():
        found: Inputs = observed({name: module}, tiny.forward_of(tiny.model), batches)[name]
        hook = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        for batch in batches:
            tiny.forward_of(tiny.model)(**batch)
        hook.remove()
    rows = torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(seen, batches, strict=True)])
    assert torch.allclose(found.mean.float(), rows.mean(0), atol=1e-5)
    assert torch.allclose(found.moment.float(), rows.T @ rows / len(rows), atol=1e-4)
    assert torch.allclose(found.covariance.float(), torch.cov(rows.T, correction=0), atol=1e-4)
