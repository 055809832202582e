"""Low rank against the singular value decomposition itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from builders.checkpoint.widths import layers_of, widths_of_model
from builders.compress.low_rank import share_out
from builders.compress.plan import break_even
from builders.errors import SpecError
from tests.compress.tiny import Tiny


def test_plain_is_the_truncated_decomposition(tiny_bert: Path) -> None:
    tiny = Tiny.of(tiny_bert)
    weight = layers_of(tiny.model)[0].intermediate.dense.weight.detach().double().numpy()
    left, singular, right = np.linalg.svd(weight, full_matrices=False)
    tiny.carry_out({"low_rank": {"method": "plain", "rank": 8}})
    first, second = layers_of(tiny.model)[0].intermediate.dense
    product = (second.weight @ first.weight).detach().numpy()
    assert np.abs(product - (left[:, :8] * singular[:8]) @ right[:8]).max() < 1e-5


def test_whitened_loses_least_of_the_outputs(tiny_bert: Path) -> None:
    """On the inputs that it was made for, no other product of this rank does better; the plain one does worse."""
    errors = {}
    for method in ("plain", "whitened"):
        tiny = Tiny.of(tiny_bert)
        dense, inputs = layers_of(tiny.model)[0].intermediate.dense, []
        batches = tiny.batches(200)
        handle = dense.register_forward_pre_hook(lambda _, given, found=inputs: found.append(given[0]))
        tiny.outputs(batches)
        handle.remove()
        x = torch.cat([found[batch["attention_mask"].bool()] for found, batch in zip(inputs, batches, strict=True)])
        tiny.carry_out({"low_rank": {"method": method, "rank": 8, **({"tokens": 8000} if method != "plain" else {})}})
        with torch.no_grad():
            errors[method] = float((layers_of(tiny.model)[0].intermediate.dense(x) - dense(x)).square().mean())
    assert errors["whitened"] < errors["plain"]


def test_a_matrix_that_has_the_rank_loses_nothing(tiny_bert: Path) -> None:
    tiny = Tiny.of(tiny_bert)
    with torch.no_grad():
        for layer in layers_of(tiny.model):
            dense = layer.output.dense
            left, singular, right = torch.linalg.svd(dense.weight, full_matrices=False)
            dense.weight.copy_((left[:, :8] * singular[:8]) @ right[:8])
            layer.intermediate.dense.weight[8:] = 0
    before = tiny.outputs()
    tiny.carry_out({"low_rank": {"rank": 8, "tokens": 2000}})
    assert [layer.ranks for layer in widths_of_model(tiny.model).layers] == [{"ffn_in": 8, "ffn_out": 8}] * 2
    assert np.abs(tiny.outputs() - before).max() < 1e-4


def test_auto_gives_ranks_to_those_that_need_them() -> None:
    flat, steep = np.ones(64), 0.5 ** np.arange(64)
    sizes = {(0, "ffn_in"): (64, 256), (1, "ffn_in"): (64, 256)}
    found = share_out({(0, "ffn_in"): flat, (1, "ffn_in"): steep}, sizes, 0.4, 8)
    assert found == {(1, "ffn_in"): 8}  # the flat one stays whole
    left = 64 * 256 + 8 * (64 + 256)
    assert left <= 0.6 * 2 * 64 * 256


def test_auto_says_how_much_can_go() -> None:
    with pytest.raises(SpecError, match=r"low_rank.amount: got 0.9; expected at most 0.844"):
        share_out({(0, "ffn_in"): np.ones(64)}, {(0, "ffn_in"): (64, 256)}, 0.9, 8)


def test_break_even_holds_no_more_weights() -> None:
    assert break_even(384, 1536) == 307
    assert 307 * (384 + 1536) <= 384 * 1536 < 308 * (384 + 1536)
