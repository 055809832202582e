"""Outputs whose tokens the caller has fixed: what a proof scores a served model with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from builders.judging.perplexity import continuation_losses
from runtime.errors import BadRequest
from runtime.generation.interface import read_request
from runtime.generation.request import SamplingParams
from tests.generation.setup import VOCABULARY, prompts, real_engine

pytest_plugins = ("tests.generation.fixtures",)
END = 2


def test_forced_tokens_come_out_with_the_graphs_own_log_probabilities(decoder_graph: Path) -> None:
    """Prompts of two chunks, rows that outgrow their pool, an end token in the middle, a free stream beside."""
    engine = real_engine(decoder_graph, (16, 64), 4, chunk=16, end_ids=(END,))
    rows = prompts(3)
    outputs = np.random.default_rng(1).integers(3, VOCABULARY, (3, 12))
    outputs[0, 5] = END
    order = [
        engine.submit(prompt, SamplingParams(max_tokens=12, forced=tuple(output), logprobs=True))
        for prompt, output in zip(rows, outputs.tolist(), strict=True)
    ]
    engine.submit(prompts(4)[3], SamplingParams(max_tokens=12))
    tokens: dict[int, list[int]] = {}
    logprobs: dict[int, list[float]] = {}
    while engine.step():
        for update in engine.take_updates():
            assert update.error is None
            tokens.setdefault(update.request, []).extend(update.tokens)
            logprobs.setdefault(update.request, []).extend(update.logprobs)
    assert [tokens[number] for number in order] == outputs.tolist()
    lengths = np.array([len(row) for row in rows])
    padded = np.stack([np.pad(row, (0, int(lengths.max()) - len(row))) for row in rows])
    expected = -continuation_losses(decoder_graph, padded, lengths, outputs)
    assert np.array([logprobs[number] for number in order]) == pytest.approx(expected, abs=1e-3)


def test_a_request_with_forced_tokens() -> None:
    text, forced = np.array([[b"a text"]], np.object_), np.array([[5, 6, 7]], np.int32)
    params = read_request({"text_input": text, "forced_ids": forced}).params
    assert (params.forced, params.max_tokens, params.plain) == ((5, 6, 7), 3, False)
    with pytest.raises(BadRequest, match="forced_ids is 3 tokens; expected at most max_tokens"):
        read_request({"text_input": text, "forced_ids": forced, "max_tokens": np.array([[2]], np.int32)})


def test_a_forced_token_that_the_model_does_not_have(decoder_graph: Path) -> None:
    engine = real_engine(decoder_graph, (64,), 1)
    with pytest.raises(BadRequest, match=f"forced_ids holds {VOCABULARY}; token ids are 0 to {VOCABULARY - 1}"):
        engine.submit(prompts(1)[0], SamplingParams(max_tokens=1, forced=(VOCABULARY,)))
