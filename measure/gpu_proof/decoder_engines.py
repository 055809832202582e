"""Decoding with our TensorRT step executor.

A whole model of 8 billion weights would be 16 GB to export, to build and to load, twice (a cache length is an engine):
more than the time there is. All its blocks are alike, so two engines of few layers tell the same: what they differ in
is the time of a block, what they share is the table of words, the head, the copies and the host. The time of the whole
model is taken from both (t = shared + layers x block) and marked as derived. That holds as long as a step is one queue
of kernels, which a decode step is; it would hide a fault that only depth brings, such as memory that runs out.

Without a GPU the engines are built all the same, ahead of time, and ONNX Runtime runs their graph in their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from builders.artifacts import Generation, GenerationQuality, OnnxGraph
from builders.engine.tensorrt import build_decoder_engine, decoder_profiles
from builders.errors import ParityError
from builders.export import decoder as export
from builders.graph import GRAPH_FILE, record_graph
from builders.spec import Flavour
from builders.store.atomic import atomic_directory
from measure.bench.bare_loop import bare_loop
from measure.bench.decoder_graph import DecoderShape
from measure.gpu_proof.decoders import decode_row, new_llama
from measure.gpu_proof.folders import built_row, stand_in
from measure.gpu_proof.machine import try_flavour
from measure.gpu_proof.record import Measured
from measure.gpu_proof.roofline import against, decode_work
from measure.gpu_proof.setting import Setting
from measure.gpu_proof.timing import in_time, seconds_of
from runtime.generation.cache import SlotCache
from runtime.generation.engine import GenerationEngine
from runtime.generation.metrics import Counters
from runtime.generation.request import Limits, SamplingParams
from runtime.generation.scheduler import Scheduler
from runtime.step import Batch, StepExecutor

MOST_DIFFERENCE = {"float16": 0.02, "float32": 1e-4}  # of the logits, over the largest of them
HOST_AIM = 0.10  # of a step at batch 1
KEPT = 1
_PROMPT = 8
_LEAST_S = 30.0  # of the budget, to build an engine
Seconds = dict[tuple[int, int, int], float]  # of a step, by layers, context and rows


def measure(setting: Setting, flavour: Flavour) -> Iterator[Measured]:
    try_flavour(flavour, setting)
    how, seconds = f"{flavour} step executor{stand_in(setting)}", Seconds()
    graph_of = cache(lambda layers: decoder_graph(replace(setting.decoder, layers=layers), setting))

    def engine(layers: int, context: int, row: Measured) -> Iterator[Measured]:
        graph, model = graph_of(layers)
        folder = setting.scratch / f"{flavour}-{layers}-{context}"
        folder.mkdir()
        rows, shortest = max(setting.decode_rows) + KEPT, min(setting.contexts)
        profiles = decoder_profiles(rows, shortest)
        built = build_decoder_engine(graph, context, flavour, setting.target, profiles, folder)
        yield built_row(setting, built, row.case, f"{flavour} engine")
        executor = open_executor(setting, built.file_path, graph, context, rows, flavour)
        try:
            yield _compared(setting, executor, model, row)
            for count in setting.decode_rows:
                seconds[layers, context, count] = _decode_seconds(setting, executor, context, count)
            if layers == max(setting.depths) and context == shortest:
                yield from _looped(setting, executor, context, row)
        finally:
            executor.close()

    cases = (
        (Measured(f"{setting.decoder_name} of {layers} layers, engine of capacity {context}", how),
         partial(engine, layers, context))
        for context, layers in product(setting.contexts, setting.depths)
    )  # fmt: skip
    yield from in_time(setting, cases, _LEAST_S)
    yield from _derived(setting, seconds, how)


def decoder_graph(shape: DecoderShape, setting: Setting) -> tuple[OnnxGraph, Any]:
    """A random Llama exported as every decoder is, and the same weights in torch to compare with."""
    positions = max(setting.contexts)
    model = new_llama(shape, positions, setting.dtype, setting.device)  # where random numbers are made fast
    facts = Generation(
        bos_id=None, eos_ids=(), pad_id=0, start_id=None, layers=shape.layers, heads=shape.heads,
        kv_heads=shape.kv_heads, head_dim=shape.head_dim, max_positions=positions, vocabulary=shape.vocabulary,
        tied=False,
    )  # fmt: skip
    folder = setting.scratch / f"decoder-{shape.layers}"
    if not folder.is_dir():  # else the other flavour's section has made it
        with atomic_directory(folder) as work:
            export.write_graph(model.to("cpu"), facts, positions, [None] * shape.layers, work / GRAPH_FILE)
    # Nothing judges random weights.
    unjudged = GenerationQuality(perplexity=np.nan, reference_perplexity=np.nan, tokens=0, executor="none")
    graph = record_graph(folder, setting.precision, unjudged, f"random, {shape.layers} layers")
    return graph, model.to(setting.device)


def open_executor(
    setting: Setting, plan: Path, graph: OnnxGraph, capacity: int, rows: int, flavour: Flavour
) -> StepExecutor:
    if setting.dry:
        from runtime.generation.executor.onnxruntime import OnnxRuntimeStepExecutor

        return OnnxRuntimeStepExecutor(graph.file_path, (capacity,), rows, threads=1)
    from runtime.tensorrt.executor import TensorRtStepExecutor

    engines = {f"{setting.target}.{capacity}": plan}
    return TensorRtStepExecutor(engines, (capacity,), rows, flavour=flavour, device=0)


def _compared(setting: Setting, executor: StepExecutor, model: Any, row: Measured) -> Measured:
    """A prompt and a token after it, against the same weights in torch. Raises ParityError where they differ."""
    import torch

    ids = np.random.default_rng(0).integers(0, executor.vocabulary, (1, _PROMPT + 1))
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids).to(setting.device)).logits[0].float().cpu().numpy()
    worst = 0.0
    for start, end in ((0, _PROMPT), (_PROMPT, _PROMPT + 1)):
        [got] = np.array(executor.run([Batch(0, 0, ids[:, start:end], np.array([start]))])[0])
        worst = max(worst, float(np.abs(got - expected[end - 1]).max() / np.abs(expected[end - 1]).max()))
    if not worst <= MOST_DIFFERENCE[setting.dtype]:
        raise ParityError(f"{row.case}, {row.how}: logits differ by {worst:.1e} of the largest from torch's")
    return replace(row, case=f"{row.case}, against torch", figures={"relative_difference": worst})


def _decode_seconds(setting: Setting, executor: StepExecutor, context: int, rows: int) -> float:
    """A greedy step at the end of a full cache, so that all of it is read."""
    batch = Batch(0, 0, np.ones((rows, 1), np.int64), np.full(rows, context - 1, np.int64))
    return seconds_of(lambda: executor.run([batch])[0].argmax(axis=1), setting)


def _derived(setting: Setting, seconds: Seconds, how: str) -> Iterator[Measured]:
    few, more = setting.depths
    for context, rows in product(setting.contexts, setting.decode_rows):
        if (few, context, rows) in seconds and (more, context, rows) in seconds:
            first, second = seconds[few, context, rows], seconds[more, context, rows]
            whole = whole_seconds(first, second, setting.depths, setting.decoder.layers)
            work = decode_work(setting.decoder, rows, context, setting.value_bytes)
            row = decode_row(setting, how, context, rows, f"derived from {few} and {more} layers")
            figures = {"tokens_per_s": rows / whole, "block_ms": (second - first) / (more - few) * 1e3}
            yield against(row, work, whole, setting.limits, **figures)


def whole_seconds(few: float, more: float, depths: tuple[int, int], layers: int) -> float:
    """Time of `layers` equal blocks and what they share, from the times at two depths."""
    return few + (layers - depths[0]) * (more - few) / (depths[1] - depths[0])


def _looped(setting: Setting, executor: StepExecutor, context: int, row: Measured) -> Iterator[Measured]:
    """In the bare loop, and a step of the serving loop split into its parts."""
    rows, new = min(8, max(setting.decode_rows)), min(setting.steps, context // 2)
    loop = bare_loop(executor, 0, rows, context - new, new)
    figures = {"tokens_per_s": loop.decode_tokens_per_second, "prompt_s": loop.prefill_seconds / rows}
    yield replace(row, case=f"{row.case}, bare loop, batch {rows}", figures=figures)
    executor.reset()  # the loop has left its own keys and values
    yield _split(engine_over(executor, context, 1, chunk=context), setting.steps + 8, row)


def engine_over(executor: StepExecutor, capacity: int, slots: int, chunk: int) -> GenerationEngine:
    """The serving loop with one pool; the executor has `slots + KEPT` rows."""
    cache = SlotCache((capacity,), slots, KEPT)
    scheduler = Scheduler(cache, chunk_tokens=chunk, queue_size=64, call_cost=executor.call_cost)
    return GenerationEngine(executor, scheduler, Limits(executor.vocabulary, capacity, capacity, ()))


def _split(engine: GenerationEngine, tokens: int, row: Measured) -> Measured:
    """Milliseconds of one step of a stream by what they were spent on: the loop's own counters."""
    tokens = min(tokens, engine.limits.max_length - 1)
    prompt = np.ones(engine.limits.max_length - tokens, np.int64)
    engine.submit(prompt, SamplingParams(max_tokens=tokens, min_tokens=tokens))
    for _ in range(3):  # the prompt, and the steps that capture
        engine.step()
    spent = engine.counters = Counters()  # of the steps from here
    while engine.step():
        for update in engine.take_updates():
            if update.error is not None:
                raise update.error
    parts = {"step": spent.step_seconds, "executor": spent.executor_seconds, "sampling": spent.sample_seconds}
    parts["scheduling"] = spent.step_seconds - spent.executor_seconds - spent.sample_seconds
    share = 1 - spent.executor_seconds / spent.step_seconds
    figures = {f"{name}_ms": seconds / spent.steps * 1e3 for name, seconds in parts.items()}
    figures |= {"host_share": share, "tokens_per_s": spent.steps / spent.step_seconds}
    note = f"the aim is a host share of at most {HOST_AIM:.0%}: {'met' if share <= HOST_AIM else 'missed'}"
    case = f"{row.case}, a step of the serving loop, batch 1"
    return replace(row, case=case, axes={"batch": 1}, figures=figures, note=note)
