"""The engine over a real decoder in ONNX Runtime: batching, chunking and reuse change no token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from measure.bench.bare_loop import bare_loop
from runtime.errors import BadEnvironment, BadRequest, ServerFault
from runtime.generation.cache import capacity_ladder
from runtime.generation.engine import GenerationEngine, generate
from runtime.generation.executor.onnxruntime import OnnxRuntimeStepExecutor
from runtime.generation.opening import TextTokenizer
from runtime.generation.request import Limits, SamplingParams, Tokens, Update
from runtime.session import open_session
from tests.generation.setup import VOCABULARY, prompts, real_engine, write_tokenizer

pytest_plugins = ("tests.generation.fixtures",)

GREEDY = SamplingParams(max_tokens=20)


def whole_model(graph: Path, prompt: Tokens, count: int) -> list[int]:
    """Greedy tokens by the graph alone, with no cache kept between steps."""
    session = open_session(graph)
    caches = {
        item.name: np.zeros((1, item.shape[1], 64, item.shape[3]), np.float32)
        for item in session.get_inputs()
        if "cache" in item.name
    }
    tokens = prompt.tolist()
    for _ in range(count):
        feeds = {"input_ids": np.array([tokens]), "write_indices": np.zeros(1, np.int64), **caches}
        logits = session.run(["logits"], {**feeds, "last_index": np.array([len(tokens) - 1])})[0]
        tokens.append(int(logits.ravel().argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("capacities", "slots", "chunk", "call_cost"),
    [
        ((64,), 1, 64, 0),  # one at a time
        ((64,), 8, 16, 0),
        ((8, 16, 32, 64), 8, 5, 0),  # every row in its own pool, moved as it grows
        ((8, 16, 32, 64), 5, 3, 1000),  # all rows in one pool
        ((16, 64), 32, 64, 20),
    ],
)
def test_output_is_that_of_the_model_alone(
    decoder_graph: Path, capacities: tuple[int, ...], slots: int, chunk: int, call_cost: int
) -> None:
    asked = prompts(24)
    engine = real_engine(decoder_graph, capacities, slots, chunk=chunk, call_cost=call_cost)
    got = generate(engine, asked, GREEDY)
    engine.scheduler.cache.check_integrity()
    assert [got[index] for index in range(4)] == [whole_model(decoder_graph, asked[index], 20) for index in range(4)]
    assert got == generate(real_engine(decoder_graph, (64,), 1, chunk=64), asked, GREEDY)
    assert generate(engine, asked[::-1], GREEDY) == got[::-1]  # the latest first: they are still there
    assert engine.counters.reused_tokens > 0


def test_seeded_sampling_does_not_depend_on_the_neighbours(decoder_graph: Path) -> None:
    params = SamplingParams(max_tokens=15, temperature=0.8, top_p=0.9, seed=7, frequency_penalty=0.3)
    asked = prompts(12)
    alone = [generate(real_engine(decoder_graph, (64,), 1), [prompt], params)[0] for prompt in asked]
    assert generate(real_engine(decoder_graph, (16, 32, 64), 6, chunk=4), asked, params) == alone
    assert len({tuple(tokens) for tokens in alone}) > 1


def test_end_tokens_and_lengths(decoder_graph: Path) -> None:
    prompt = prompts(1)[0]
    tokens = generate(real_engine(decoder_graph, (64,), 1), [prompt], GREEDY)[0]
    end = tokens[5]
    first = tokens.index(end)
    ended = real_engine(decoder_graph, (64,), 1, end_ids=(end,))
    assert generate(ended, [prompt], GREEDY)[0] == tokens[:first]
    held = generate(ended, [prompt], SamplingParams(max_tokens=20, min_tokens=first + 2))[0]
    assert held[:first] == tokens[:first]
    assert held[first] != end
    stopped = SamplingParams(max_tokens=20, stop_token_ids=(end,))
    assert generate(real_engine(decoder_graph, (64,), 1), [prompt], stopped)[0] == tokens[:first]
    full = generate(real_engine(decoder_graph, (32,), 1), [prompts(30)[1][:20]], SamplingParams(max_tokens=13))
    assert len(full[0]) == 13  # 20 + 13 - 1 positions fill the cache to the last


def test_a_probe_is_answered_and_leaves_no_trace(decoder_graph: Path) -> None:
    engine = real_engine(decoder_graph, (64,), 2)
    prompt, params = prompts(1)[0], SamplingParams(max_tokens=3)
    for _ in range(2):
        engine.submit(prompt, params, probe=True)
        while engine.step():
            pass
    assert sum(len(update.tokens) for update in engine.take_updates()) == 6
    seen = engine.counters
    assert (seen.requests, seen.prompt_tokens, seen.output_tokens, sum(seen.ttft.counts)) == (0, 0, 0, 0)
    generate(engine, [prompt], params)
    assert (seen.requests, seen.output_tokens, seen.reused_tokens) == (1, 3, 0)  # no cache of the probes was there


def test_logprobs_are_those_of_the_model(decoder_graph: Path) -> None:
    engine = real_engine(decoder_graph, (64,), 1)
    engine.submit(prompts(1)[0], SamplingParams(max_tokens=3, logprobs=True, temperature=0.5, seed=1))
    updates: list[Update] = []
    while engine.step():
        updates += engine.take_updates()
    values = [value for update in updates for value in update.logprobs]
    assert len(values) == 3
    session = engine.executor.session  # type: ignore[attr-defined]
    caches = {item.name: np.zeros((1, 2, 64, 8), np.float32) for item in session.get_inputs() if "cache" in item.name}
    ids = prompts(1)[0][None]
    feeds = {"input_ids": ids, "write_indices": np.zeros(1, np.int64), "last_index": np.array([ids.shape[1] - 1])}
    logits = session.run(["logits"], {**feeds, **caches})[0].ravel().astype(np.float64)
    expected = logits[updates[0].tokens[0]] - np.log(np.exp(logits).sum())
    assert values[0] == pytest.approx(expected, abs=1e-4)


def test_text_streams_and_stop_strings_end_it(decoder_graph: Path, tmp_path: Path) -> None:
    tokenizer = TextTokenizer(write_tokenizer(tmp_path / "tokenizer.json"), VOCABULARY)
    base = real_engine(decoder_graph, (64,), 2)
    engine = GenerationEngine(base.executor, base.scheduler, base.limits, tokenizer.fast)

    def ask(**changes: object) -> tuple[str, str | None]:
        engine.submit(prompts(3)[2], SamplingParams(**{"max_tokens": 30, **changes}))  # type: ignore[arg-type]
        updates: list[Update] = []
        while engine.step():
            updates += engine.take_updates()
        return "".join(update.text for update in updates), updates[-1].finish

    text, finish = ask()
    assert finish == "length"
    assert len(text) > 8
    stop = text[5:8]
    assert ask(stop=("never there", stop)) == (text[: text.index(stop)], "stop")


def test_a_model_that_gives_nan_fails_the_request_alone(decoder_graph: Path) -> None:
    class Spoiling:
        """Every third row's logits are spoiled."""

        def __init__(self, inner: OnnxRuntimeStepExecutor) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> object:
            return getattr(self._inner, name)

        def run(self, batches: list[object]) -> list[np.ndarray]:  # type: ignore[type-arg]
            logits = self._inner.run(batches)  # type: ignore[arg-type]
            for rows in logits:
                rows[2:] = np.nan
            return logits

    base = real_engine(decoder_graph, (64,), 4)
    engine = GenerationEngine(Spoiling(base.executor), base.scheduler, base.limits)  # type: ignore[arg-type]
    for prompt in prompts(3):
        engine.submit(prompt, SamplingParams(max_tokens=5))
    updates: list[Update] = []
    while engine.step():
        updates += engine.take_updates()
    ends = {update.request: update.error for update in updates if update.finish}
    assert [type(ends[number]) for number in (1, 2, 3)] == [type(None), type(None), ServerFault]


def test_what_a_spoiled_row_leaves_behind_spoils_nobody(decoder_graph: Path) -> None:
    engine = real_engine(decoder_graph, (16, 64), 3, call_cost=0)
    for pool in engine.executor.pools.arrays:  # type: ignore[attr-defined]
        for array in pool.values():
            array[:] = np.nan
    asked = prompts(6)
    alone = generate(real_engine(decoder_graph, (64,), 1), asked, GREEDY)
    assert generate(engine, asked, GREEDY) == alone


@pytest.mark.parametrize(
    ("prompt", "params", "said"),
    [
        ([], SamplingParams(), "no tokens"),
        ([5, -1], SamplingParams(), "input_ids holds -1; token ids of this model are 0 to 383"),
        ([VOCABULARY], SamplingParams(), "input_ids holds 384"),
        ([1] * 65, SamplingParams(), "the prompt has 65 tokens; this model takes at most 64"),
        ([1] * 60, SamplingParams(max_tokens=6), "room for 5 more"),
        ([1] * 60, SamplingParams(min_tokens=6), "room for 5 more"),
        ([1], SamplingParams(stop_token_ids=(400,)), "stop_token_ids holds 400"),
    ],
)
def test_requests_that_do_not_fit(prompt: list[int], params: SamplingParams, said: str) -> None:
    from runtime.generation.request import Request

    with pytest.raises(BadRequest, match=said):
        Limits(VOCABULARY, 64, 16).room(Request(1, np.array(prompt, np.int64), params))


def test_graphs_and_tokenizers_that_do_not_fit(decoder_graph: Path, tmp_path: Path) -> None:
    with pytest.raises(BadEnvironment, match="they do not belong together"):
        TextTokenizer(write_tokenizer(tmp_path / "tokenizer.json"), VOCABULARY - 10)
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(BadEnvironment, match="not a tokenizer file"):
        TextTokenizer(tmp_path / "broken.json", VOCABULARY)
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("Identity", ["x"], ["y"])],
            "g",
            *([onnx.helper.make_tensor_value_info(name, 1, [1])] for name in "xy"),
        ),
        opset_imports=[onnx.helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(model, str(tmp_path / "other.onnx"))
    with pytest.raises(BadEnvironment, match="no decoder with a slot cache"):
        OnnxRuntimeStepExecutor(tmp_path / "other.onnx", (64,), 2, threads=1)
    with pytest.raises(BadEnvironment, match="takes no encoder"):
        OnnxRuntimeStepExecutor(decoder_graph, (64,), 2, encoder=decoder_graph, threads=1)


def test_capacities_and_the_bare_loop(decoder_graph: Path) -> None:
    assert capacity_ladder(1024) == (128, 192, 256, 384, 512, 768, 1024)
    assert capacity_ladder(100) == (100,)
    executor = OnnxRuntimeStepExecutor(decoder_graph, (32,), 4, threads=1)
    result = bare_loop(executor, 0, 4, 20, 13)
    assert result.tokens_per_second > 0
    assert result.decode_tokens_per_second > 0
