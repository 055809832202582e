"""The TensorRT executor over stand-ins for CUDA and TensorRT that compute a real decoder.

What is proven: the order, the sizes and the bounds of every copy, what graphs are captured from, that rows do not touch
each other, and that nothing stays behind. What is not: CUDA and TensorRT themselves.
"""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from builders.export.seq2seq import write_graphs
from measure.bench.bare_loop import bare_loop
from runtime.errors import BadEnvironment, ServerFault, Unavailable
from runtime.generation.cache import SlotCache
from runtime.generation.engine import GenerationEngine, generate
from runtime.generation.executor.onnxruntime import OnnxRuntimeStepExecutor
from runtime.generation.request import Limits, SamplingParams
from runtime.generation.scheduler import Scheduler
from runtime.step import Batch, Copy, Row, StepExecutor
from runtime.tensorrt import engine as engine_files
from runtime.tensorrt.cuda import DeviceLost
from runtime.tensorrt.executor import TensorRtStepExecutor, load_engines
from runtime.tensorrt.logits import DeviceLogits
from tests.generation.setup import VOCABULARY, engine_over, prompts, real_engine
from tests.generators import generator_checkpoint, make_generator, save_generator
from tests.tensorrt.cuda_stand_in import StandIn
from tests.tensorrt.tensorrt_stand_in import CHUNK, SLOTS, StandInContext, standing_in

pytest_plugins = ("tests.generation.fixtures",)

CAPACITIES = (16, 32, 64)
ROWS = SLOTS + 2
GREEDY = SamplingParams(max_tokens=20)
DRAWN = SamplingParams(
    max_tokens=15, temperature=0.8, top_p=0.9, seed=7, frequency_penalty=0.3, min_tokens=3, logprobs=True
)


def _executor(engines: dict[str, Path], flavour: str = "tensorrt") -> TensorRtStepExecutor:
    return TensorRtStepExecutor(engines, CAPACITIES, ROWS, flavour=flavour, device=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_tokens_are_those_of_onnx_runtime(decoder_graph: Path, flavour: str) -> None:
    asked = prompts(16)
    with standing_in(decoder_graph, CAPACITIES, flavour) as (cuda, engines):  # type: ignore[arg-type]
        executor = _executor(engines, flavour)
        for params in (GREEDY, DRAWN):
            engine = engine_over(executor, CAPACITIES, SLOTS, call_cost=8)
            alone = real_engine(decoder_graph, CAPACITIES, SLOTS, call_cost=8)
            assert generate(engine, asked, params) == generate(alone, asked, params)
        captured = cuda.captured
        assert bool(captured) == (flavour == "tensorrt")  # RTX captures inside
        generate(engine_over(executor, CAPACITIES, SLOTS, call_cost=8), asked, GREEDY)
        assert cuda.captured == captured, "a shape was captured twice"
        assert bare_loop(executor, 2, SLOTS, CHUNK, 8).tokens_per_second > 0
        executor.close()
        executor.close()
        assert cuda.taken == 0
        with pytest.raises(ServerFault, match="closed"):
            executor.run([])


def test_encoder_decoders_attend_to_their_own_sources(tmp_path: Path) -> None:
    """Half-way between, rows move to larger pools with their sources."""
    checkpoint = generator_checkpoint(save_generator(tmp_path / "checkpoint", "t5"), "seq2seq")
    write_graphs(make_generator("t5"), checkpoint, tmp_path)
    decoder, encoder = tmp_path / "decoder.onnx", tmp_path / "encoder.onnx"
    random = np.random.default_rng(2)
    sources = [random.integers(4, 300, size).astype(np.int64) for size in (3, 30, 9, 17, 3, 21, 8)]

    def engine(executor: StepExecutor) -> GenerationEngine:
        cache = SlotCache(CAPACITIES, SLOTS, 2)
        scheduler = Scheduler(cache, chunk_tokens=CHUNK, queue_size=100, call_cost=4, encoder=True)
        return GenerationEngine(
            executor, scheduler, Limits(executor.vocabulary, CAPACITIES[-1], 16, decoder_start_id=1)
        )

    reference = OnnxRuntimeStepExecutor(decoder, CAPACITIES, ROWS, encoder=encoder, threads=1)
    with standing_in(decoder, CAPACITIES, encoder=encoder) as (cuda, engines):
        executor = _executor(engines)
        got = generate(engine(executor), sources, SamplingParams(max_tokens=24))
        assert got == generate(engine(reference), sources, SamplingParams(max_tokens=24))
        executor.close()
        assert cuda.taken == 0
    with standing_in(decoder, CAPACITIES) as (_, engines), pytest.raises(BadEnvironment, match="needs encoder"):
        _executor(engines)


Rows = st.builds(Row, st.integers(0, len(CAPACITIES) - 1), st.integers(0, ROWS - 1))
Steps = st.lists(
    st.one_of(
        st.tuples(st.just("prompt"), Rows, st.integers(1, CHUNK)),
        st.tuples(st.just("decode"), Rows, st.integers(1, SLOTS)),
        st.tuples(st.just("everywhere"), st.integers(1, CHUNK)),
        st.tuples(st.just("copy"), st.none() | Rows, Rows, st.integers(0, 64)),
        st.tuples(st.just("again"), st.integers(1, 4)),
    ),
    max_size=20,
)


class Both:
    """The same calls on both executors; what they give must agree."""

    def __init__(self, tested: TensorRtStepExecutor, reference: OnnxRuntimeStepExecutor) -> None:
        self.tested, self.reference = tested, reference
        self.filled = np.zeros((len(CAPACITIES), ROWS), int)
        self.random = np.random.default_rng(0)
        self.last: tuple[object, ...] = ()

    def play(self, step: tuple[object, ...]) -> None:
        kind, *arguments = step
        if kind == "again":
            for _ in range(arguments[0] if self.last else 0):  # type: ignore[arg-type]
                self.play(self.last)
            return
        self.last = step
        getattr(self, kind)(*arguments)

    def prompt(self, row: Row, length: int) -> None:
        length = min(length, CAPACITIES[row.pool] - int(self.filled[row]))
        if length > 0:
            self._run([self._batch(row, 1, length)])

    def decode(self, row: Row, rows: int) -> None:
        """A batch in each pool, so that the batches of a step do not write over each other."""
        batches = []
        for pool, capacity in enumerate(CAPACITIES):
            full = self.filled[pool, row.place :] >= capacity
            count = min(rows, int(full.argmax()) if full.any() else len(full))
            if count:
                batches.append(self._batch(Row(pool, row.place), count, 1))
        self._run(batches)

    def everywhere(self, length: int) -> None:
        """A batch for every row there is: more than the host may be ahead with."""
        places = [Row(pool, place) for pool in range(len(CAPACITIES)) for place in range(ROWS)]
        lengths = [min(length, CAPACITIES[row.pool] - int(self.filled[row])) for row in places]
        self._run([self._batch(row, 1, fitting) for row, fitting in zip(places, lengths, strict=True) if fitting > 0])

    def copy(self, source: Row | None, target: Row, tokens: int) -> None:
        tokens = 0 if source is None else min(tokens, int(self.filled[source]), CAPACITIES[target.pool])
        if source == target:
            return
        for executor in (self.tested, self.reference):
            executor.copy([Copy(source, target, tokens)])
        self.filled[target] = tokens

    def _batch(self, row: Row, rows: int, length: int) -> Batch:
        ids = self.random.integers(0, VOCABULARY, (rows, length))
        places = self.filled[row.pool, row.place : row.place + rows]
        batch = Batch(row.pool, row.place, ids, places.copy())
        places += length
        return batch

    def _run(self, batches: list[Batch]) -> None:
        for got, expected in zip(self.tested.run(batches), self.reference.run(batches), strict=True):
            assert isinstance(got, DeviceLogits)
            assert (got.argmax(axis=1) == expected.argmax(axis=1)).all()
            chosen = self.random.integers(0, len(got), 2)
            np.testing.assert_array_equal(got[chosen.tolist()], expected[chosen])
            np.testing.assert_array_equal(np.asarray(got), expected)


@settings(max_examples=25, deadline=None)
@given(steps=Steps)
@example(steps=[("everywhere", 3), ("again", 1)])
def test_any_steps_give_what_onnx_runtime_gives(decoder_graph: Path, steps: list[tuple[object, ...]]) -> None:
    reference = OnnxRuntimeStepExecutor(decoder_graph, CAPACITIES, ROWS, threads=1)
    with standing_in(decoder_graph, CAPACITIES) as (cuda, engines):
        executor = _executor(engines)
        both = Both(executor, reference)
        for step in steps:
            both.play(step)
        executor.close()
        assert cuda.taken == 0


def _decode(first: int, rows: int, position: int, pool: int = 0) -> list[Batch]:
    return [Batch(pool, first, np.ones((rows, 1), np.int64), np.full(rows, position))]


def test_a_shape_that_comes_back_is_captured_once_and_the_oldest_goes(
    decoder_graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_files, "MOST_OWN", 2)
    with standing_in(decoder_graph, CAPACITIES) as (cuda, engines):
        executor = _executor(engines)
        for position in range(4):
            executor.run(_decode(0, 1, position))
        assert (cuda.captured, cuda.graphs, cuda.calls["cudaGraphLaunch"]) == (1, 1, 2)  # plain, captured, launched
        for rows in (2, 2, 3, 1, 3):  # the last one takes the place of 2
            executor.run(_decode(0, rows, 4))
        assert (cuda.captured, cuda.graphs, cuda.calls["cudaGraphLaunch"]) == (3, 2, 3)
        for captured in (3, 4):  # 2 had gone: it must come back again, and takes the place of 1
            executor.run(_decode(0, 2, 6))
            assert (cuda.captured, cuda.graphs) == (captured, 2)
        # A rank does not wait between steps: the graph of 3 is on the stream when another takes its place.
        executor.run(_decode(0, 4, 7))
        executor.run([*_decode(0, 3, 8), *_decode(0, 2, 8), *_decode(0, 4, 8)])
        assert (cuda.captured, cuda.graphs, cuda.calls["cudaGraphLaunch"]) == (5, 2, 5)
        executor.close()
        assert cuda.taken == 0


def test_rows_that_begin_anywhere_are_not_captured(decoder_graph: Path) -> None:
    """Such as the last token of a prompt: as many shapes as rows, of which each comes back now and then."""
    with standing_in(decoder_graph, CAPACITIES) as (cuda, engines):
        executor = _executor(engines)
        for first in (1, 2, 3, 1, 2, 3):
            executor.run(_decode(first, 1, 0))
        assert (cuda.captured, cuda.graphs) == (0, 0)
        executor.close()
        assert cuda.taken == 0


@pytest.mark.parametrize("who", ["CUDA", "TensorRT"])
def test_refused_graphs_are_said_once_and_steps_go_on(
    decoder_graph: Path, who: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = prompts(6)
    with standing_in(decoder_graph, CAPACITIES) as (cuda, engines):
        run = StandInContext.execute_async_v3
        if who == "CUDA":
            cuda.refuses_capture = True
        else:
            monkeypatch.setattr(
                StandInContext, "execute_async_v3", lambda self, stream: not cuda.is_capturing and run(self, stream)
            )
        executor = _executor(engines)
        got = generate(engine_over(executor, CAPACITIES, SLOTS), asked, GREEDY)
        executor.close()
        assert (cuda.captured, cuda.taken) == (0, 0)
    assert got == generate(real_engine(decoder_graph, CAPACITIES, SLOTS), asked, GREEDY)
    assert capfd.readouterr().err.count("CUDA graphs are refused") == 1


def test_greedy_steps_bring_no_logits(decoder_graph: Path) -> None:
    """Two copies a batch: tokens in, top tokens out."""
    with standing_in(decoder_graph, CAPACITIES) as (cuda, engines):
        executor = _executor(engines)
        before = cuda.calls["cudaMemcpyAsync"]
        [logits] = executor.run(_decode(0, 3, 0))
        assert logits.argmax(axis=1).shape == (3,)
        assert cuda.calls["cudaMemcpyAsync"] - before == 2
        logits[[1]]
        logits[[1]]
        assert cuda.calls["cudaMemcpyAsync"] - before == 3
        executor.run(_decode(0, 3, 1))
        with pytest.raises(RuntimeError, match="until the next run"):
            logits[[0]]
        executor.close()


def test_a_row_that_is_no_number_is_seen_without_its_logits() -> None:
    top = np.array([[1.5, 3], [np.nan, 0]], np.float32)
    logits = DeviceLogits(top, 8, lambda rows: np.full((len(rows), 8), 0.25, np.float32))
    assert np.isnan(logits[np.arange(2), logits.argmax(axis=1)]).tolist() == [False, True]
    assert logits[np.arange(2), np.array([2, 0])].tolist()[0] == 0.25  # another token than the largest
    with pytest.raises(ValueError, match="axis 0"):
        logits.argmax(axis=0)


def test_whatever_fails_at_the_start_leaves_nothing(decoder_graph: Path) -> None:
    with standing_in(decoder_graph, CAPACITIES) as (cuda, engines):
        _executor(engines).close()
        counts = dict(cuda.calls)
    for name in ("cudaStreamCreateWithFlags", "cudaMalloc", "cudaMallocHost", "cudaMemsetAsync"):
        for nth in range(1, counts[name] + 1):
            with standing_in(decoder_graph, CAPACITIES) as (cuda, engines):
                cuda.fails = (name, nth)
                with pytest.raises(ServerFault, match=f"{name} failed: CUDA error 2"):
                    _executor(engines)
                assert cuda.taken == 0


def _failing(cuda: StandIn, name: str) -> None:
    cuda.fails = (name, cuda.calls[name] + 3)


@pytest.mark.parametrize("name", ["cudaMemcpyAsync", "cudaGraphLaunch", "cudaMemset3DAsync"])
def test_a_passing_fault_ends_what_runs_and_the_next_requests_succeed(decoder_graph: Path, name: str) -> None:
    asked = prompts(6)
    alone = generate(real_engine(decoder_graph, CAPACITIES, SLOTS), asked, GREEDY)
    with standing_in(decoder_graph, CAPACITIES) as (cuda, engines):
        executor = _executor(engines)
        engine = engine_over(executor, CAPACITIES, SLOTS)
        _failing(cuda, name)
        for prompt in asked:
            engine.submit(prompt, GREEDY)
        updates = []
        while engine.step():
            updates += engine.take_updates()
        assert any(name in str(update.error) for update in updates if update.error)
        assert generate(engine, asked, GREEDY) == alone
        executor.close()
        assert cuda.taken == 0


def test_a_reset_leaves_empty_caches_and_no_graph(decoder_graph: Path) -> None:
    reference = OnnxRuntimeStepExecutor(decoder_graph, CAPACITIES, ROWS, threads=1)
    with standing_in(decoder_graph, CAPACITIES) as (cuda, engines):
        executor = _executor(engines)
        for position in range(3):
            executor.run(_decode(0, 2, position))
        cuda.poison()
        executor.reset()
        assert cuda.graphs == 0
        for position in range(3):
            [got], [expected] = (each.run(_decode(0, 2, position)) for each in (executor, reference))
            np.testing.assert_array_equal(np.asarray(got), expected)
        executor.close()
        assert cuda.taken == 0


def test_an_error_on_the_device_lasts_as_long_as_the_process(decoder_graph: Path) -> None:
    with standing_in(decoder_graph, CAPACITIES) as (cuda, engines):
        executor = _executor(engines)
        cuda.broken = True
        with pytest.raises(ServerFault, match="CUDA error 700"):
            executor.run(_decode(0, 1, 0))
        with pytest.raises(DeviceLost, match="load the model again"):
            executor.reset()
        executor.close()


@pytest.mark.parametrize(
    ("names", "device", "said"),
    [
        (
            ("sm90.16",),
            0,
            r"GPU 0 of this machine: sm89; no engine for sm89\.16, .*, only for sm90\.16; add the target",
        ),
        (("sm89.16", "sm89.32", "sm89.64"), 1, r"GPU 1 of this machine: none"),
    ],
)
def test_engines_that_do_not_fit_the_gpu(decoder_graph: Path, names: tuple[str, ...], device: int, said: str) -> None:
    with standing_in(decoder_graph, CAPACITIES), pytest.raises(BadEnvironment, match=said):
        TensorRtStepExecutor(dict.fromkeys(names, decoder_graph), CAPACITIES, ROWS, flavour="tensorrt", device=device)


def test_engines_of_another_making(decoder_graph: Path) -> None:
    with standing_in(decoder_graph, (16, 32, 60)) as (cuda, engines):
        files = {f"sm89.{capacity}": decoder_graph for capacity in CAPACITIES}
        with pytest.raises(BadEnvironment, match=r"key_cache_0 of the engine has 60 positions, its pool 64"):
            _executor(files)
        gc.collect()
        assert cuda.taken == 0
    assert engines


def test_tensorrt_that_is_not_installed() -> None:
    import importlib.util

    if importlib.util.find_spec("tensorrt"):
        pytest.skip("full TensorRT is installed here")
    with pytest.raises(BadEnvironment, match="tensorrt is not installed here"):
        load_engines([Path("x.plan")], "tensorrt")


def test_a_lost_device_ends_the_step_thread(decoder_graph: Path) -> None:
    with standing_in(decoder_graph, CAPACITIES) as (cuda, engines):
        executor = _executor(engines)
        engine = engine_over(executor, CAPACITIES, SLOTS)
        asked = {engine.submit(prompt, GREEDY) for prompt in prompts(SLOTS + 2)}
        cuda.broken = True
        with pytest.raises(DeviceLost):
            engine.step()
        # Every client hears of it before the process ends, also those that wait for a row.
        updates = engine.take_updates()
        assert {update.request for update in updates} == asked
        assert all(isinstance(update.error, Unavailable) for update in updates)
        executor.close()
