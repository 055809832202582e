"""A large decoder in torch, compiled and launched as CUDA graphs, and eager: steps and prompts alone, and with the
serving loop around them.

`ms` is the time of a step on the device. `contract_ms` is that of a greedy step as the serving loop sees it, tokens in
and tokens out; the difference is what the host adds.

Times of the loop's parts are its own counters, taken without a profiler. What the device does is read by torch's
profiler (CUPTI on a GPU) over further steps: the union of its intervals, so that overlapping kernels count once. On a
CPU the outermost operators stand in for kernels.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from measure.bench.bare_loop import bare_loop
from measure.bench.decoder_graph import DecoderShape
from measure.gpu_proof.llama import TorchStepExecutor, new_llama
from measure.gpu_proof.machine import require_torch
from measure.gpu_proof.record import Measured
from measure.gpu_proof.roofline import against, decode_work, position_bytes, prefill_work, weight_bytes
from measure.gpu_proof.setting import Case, NotRun, Setting, device_seconds, host_seconds, in_time
from runtime.generation.cache import SlotCache
from runtime.generation.engine import GenerationEngine, generate
from runtime.generation.request import Limits, SamplingParams, Tokens
from runtime.generation.scheduler import Scheduler
from runtime.step import Batch, StepExecutor

_ROOM = 0.9  # of the memory: the rest is for workspaces and the logits
HOST_AIM = 0.10  # of a step at batch 1
NEW_TOKENS = 32  # of each stream
KEPT = 1
QUEUE = 1024  # more than a measurement asks for at once
Interval = tuple[float, float]


def way(setting: Setting, *, compiled: bool) -> str:
    if not compiled:
        return "torch eager"
    return "torch.compile + CUDA graph" if setting.device == "cuda" else "torch.compile"


def decode_row(setting: Setting, how: str, context: int, rows: int, note: str = "") -> Measured:
    case = f"{setting.decoder_name}, decode, batch {rows}, context {context}"
    return Measured(case, how, {"batch": rows, "context": context}, note=note)


def open_executor(
    setting: Setting, model: Any, capacity: int, rows: int, *, compiled: bool = True
) -> TorchStepExecutor:
    compiler = setting.compiler if compiled else None
    graphs = compiled and setting.device == "cuda"
    return TorchStepExecutor(model, (capacity,), rows, compiler=compiler, graphs=graphs)


def fitting_llama(setting: Setting, positions: int) -> tuple[DecoderShape, Any]:
    """With fewer layers where not even one row of the shortest context fits. Raises NotRun where none does."""
    require_torch(setting, "transformers")
    shape, least = setting.decoder, min(setting.contexts)
    while shape.layers:
        if weight_bytes(shape, setting.value_bytes) + cache_bytes(setting, shape, 1, least) < free_bytes(setting):
            return shape, new_llama(shape, positions, setting.dtype, setting.device)
        shape = replace(shape, layers=shape.layers // 2)
    raise NotRun(f"one layer of the {setting.decoder_name} does not fit this device's memory")


def cache_bytes(setting: Setting, shape: DecoderShape, rows: int, context: int) -> int:
    return rows * context * position_bytes(shape, setting.value_bytes)


def free_bytes(setting: Setting) -> float:
    if setting.device == "cpu":
        return 2e9  # far more than the dry run's shapes need
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    return _ROOM * torch.cuda.mem_get_info()[0]


def measure(setting: Setting) -> Iterator[Measured]:
    shape, model = fitting_llama(setting, max(setting.contexts))
    return in_time(setting, _cases(setting, shape, model))


def _cases(setting: Setting, shape: DecoderShape, model: Any) -> Iterator[Case]:
    """The better way first: time may run out."""
    note = "" if shape == setting.decoder else f"{shape.layers} of {setting.decoder.layers} layers: memory"
    for compiled in (True, False):
        how = way(setting, compiled=compiled)
        for context, rows in product(setting.contexts, setting.decode_rows):
            row = decode_row(setting, how, context, rows, note)
            yield row, partial(_decode, setting, shape, model, compiled)
        for length in setting.contexts:
            row = Measured(f"{setting.decoder_name}, prompt of {length}", how, {"length": length}, note=note)
            yield row, partial(_prefill, setting, shape, model, compiled)


def _decode(setting: Setting, shape: DecoderShape, model: Any, compiled: bool, row: Measured) -> Measured:
    """The last positions of a full cache, so that all `context` of them are read."""
    rows, context = row.axes["batch"], row.axes["context"]
    needed = cache_bytes(setting, shape, rows, context)
    if needed >= free_bytes(setting):
        raise NotRun(f"a cache of {needed / 1e9:.0f} GB does not fit what is left of the memory")
    executor = open_executor(setting, model, context, rows, compiled=compiled)
    try:
        batch = Batch(0, 0, np.ones((rows, 1), np.int64), np.full(rows, context - 1, np.int64))
        contract = host_seconds(lambda: executor.run([batch])[0].argmax(axis=1), setting)
        seconds = device_seconds(executor.decode(batch)[0], setting)
        figures = {"tokens_per_s": rows / seconds, "contract_ms": contract * 1e3}
        if context == min(setting.contexts):  # the loop of whole generations, prompts and all
            new = min(setting.steps, context // 2)
            figures["loop_tokens_per_s"] = bare_loop(executor, 0, rows, context - new, new).decode_tokens_per_second
        return against(row, decode_work(shape, rows, context, setting.value_bytes), seconds, setting.limits, **figures)
    finally:
        executor.close()


def _prefill(setting: Setting, shape: DecoderShape, model: Any, compiled: bool, row: Measured) -> Measured:
    length = row.axes["length"]
    executor = open_executor(setting, model, length, 1, compiled=compiled)
    try:
        batch = Batch(0, 0, np.ones((1, length), np.int64), np.zeros(1, np.int64))
        seconds = device_seconds(lambda: executor.prefill(batch, compiled=compiled), setting)
        work = prefill_work(shape, length, setting.value_bytes)
        return against(row, work, seconds, setting.limits, tokens_per_s=length / seconds)
    finally:
        executor.close()


def engine_over(executor: StepExecutor, capacity: int, slots: int, chunk: int) -> GenerationEngine:
    """The serving loop with one pool; the executor has `slots + KEPT` rows."""
    cache = SlotCache((capacity,), slots, KEPT)
    scheduler = Scheduler(cache, chunk_tokens=chunk, queue_size=QUEUE, call_cost=executor.call_cost)
    return GenerationEngine(executor, scheduler, Limits(executor.vocabulary, capacity, capacity, ()))


def step_split(setting: Setting) -> Iterator[Measured]:
    """A step of the loop over the torch executor, split into its parts."""
    case = f"{setting.decoder_name}, a step of the serving loop, batch {{}}, context {min(setting.contexts)}"
    return _over_torch(setting, case, way(setting, compiled=True), partial(split, setting))


def serving_loop(setting: Setting) -> Iterator[Measured]:
    """The loop over the torch executor, without a server: also where no engine and no server run."""
    how = f"in process, no server: serving loop over {way(setting, compiled=True)}"
    return _over_torch(setting, f"{setting.decoder_name}, {{}} streams to their end", how, _streams)


def _over_torch(
    setting: Setting, case: str, how: str, measured: Callable[[GenerationEngine, Measured], Measured]
) -> Iterator[Measured]:
    """What is `measured` of the serving loop, for each batch that fits; else why not."""
    capacity = min(setting.contexts)
    shape, model = fitting_llama(setting, capacity)

    def run(row: Measured) -> Measured:
        slots = row.axes["batch"]
        if cache_bytes(setting, shape, slots + KEPT, capacity) >= free_bytes(setting):
            raise NotRun("its cache does not fit the memory")
        executor = open_executor(setting, model, capacity, slots + KEPT)
        try:
            return measured(engine_over(executor, capacity, slots, chunk=capacity), row)
        finally:
            executor.close()

    return in_time(setting, ((Measured(case.format(rows), how, {"batch": rows}), run) for rows in setting.decode_rows))


def _streams(engine: GenerationEngine, row: Measured) -> Measured:
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


def split(setting: Setting, engine: GenerationEngine, row: Measured) -> Measured:
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
