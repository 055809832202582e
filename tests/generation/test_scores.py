"""Log-probabilities of prompts and outputs are the model's own, whatever runs beside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from builders.export.decoder import export_decoder
from runtime.errors import BadRequest
from runtime.generation.engine import GenerationEngine, generate
from runtime.generation.executor.onnxruntime import OnnxRuntimeStepExecutor
from runtime.generation.executor.openvino import OpenVinoStepExecutor
from runtime.generation.request import Limits, Request, SamplingParams, Tokens, Update, coalesce
from runtime.generation.sequence import TokenSequence
from runtime.step import StepExecutor
from tests.generation.setup import engine_over
from tests.generators import TEXTS, eager_logits, generator_checkpoint, make_generator, save_generator

VOCABULARY = 400
CAPACITIES, SLOTS = (16, 96), 6
Open = Callable[[], StepExecutor]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    (folder / "graph").mkdir()
    checkpoint = generator_checkpoint(save_generator(folder / "checkpoint", "llama"))
    return export_decoder(checkpoint, "fp32", TEXTS, folder / "graph").file_path


@pytest.fixture(params=["openvino", "onnxruntime"])
def executor(request: pytest.FixtureRequest, graph: Path) -> StepExecutor:
    """The one gives the logits of every token of a chunk, the other goes token by token."""
    kind = OpenVinoStepExecutor if request.param == "openvino" else OnnxRuntimeStepExecutor
    return kind(graph, CAPACITIES, SLOTS + 2, threads=1)


@pytest.fixture(scope="module")
def exact() -> Callable[[Sequence[int]], NDArray[np.float64]]:
    """By transformers: [length, vocabulary], the log-probabilities of what follows each token."""
    model = make_generator("llama")

    def logprobs(tokens: Sequence[int]) -> NDArray[np.float64]:
        logits = eager_logits(model, input_ids=list(tokens)).astype(np.float64)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    return logprobs


def _prompts() -> list[Tokens]:
    random = np.random.default_rng(3)
    return [random.integers(4, VOCABULARY, size) for size in (1, 2, 40, 17, 70, 9)]


def _run(engine: GenerationEngine, asked: Sequence[tuple[Tokens, SamplingParams]]) -> list[Update]:
    order = [engine.submit(prompt, params) for prompt, params in asked]
    updates = []
    while engine.step():
        updates += engine.take_updates()
        engine.scheduler.check_integrity()
    joined = coalesce(updates)
    assert all(update.error is None for update in joined.values())
    return [joined[number] for number in order]


def _compare(update: Update, prompt: Tokens, params: SamplingParams, exact: Callable[..., Any]) -> None:
    """Everything that was told, with transformers."""
    tokens = [*prompt.tolist(), *update.tokens]
    expected = exact(tokens)
    told = []
    if params.prompt_logprobs:
        assert [item.token for item in update.prompt] == prompt.tolist()
        assert update.prompt[0][1:] == (None, ())
        told += [(place, item.token, item.logprob, item.top) for place, item in enumerate(update.prompt[1:])]
    if params.logprobs:
        tops = update.tops or ((),) * len(update.tokens)
        found = zip(range(len(prompt) - 1, len(tokens)), update.tokens, update.logprobs, tops, strict=False)
        told += list(found)
        assert len(update.logprobs) == len(update.tokens)
    for place, token, logprob, top in told:
        assert logprob == pytest.approx(expected[place, token], abs=2e-3)
        assert [value for _, value in top] == pytest.approx(
            np.sort(expected[place])[::-1][: len(top)].tolist(), abs=2e-3
        )
        assert [expected[place, one] for one, _ in top] == pytest.approx([value for _, value in top], abs=2e-3)
        assert len(top) == params.top_logprobs
        assert dict(top).get(token, logprob) == logprob, "whoever compares the two must find the same float"


def test_they_are_those_of_transformers_at_every_mix(executor: StepExecutor, exact: Callable[..., Any]) -> None:
    """Prompts of one token and of many chunks, scored and not, sampled with a bias and a penalty; some are not
    continued. The same again finds kept rows in the cache, which a score must not use."""
    scored = SamplingParams(max_tokens=3, logprobs=True, prompt_logprobs=True, top_logprobs=5)
    params = [
        scored,
        SamplingParams(max_tokens=0, prompt_logprobs=True, top_logprobs=2),
        SamplingParams(max_tokens=0, prompt_logprobs=True),
        SamplingParams(max_tokens=8),
        scored,
        SamplingParams(
            max_tokens=9, temperature=0.9, seed=3, logprobs=True, top_logprobs=20, frequency_penalty=1.0,
            logit_bias=((7, 4.0),),
        ),
    ]  # fmt: skip
    prompts = _prompts()
    engine = engine_over(executor, CAPACITIES, SLOTS, chunk=48)
    for _ in range(2):
        updates = _run(engine, list(zip(prompts, params, strict=True)))
        for update, prompt, asked in zip(updates, prompts, params, strict=True):
            _compare(update, prompt, asked, exact)
            assert update.finish == "length"
            assert len(update.tokens) == asked.max_tokens
    assert engine.counters.output_tokens == 2 * (3 + 0 + 0 + 8 + 3 + 9)


def test_a_score_leaves_its_prompt_in_the_cache_and_takes_nothing_from_it(executor: StepExecutor) -> None:
    engine = engine_over(executor, CAPACITIES, SLOTS)
    prompt = _prompts()[2]
    first, again, plain = (
        _run(engine, [(prompt, params)])[0]
        for params in (
            SamplingParams(max_tokens=0, prompt_logprobs=True),
            SamplingParams(max_tokens=0, prompt_logprobs=True),
            SamplingParams(max_tokens=2),
        )
    )
    assert first.prompt == again.prompt
    assert (first.cached, again.cached, plain.cached) == (0, 0, len(prompt) - 1)


def test_a_bias_forces_and_bars(executor: StepExecutor) -> None:
    engine = engine_over(executor, CAPACITIES, SLOTS)
    prompt = _prompts()[2]
    free = generate(engine, [prompt], SamplingParams(max_tokens=6))[0]
    forced = generate(engine, [prompt], SamplingParams(max_tokens=6, logit_bias=((77, 100.0),)))[0]
    barred = generate(engine, [prompt], SamplingParams(max_tokens=6, logit_bias=((free[0], -100.0),)))[0]
    assert forced == [77] * 6
    assert barred[0] != free[0]


@pytest.mark.parametrize(
    ("params", "start", "said"),
    [
        (SamplingParams(logit_bias=((400, 1.0),)), None, "logit_bias_ids holds 400; token ids are 0 to 399"),
        (SamplingParams(prompt_logprobs=True), 1, "return_prompt_log_probs: an encoder reads"),
    ],
)
def test_what_a_model_cannot_score(params: SamplingParams, start: int | None, said: str) -> None:
    limits = Limits(VOCABULARY, 64, 16, (), start)
    with pytest.raises(BadRequest, match=said):
        TokenSequence.start(Request(1, np.array([5]), params), limits, None, 0.0)


def test_a_prompt_whose_logits_are_no_numbers_ends_alone(graph: Path) -> None:
    executor = OpenVinoStepExecutor(graph, CAPACITIES, SLOTS + 2, threads=1)
    run, broken = executor.run, _prompts()[3]

    def spoiled(batches: Any) -> Any:
        found = run(batches)
        for batch, logits in zip(batches, found, strict=True):
            if batch.every:
                logits[2] = np.nan
        return found

    executor.run = spoiled  # type: ignore[method-assign]
    engine = engine_over(executor, CAPACITIES, SLOTS)
    bad = engine.submit(broken, SamplingParams(max_tokens=2, prompt_logprobs=True))
    good = engine.submit(_prompts()[2], SamplingParams(max_tokens=4))
    updates = []
    while engine.step():
        updates += engine.take_updates()
    joined = coalesce(updates)
    assert (joined[bad].finish, joined[good].finish) == ("error", "length")
    engine.scheduler.check_integrity()
