"""Peers of `make bench-generation`: each gives figures or the reason why not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from builders.training.recipe import TrainingRecipe
from measure.bench.generation_peer_process import PEERS, Timing, Workload, measure, perplexity
from measure.bench.generation_peers import run_all
from measure.bench.random_llama import random_llama, random_prompts

# 128 wide, and blocks of 32: what every peer's converter takes.
TINY = TrainingRecipe(
    vocabulary=640, hidden=128, layers=1, heads=4, kv_heads=2, ffn=256, context=64, tokens_per_step=64
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(tmp_path_factory.mktemp("random") / "llama", TINY)


def test_the_random_model_is_a_folder_that_transformers_loads(model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    assert network.config.vocab_size == len(tokenizer) == TINY.vocabulary
    assert tokenizer.decode(tokenizer("Return the sum.")["input_ids"]) == "Return the sum."
    assert random_llama(model, TINY) == model


def test_rates_come_from_times() -> None:
    timing = Timing(batch=8, new_tokens=64, first_s=1.0, total_s=5.0)
    assert timing.tokens_per_s == 8 * 64 / 5
    assert timing.decode_tokens_per_s == 8 * 63 / 4
    assert Timing(1, 64, first_s=2.0, total_s=2.0).decode_tokens_per_s is None


def test_no_two_rounds_share_a_prompt() -> None:
    seen: list[bytes] = []

    def generate(prompts: NDArray[np.int64], new_tokens: int) -> NDArray[np.int64]:
        seen.extend(row.tobytes() for row in prompts)
        return np.zeros((len(prompts), new_tokens), np.int64)

    timings = measure(generate, Workload(batches=(1, 3), prompt_tokens=5, new_tokens=2, rounds=2), 1000)
    assert [timing.batch for timing in timings] == [1, 3]
    assert len(seen) == len(set(seen)) == 2 * 3 * (1 + 3)


def test_a_peer_that_stops_early_is_no_peer() -> None:
    with pytest.raises(RuntimeError, match=r"\(1, 3\)"):
        measure(lambda prompts, new_tokens: prompts[:, :3], Workload(batches=(1,), new_tokens=4), 1000)


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary() -> None:
    rows = random_prompts(3, 9, 50)
    assert perplexity(lambda ids: np.zeros((ids.shape[1], 50), np.float32), rows) == pytest.approx(50)


def test_a_peer_that_takes_too_long_is_left_out_with_the_reason(model: Path, tmp_path: Path) -> None:
    found = run_all(model, tmp_path, Workload(batches=(1,)), timeout_s=0.01)
    assert [peer.name for peer in found] == list(PEERS)
    assert found[0].skipped == "not done after 0 s"
    assert all(peer.skipped and not peer.timings for peer in found)


@pytest.mark.slow
def test_installed_peers_are_measured(model: Path, tmp_path: Path) -> None:
    judged = tmp_path / "rows.npy"
    np.save(judged, random_prompts(2, 33, TINY.vocabulary))
    workload = Workload(batches=(1, 2), prompt_tokens=8, new_tokens=4, rounds=1, judged=str(judged))
    found = {peer.name: peer for peer in run_all(model, tmp_path / "work", workload, timeout_s=300)}
    exact = found["transformers fp32"].perplexity
    assert exact is not None
    assert exact > TINY.vocabulary / 2  # random weights
    for peer in found.values():
        assert peer.skipped or [timing.batch for timing in peer.timings] == [1, 2]
        if peer.perplexity is not None:
            assert math.isclose(peer.perplexity, exact, rel_tol=0.05)
