"""The sampler against a plain reference, one row and one token at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime.errors import BadRequest
from runtime.generation.request import Limits, Request, SamplingParams
from runtime.generation.sampler import sample, score_prompt
from runtime.generation.sequence import TokenSequence

VOCABULARY = 300
LIMITS = Limits(VOCABULARY, 512, 16, end_ids=(2,))


def sequence(params: SamplingParams, output: list[int], prompt: tuple[int, ...] = (5, 6, 5)) -> TokenSequence:
    made = TokenSequence.start(Request(1, np.array(prompt), params), LIMITS, None, 0.0)
    for token in output:
        made.buffer[made.length] = token
        made.length += 1
    return made


def reference(logits: NDArray[np.float32], params: SamplingParams, output: list[int]) -> dict[int, float]:
    """Probabilities of the tokens that may be drawn."""
    scores = [float(value) for value in logits]
    for token, bias in params.logit_bias:
        scores[token] += bias
    for token in {5, 6, *output}:
        factor = params.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token in set(output):
        scores[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    if len(output) < params.min_tokens:
        scores[2] = -math.inf
    if params.temperature == 0:
        return {scores.index(max(scores)): 1.0}
    highest = max(scores)
    weights = {token: math.exp((score - highest) / params.temperature) for token, score in enumerate(scores)}
    if params.top_k:
        least = sorted(weights.values())[-min(params.top_k, VOCABULARY)]
        weights = {token: weight for token, weight in weights.items() if weight >= least}
    if params.top_p < 1:
        total, reached, least = sum(weights.values()), 0.0, 0.0
        for weight in sorted(weights.values(), reverse=True):
            reached, least = reached + weight, weight
            if reached >= params.top_p * total:
                break
        weights = {token: weight for token, weight in weights.items() if weight >= least}
    weights = {token: weight for token, weight in weights.items() if weight >= params.min_p and weight > 0}
    total = sum(weights.values())
    return {token: weight / total for token, weight in weights.items()}


PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.just(20),
    min_tokens=st.sampled_from([0, 4]),
    temperature=st.sampled_from([0.0, 0.01, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 5, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.31, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.4, -0.4]),
    seed=st.integers(0, 99),
    logit_bias=st.sampled_from([(), ((5, -100.0),), ((5, 2.5), (0, -1.0), (299, 100.0))]),
    logprobs=st.just(True),
    top_logprobs=st.sampled_from([0, 1, 5, 20]),
) | st.builds(SamplingParams, temperature=st.sampled_from([0.0, 1.0]), seed=st.integers(0, 9))
ROW = st.tuples(PARAMS, st.lists(st.integers(0, 9), max_size=8))


@settings(deadline=None, max_examples=150)
@given(rows=st.lists(ROW, min_size=1, max_size=5), seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 1.0, 8.0]))
def test_every_row_draws_by_its_own_inverse_distribution(
    rows: list[tuple[SamplingParams, list[int]]], seed: int, scale: float
) -> None:
    logits = (np.random.default_rng(seed).standard_normal((len(rows), VOCABULARY)) * scale).astype(np.float32)
    before = logits.copy()
    tokens, logprobs, tops = sample(logits, [sequence(params, output) for params, output in rows])
    assert (logits == before).all()
    for index, (params, output) in enumerate(rows):
        allowed = reference(logits[index], params, output)
        assert tokens[index] in allowed
        if params.temperature > 0:
            uniform = np.random.Generator(np.random.Philox(params.seed)).random()
            below = sum(weight for token, weight in allowed.items() if token < tokens[index])
            assert below - 1e-4 <= uniform <= below + allowed[tokens[index]] + 1e-4
        exact = logits[index].astype(np.float64)
        expected = exact[tokens[index]] - np.log(np.exp(exact).sum()) if params.logprobs else 0.0
        assert logprobs[index] == pytest.approx(expected, abs=1e-3)
        assert [token for token, _ in tops[index]] == np.argsort(-exact, kind="stable")[: params.top_logprobs].tolist()
        told = exact[[token for token, _ in tops[index]]] - np.log(np.exp(exact).sum())
        assert [value for _, value in tops[index]] == pytest.approx(told.tolist(), abs=1e-3)
        assert dict(tops[index]).get(tokens[index], logprobs[index]) == logprobs[index], "the same float"


def test_frequencies_are_the_probabilities() -> None:
    logits = np.random.default_rng(3).standard_normal((1, VOCABULARY)).astype(np.float32)
    params = SamplingParams(max_tokens=20, temperature=0.6, top_k=6, seed=11)
    drawing = sequence(params, [])
    drawn = [sample(logits, [drawing])[0][0] for _ in range(4000)]
    for token, probability in reference(logits[0], params, []).items():
        deviation = math.sqrt(4000 * probability * (1 - probability))
        assert abs(drawn.count(token) - 4000 * probability) < 5 * deviation


def test_a_tiny_temperature_is_greedy_and_overflows_nowhere() -> None:
    logits = (np.random.default_rng(4).standard_normal((2, VOCABULARY)) * 1000).astype(np.float32)
    cold = sequence(SamplingParams(max_tokens=20, temperature=1e-9, seed=1), [])
    with np.errstate(over="raise", invalid="raise"):
        assert sample(logits, [cold, cold])[0] == logits.argmax(axis=1).tolist()


def test_rows_that_are_no_numbers_give_no_token() -> None:
    logits = np.zeros((3, VOCABULARY), np.float32)
    logits[1, 7] = np.nan
    logits[2] = np.inf
    drawing = SamplingParams(max_tokens=20, temperature=1.0, seed=1)
    assert sample(logits, [sequence(SamplingParams(max_tokens=20), [])] * 3)[0] == [0, -1, -1]
    assert sample(logits, [sequence(drawing, []) for _ in range(3)])[0][1:] == [-1, -1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("max_tokens", -1), ("min_tokens", -1), ("temperature", math.nan), ("temperature", -0.1),
        ("temperature", math.inf), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("top_p", math.nan), ("min_p", -0.1),
        ("min_p", math.nan), ("repetition_penalty", 0.0), ("repetition_penalty", math.nan),
        ("presence_penalty", math.inf), ("frequency_penalty", math.nan), ("seed", -1), ("stop", ("",)),
        ("stop", ("x" * 300,)), ("stop", ("x",) * 17), ("top_logprobs", 2), ("logit_bias", ((3, math.nan),)),
        ("logit_bias", ((3, 101.0),)), ("logit_bias", ((3, 1.0), (3, 2.0))),
        ("logit_bias", tuple((token, 1.0) for token in range(1025))),
    ],
)  # fmt: skip
def test_values_that_mean_nothing(name: str, value: object) -> None:
    said = {
        "min_tokens": "min_length", "seed": "random_seed", "stop": "stop_words", "top_logprobs": "top_log_probs",
        "logit_bias": "logit_bias_",
    }.get(name, name)  # fmt: skip
    with pytest.raises(BadRequest, match=said):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_a_token_that_cannot_be_is_told_as_a_number() -> None:
    logits = np.full((1, VOCABULARY), -np.inf, np.float32)
    logits[0, [7, 9]] = 1.0
    params = SamplingParams(max_tokens=20, logprobs=True, top_logprobs=3)
    tokens, logprobs, tops = sample(logits, [sequence(params, [])])
    assert (tokens, tops[0][0][0], tops[0][1][0], tops[0][2]) == ([7], 7, 9, (0, -9999.0))
    assert logprobs[0] == tops[0][0][1] == pytest.approx(math.log(0.5))


@pytest.mark.parametrize("count", [0, 3, 20])
def test_tokens_that_were_given_are_scored_by_the_row_before_them(count: int) -> None:
    logits = np.random.default_rng(5).standard_normal((4, VOCABULARY)).astype(np.float32)
    scored = score_prompt(logits, np.array([3, 299, 0]), count)
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    assert [item.token for item in scored] == [3, 299, 0]
    assert [item.logprob for item in scored] == pytest.approx([exact[0, 3], exact[1, 299], exact[2, 0]], abs=1e-5)
    assert [len(item.top) for item in scored] == [count] * 3
    logits[1, 5] = np.nan
    with pytest.raises(ValueError, match="not numbers"):
        score_prompt(logits, np.array([3, 299, 0]), count)
