"""Pruning against a direct computation: the whole model with what goes set to zero."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders.checkpoint.widths import layers_of, widths_of_model
from builders.compress import importance, prune
from builders.compress.kept import kept
from builders.compress.refit import least_squares
from builders.compress.step import carry_out
from builders.compress.texts import Batch, CalibrationText
from builders.spec import StepSlice
from runtime.proof.judging import cosines
from tests.compress.tiny import BUDGET, Tiny
from tests.conftest import save_tiny

HEAD = 8  # of a tiny model: 32 / 4


@pytest.mark.parametrize(("model_type", "task"), [("bert", "embedding"), ("roberta", "classification")])
def test_a_pruned_model_is_the_whole_one_with_the_rest_masked(tmp_path: Path, model_type: str, task: str) -> None:
    tiny = Tiny.of(save_tiny(tmp_path / "m", model_type, task), task)
    heads, ffn = [np.array([0, 2]), np.array([3])], [np.arange(0, 64, 2), np.arange(5, 21)]
    masked = Tiny(tiny.checkpoint, copy.deepcopy(tiny.model))
    with torch.no_grad():
        for number, layer in enumerate(layers_of(masked.model)):
            lost = sorted(set(range(4)) - set(heads[number].tolist()))
            for head in lost:
                layer.attention.output.dense.weight[:, head * HEAD : (head + 1) * HEAD] = 0
            layer.output.dense.weight[:, sorted(set(range(64)) - set(ffn[number].tolist()))] = 0
    prune.keep(tiny.model, heads, ffn)
    assert [(layer.heads, layer.ffn) for layer in widths_of_model(tiny.model).layers] == [(2, 32), (1, 16)]
    assert sum(p.numel() for p in tiny.model.parameters()) < sum(p.numel() for p in masked.model.parameters())
    assert np.abs(tiny.outputs() - masked.outputs()).max() < 1e-5


def test_layers_go_whole(tiny_bert: Path) -> None:
    tiny, shorter = Tiny.of(tiny_bert), Tiny.of(tiny_bert)
    prune.keep_layers(tiny.model, [1])
    del layers_of(shorter.model)[0]
    assert np.abs(tiny.outputs() - shorter.outputs()).max() < 1e-6


def test_gauss_newton_is_the_squared_jacobian(tiny_bert: Path) -> None:
    """Of one text, over many random directions, against every derivative by itself."""
    tiny = Tiny.of(tiny_bert)
    (batch,) = tiny.batches(1)
    forward = tiny.forward_of(tiny.model)
    dense = layers_of(tiny.model)[0].attention.output.dense

    def outputs(mask: torch.Tensor) -> torch.Tensor:
        hook = dense.register_forward_pre_hook(lambda _, given: (given[0] * mask.repeat_interleave(HEAD),))
        try:
            return forward(**batch)[0]
        finally:
            hook.remove()

    exact = torch.autograd.functional.jacobian(outputs, torch.ones(4)).square().sum(0).numpy()
    many = {name: values.repeat(300, 1) for name, values in batch.items()}
    worth = importance.gauss_newton(tiny.model, forward, [many], seed=0)
    assert worth.heads[0] / (300 * importance.PROJECTIONS) == pytest.approx(exact, rel=0.3)
    assert [len(found) for found in worth.ffn] == [64, 64]


def test_taylor_is_the_slope_of_the_loss(tmp_path: Path) -> None:
    tiny = Tiny.of(save_tiny(tmp_path / "m", "bert", "classification"), "classification")
    (batch,), label = tiny.batches(1), torch.tensor([2])
    forward = tiny.forward_of(tiny.model)
    worth = importance.taylor(tiny.model, forward, [batch], [label])
    column = layers_of(tiny.model)[1].output.dense.weight[:, 5]
    losses = []
    with torch.no_grad():
        for scale in (1.01, 0.99 / 1.01):
            column *= scale
            losses.append(float(torch.nn.functional.cross_entropy(forward(**batch), label)))
    assert worth.ffn[1][5] == pytest.approx(abs(losses[0] - losses[1]) / 0.02, rel=0.05, abs=1e-4)


def test_what_is_worth_nothing_goes_first(tiny_bert: Path) -> None:
    tiny = Tiny.of(tiny_bert)
    with torch.no_grad():
        for layer in layers_of(tiny.model):
            layer.attention.output.dense.weight[:, :HEAD] = 0
            layer.output.dense.weight[:, 8:16] = 0
    before = tiny.outputs()
    notes = tiny.carry_out({"prune": {"heads": 3, "ffn": 56, "tokens": 1000}})
    assert notes == ["heads 4 -> 3; ffn 64 -> 56"]
    assert np.abs(tiny.outputs() - before).max() < 1e-5


def test_least_squares_find_what_a_twin_can_do(tiny_bert: Path) -> None:
    """Neurons 8..15 are twins of 0..7: without them, the others can do all of the work, once they are fitted."""
    tiny = Tiny.of(tiny_bert)
    with torch.no_grad():
        for layer in layers_of(tiny.model):
            up = layer.intermediate.dense
            up.weight[8:16], up.bias[8:16] = up.weight[:8], up.bias[:8]
    before, whole = tiny.outputs(), copy.deepcopy(tiny.model)
    prune.keep(tiny.model, [np.arange(4)] * 2, [np.delete(np.arange(64), range(8, 16))] * 2)
    plain = np.abs(tiny.outputs() - before).max()
    least_squares(tiny.model, tiny.forward_of(tiny.model), whole, tiny.forward_of(whole), range(2), tiny.batches(400))
    assert plain > 0.01
    assert np.abs(tiny.outputs() - before).max() < plain / 5


class _OneText:
    """Calibration text that teaches one text alone, and watches others."""

    def __init__(self, tiny: Tiny) -> None:
        self._texts = tiny.batches(64)

    def watched(self) -> list[Batch]:
        return self._texts[1:]

    def batches(self, tokens: int, key: str) -> list[Batch]:
        return [{name: values[:1] for name, values in self._texts[0].items()}] * 4


@pytest.mark.parametrize("one_text", [False, True])
def test_a_refit_goes_no_further_than_the_worst_text_bears(tiny_bert: Path, one_text: bool) -> None:
    """Taught one text alone, the whole way harms the others."""
    tiny, plain = Tiny.of(tiny_bert), Tiny.of(tiny_bert)
    step = {"heads": 2, "ffn": 32, "importance": "magnitude"}
    plain.carry_out({"prune": step})
    asked = StepSlice.model_validate({"prune": {**step, "refit": "least_squares"}})
    texts: Any = _OneText(tiny) if one_text else CalibrationText(tiny.checkpoint, BUDGET)
    note = carry_out(asked, tiny.model, tiny.forward_of, tiny.checkpoint, texts, 1)[-1]
    assert ("1 of the way" not in note) if one_text else note.startswith("refit kept")
    watched, whole = texts.watched(), Tiny.of(tiny_bert)
    before, after = (cosines(whole.outputs(watched), each.outputs(watched), by_label=False) for each in (plain, tiny))
    assert after.min() >= before.min()
    assert after.mean() > before.mean() or "refit undone" in note


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=8, max_size=8), min_size=1, max_size=4),
    st.sampled_from([1, 2, 4]),
    st.floats(0.05, 0.95),
    st.sampled_from(["global", "uniform"]),
)
def test_what_stays_comes_in_multiples(rows: list[list[float]], multiple: int, amount: float, ranking: str) -> None:
    scores = [np.array(row) for row in rows]
    found = kept(scores, ranking, amount, None, multiple)
    for layer, indices in zip(scores, found, strict=True):
        assert len(indices) >= multiple
        assert len(indices) % multiple == 0
        assert list(indices) == sorted(set(indices.tolist()))
        lost = np.delete(layer, indices)
        assert not len(lost) or layer[indices].min() >= lost.max()
    wanted = (1 - amount) * 8 * len(scores)
    room = multiple * len(scores) if ranking == "uniform" else multiple
    assert abs(sum(map(len, found)) - max(wanted, multiple * len(scores))) <= room


def test_global_ranking_takes_where_least_is_lost() -> None:
    scores = [np.array([9.0, 8, 7, 6]), np.array([1.0, 2, 3, 4])]
    assert [list(found) for found in kept(scores, "global", 0.375, None, 1)] == [[0, 1, 2, 3], [3]]
    assert [list(found) for found in kept(scores, "uniform", None, 2, 2)] == [[0, 1], [2, 3]]
