"""Where the time of a decode step goes, with the serving loop around the model, and how many streams that carries.

Times of the loop's parts are its own counters, taken without a profiler. What the device does is read by torch's
profiler (CUPTI on a GPU) over further steps: the union of its intervals, so that overlapping kernels count once. On a
CPU the outermost operators stand in for kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from measure.gpu_proof.decoders import cache_bytes, fitting_llama, free_bytes, open_executor, way
from measure.gpu_proof.record import Row
from measure.gpu_proof.setting import NotRun, Setting
from measure.gpu_proof.timing import in_time
from runtime.generation.cache import SlotCache
from runtime.generation.engine import GenerationEngine, generate
from runtime.generation.request import Limits as RequestLimits
from runtime.generation.request import SamplingParams, Tokens
from runtime.generation.scheduler import Scheduler
from runtime.step import StepExecutor

HOST_AIM = 0.10  # of a step at batch 1
NEW_TOKENS = 32  # of each stream
KEPT = 1
QUEUE = 1024  # more than a measurement asks for at once
Interval = tuple[float, float]


def engine_over(executor: StepExecutor, capacity: int, slots: int, chunk: int) -> GenerationEngine:
    """The serving loop with one pool; the executor has `slots + KEPT` rows."""
    cache = SlotCache((capacity,), slots, KEPT)
    scheduler = Scheduler(cache, chunk_tokens=chunk, queue_size=QUEUE, call_cost=executor.call_cost)
    return GenerationEngine(executor, scheduler, RequestLimits(executor.vocabulary, capacity, capacity, ()))


def measure(setting: Setting) -> Iterator[Row]:
    """A step of the loop over the torch executor, split into its parts."""
    case = f"{setting.decoder_name}, a step of the serving loop, batch {{}}, context {min(setting.contexts)}"
    return _over_torch(setting, case, way(setting, compiled=True), partial(split, setting))


def in_process(setting: Setting) -> Iterator[Row]:
    """The loop over the torch executor, without a server: also where no engine and no server run."""
    how = f"in process, no server: serving loop over {way(setting, compiled=True)}"
    return _over_torch(setting, f"{setting.decoder_name}, {{}} streams to their end", how, _streams)


def _over_torch(
    setting: Setting, case: str, how: str, measured: Callable[[GenerationEngine, Row], Row]
) -> Iterator[Row]:
    """What is `measured` of the serving loop, for each batch that fits; else why not."""
    capacity = min(setting.contexts)
    shape, model = fitting_llama(setting, capacity)

    def run(row: Row) -> Row:
        slots = row.axes["batch"]
        if cache_bytes(setting, shape, slots + KEPT, capacity) >= free_bytes(setting):
            raise NotRun("its cache does not fit the memory")
        executor = open_executor(setting, model, capacity, slots + KEPT)
        try:
            return measured(engine_over(executor, capacity, slots, chunk=capacity), row)
        finally:
            executor.close()

    return in_time(setting, ((Row(case.format(rows), how, {"batch": rows}), run) for rows in setting.decode_rows))


def _streams(engine: GenerationEngine, row: Row) -> Row:
    rows, capacity = row.axes["batch"], engine.limits.max_length
    new = min(NEW_TOKENS, capacity // 2)
    random = np.random.default_rng(0)
    prompts = [random.integers(0, engine.executor.vocabulary, capacity - new) for _ in range(2 * rows)]
    generated_per_second(engine, prompts[:rows], new)  # compiles and captures
    figures = {"tokens_per_s": generated_per_second(engine, prompts[rows:], new)}
    return replace(row, figures=figures, note=f"prompts of {capacity - new} and {new} new tokens each")


def generated_per_second(engine: GenerationEngine, prompts: Sequence[Tokens], new_tokens: int) -> float:
    """Tokens a second of whole generations, prompts included."""
    began = time.perf_counter()
    outputs = generate(engine, prompts, SamplingParams(max_tokens=new_tokens, min_tokens=new_tokens))
    return sum(map(len, outputs)) / (time.perf_counter() - began)


def split(setting: Setting, engine: GenerationEngine, row: Row) -> Row:
    """Milliseconds of one step by what they were spent on, once every stream decodes."""
    rows, counters = row.axes["batch"], engine.counters
    _start(engine, rows, min(rows + 2 * setting.steps + 8, engine.limits.max_length - 1))  # one begins after the other
    before = replace(counters)
    _steps(engine, setting.steps)
    count, tokens = counters.steps - before.steps, counters.output_tokens - before.output_tokens
    step = (counters.step_seconds - before.step_seconds) / count
    executor = (counters.executor_seconds - before.executor_seconds) / count
    sampling = (counters.sample_seconds - before.sample_seconds) / count
    kernels, copies = _device_seconds(setting, engine)
    while engine.step():
        engine.take_updates()
    seen = kernels > 0
    if not seen:  # no CUPTI here, or kernels that are none of torch's: the wait for the executor has to do
        kernels, copies = executor, 0.0
    busy = min(kernels + copies, executor)
    figures = {
        "step_ms": step * 1e3,
        "kernels_ms": kernels * 1e3,
        "copies_ms": copies * 1e3,
        "gaps_ms": (executor - busy) * 1e3,
        "sampling_ms": sampling * 1e3,
        "scheduling_ms": (step - executor - sampling) * 1e3,
        "host_share": (step - busy) / step,
        "tokens_per_s": tokens / count / step,
    }
    met = "met" if figures["host_share"] <= HOST_AIM else "missed"
    note = f"the aim is a host share of at most {HOST_AIM:.0%} at batch 1: {met}" if rows == 1 else ""
    by = "torch.profiler" if seen else "the loop's clock: gaps and copies are in kernels_ms"
    return replace(row, figures=figures, facts={"device time by": by}, note=note)


def _start(engine: GenerationEngine, rows: int, tokens: int) -> None:
    """All streams decoding, and past the steps that compile and capture."""
    random = np.random.default_rng(0)
    length = max(1, engine.limits.max_length - tokens)
    for _ in range(rows):
        prompt = random.integers(0, engine.executor.vocabulary, length)
        engine.submit(prompt, SamplingParams(max_tokens=tokens, min_tokens=tokens))
    for _ in range(rows + 1):  # a step takes at least one prompt of these lengths
        _steps(engine, 1)
        if len(engine.scheduler.cache.decoding(0)) == rows:
            break
    _steps(engine, 2)


def _steps(engine: GenerationEngine, count: int) -> None:
    for _ in range(count):
        if not engine.step():
            return
        engine.take_updates()


def _device_seconds(setting: Setting, engine: GenerationEngine) -> tuple[float, float]:
    """Kernels and copies of one step, as the profiler sees them."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if setting.device == "cuda" else ProfilerActivity.CPU
    before = engine.counters.steps
    with profile(activities=[activity]) as profiler:
        _steps(engine, setting.steps // 2)
    steps = max(engine.counters.steps - before, 1)
    kernels: list[Interval] = []
    copies: list[Interval] = []
    for event in profiler.events() or ():
        on_device = "cuda" in str(event.device_type).lower()
        if on_device if setting.device == "cuda" else event.cpu_parent is None:
            copied = "memcpy" in event.name.lower() or event.name == "aten::copy_"
            (copies if copied else kernels).append((event.time_range.start, event.time_range.end))
    together, alone = union_length([*kernels, *copies]), union_length(kernels)
    return alone / steps / 1e6, (together - alone) / steps / 1e6  # microseconds


def union_length(intervals: Iterable[Interval]) -> float:
    """Length of what the intervals cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
