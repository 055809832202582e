"""Decoding and prompts of a large decoder in torch: eager, and compiled and launched as CUDA graphs.

`ms` is the time of a step on the device. `contract_ms` is that of a greedy step as the serving loop sees it, tokens in
and tokens out; the difference is what the host adds.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from measure.bench.bare_loop import bare_loop
from measure.bench.decoder_graph import DecoderShape
from measure.gpu_proof.llama import Llama, TorchStepExecutor, random_llama
from measure.gpu_proof.machine import require_torch
from measure.gpu_proof.record import Row
from measure.gpu_proof.roofline import Limits, against, decode_work, position_bytes, prefill_work, weight_bytes
from measure.gpu_proof.setting import Budget, NotRun, Setting
from measure.gpu_proof.timing import device_seconds, host_seconds
from runtime.step import Batch

_ROOM = 0.9  # of the memory: the rest is for workspaces and the logits


@dataclass(frozen=True)
class Way:
    compile: bool
    graph: bool

    def name(self, setting: Setting) -> str:
        kind = "torch.compile" if self.compile else "torch eager"
        return f"{kind} + CUDA graph" if self.graph and setting.device == "cuda" else kind


WAYS = (Way(compile=True, graph=True), Way(compile=False, graph=False))  # the better one first: time may run out


def decode_case(setting: Setting, rows: int, context: int) -> str:
    return f"{setting.decoder_name}, decode, batch {rows}, context {context}"


def open_executor(setting: Setting, model: Llama, capacity: int, rows: int, way: Way) -> TorchStepExecutor:
    compiler = setting.compiler if way.compile else None
    graphs = way.graph and setting.device == "cuda"
    return TorchStepExecutor(model, (capacity,), rows, compiler=compiler, graphs=graphs)


def fitting_shape(setting: Setting) -> DecoderShape:
    """With fewer layers where not even one row of the shortest context fits. Raises NotRun where none does."""
    shape = setting.decoder
    layers = shape.layers
    while layers and not fits(setting, replace(shape, layers=layers), 1, min(setting.contexts)):
        layers //= 2
    if not layers:
        raise NotRun(f"one layer of the {setting.decoder_name} does not fit this device's memory")
    return replace(shape, layers=layers)


def fits(setting: Setting, shape: DecoderShape, rows: int, context: int, *, weights_held: bool = False) -> bool:
    needed = rows * context * position_bytes(shape, setting.value_bytes)
    needed += 0 if weights_held else weight_bytes(shape, setting.value_bytes)
    return needed < _ROOM * _free_bytes(setting)


def _free_bytes(setting: Setting) -> float:
    if setting.device == "cpu":
        return 2e9  # far more than the dry run's shapes need
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info()[0])


def measure(setting: Setting, limits: Limits | None, budget: Budget) -> Iterator[Row]:
    require_torch(setting)
    shape = fitting_shape(setting)
    model = random_llama(shape, max(setting.contexts), setting.dtype, setting.device)
    note = "" if shape == setting.decoder else f"{shape.layers} of {setting.decoder.layers} layers: memory"
    longest = 0.0
    for way in WAYS:
        for context in setting.contexts:
            for rows in setting.decode_rows:
                case, axes = decode_case(setting, rows, context), {"batch": rows, "context": context}
                row = Row(case, way.name(setting), axes=axes, note=note)
                if not fits(setting, shape, rows, context, weights_held=True):
                    needed = rows * context * position_bytes(shape, setting.value_bytes) / 1e9
                    yield replace(row, reason=f"a cache of {needed:.0f} GB does not fit what is left of the memory")
                elif budget.left_s < 2 * longest:
                    yield replace(row, reason="time")
                else:
                    began = time.monotonic()
                    yield _decode(setting, limits, model, way, row)
                    longest = max(longest, time.monotonic() - began)
        for length in setting.contexts:
            row = Row(f"{setting.decoder_name}, prompt of {length}", way.name(setting), {"length": length}, note=note)
            yield (
                replace(row, reason="time")
                if budget.left_s < 2 * longest
                else _prefill(setting, limits, model, way, row, length)
            )


def _decode(setting: Setting, limits: Limits | None, model: Llama, way: Way, row: Row) -> Row:
    """The last positions of a full cache, so that all `context` of them are read."""
    rows, context = row.axes["batch"], row.axes["context"]
    executor = open_executor(setting, model, context, rows, way)
    try:
        ids, places = np.ones((rows, 1), np.int64), np.full(rows, context - 1, np.int64)
        batch = Batch(0, 0, ids, places)
        contract = host_seconds(lambda: executor.run([batch])[0].argmax(axis=1), setting)
        launch, _ = executor.decode(batch)
        seconds = device_seconds(launch, setting)
        figures, facts = against(decode_work(model.shape, rows, context, setting.value_bytes), seconds, limits)
        figures |= {"tokens_per_s": rows / seconds, "contract_ms": contract * 1e3}
        if context == min(setting.contexts):  # the loop of whole generations, prompts and all
            new = min(setting.steps, context // 2)
            loop = bare_loop(executor, 0, rows, context - new, new)
            figures["loop_tokens_per_s"] = loop.decode_tokens_per_second
        return replace(row, figures=figures, facts=facts)
    finally:
        executor.close()


def _prefill(setting: Setting, limits: Limits | None, model: Llama, way: Way, row: Row, length: int) -> Row:
    executor = open_executor(setting, model, length, 1, Way(way.compile, graph=False))
    try:
        batch = Batch(0, 0, np.ones((1, length), np.int64), np.zeros(1, np.int64))
        seconds = device_seconds(lambda: executor.prefill(batch, compiled=way.compile), setting)
        figures, facts = against(prefill_work(model.shape, length, setting.value_bytes), seconds, limits)
        return replace(row, figures={**figures, "tokens_per_s": length / seconds}, facts=facts)
    finally:
        executor.close()
