"""Decoding and prompts of a large decoder in torch: compiled and launched as CUDA graphs, and eager; and in vLLM.

`ms` is the time of a step on the device. `contract_ms` is that of a greedy step as the serving loop sees it, tokens in
and tokens out; the difference is what the host adds.
"""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from measure.bench.bare_loop import bare_loop
from measure.bench.decoder_graph import DecoderShape
from measure.gpu_proof.llama import TorchStepExecutor, llama_config, new_llama
from measure.gpu_proof.machine import require_torch
from measure.gpu_proof.record import Row
from measure.gpu_proof.roofline import against, decode_work, position_bytes, prefill_work, weight_bytes
from measure.gpu_proof.setting import NotRun, Setting
from measure.gpu_proof.timing import Case, device_seconds, host_seconds, in_time
from runtime.step import Batch

_ROOM = 0.9  # of the memory: the rest is for workspaces and the logits
_VLLM_ROOM = 0.85


def way(setting: Setting, *, compiled: bool) -> str:
    if not compiled:
        return "torch eager"
    return "torch.compile + CUDA graph" if setting.device == "cuda" else "torch.compile"


def decode_row(setting: Setting, how: str, context: int, rows: int, note: str = "") -> Row:
    case = f"{setting.decoder_name}, decode, batch {rows}, context {context}"
    return Row(case, how, {"batch": rows, "context": context}, note=note)


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


def measure(setting: Setting) -> Iterator[Row]:
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
            row = Row(f"{setting.decoder_name}, prompt of {length}", how, {"length": length}, note=note)
            yield row, partial(_prefill, setting, shape, model, compiled)


def _decode(setting: Setting, shape: DecoderShape, model: Any, compiled: bool, row: Row) -> Row:
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


def _prefill(setting: Setting, shape: DecoderShape, model: Any, compiled: bool, row: Row) -> Row:
    length = row.axes["length"]
    executor = open_executor(setting, model, length, 1, compiled=compiled)
    try:
        batch = Batch(0, 0, np.ones((1, length), np.int64), np.zeros(1, np.int64))
        seconds = device_seconds(lambda: executor.prefill(batch, compiled=compiled), setting)
        work = prefill_work(shape, length, setting.value_bytes)
        return against(row, work, seconds, setting.limits, tokens_per_s=length / seconds)
    finally:
        executor.close()


def measure_vllm(setting: Setting) -> Iterator[Row]:
    """What the field decodes with. Weights are random there too (`load_format="dummy"`): no checkpoint is written."""
    require_torch(setting, "vllm", "transformers")
    if setting.dry:
        raise NotRun("vLLM is measured on a GPU only")
    vllm: Any = importlib.import_module("vllm")
    folder = setting.scratch / "vllm"
    llama_config(setting.decoder, max(setting.contexts)).save_pretrained(folder)
    llm = vllm.LLM(
        str(folder), load_format="dummy", skip_tokenizer_init=True, dtype="float16",
        max_model_len=max(setting.contexts), gpu_memory_utilization=_VLLM_ROOM,
    )  # fmt: skip
    random = np.random.default_rng(0)

    def decode(row: Row) -> Row:
        rows, context = row.axes["batch"], row.axes["context"]
        new = min(setting.steps, context // 2)
        ids = random.integers(0, setting.decoder.vocabulary, (rows, context - new)).tolist()
        times = []
        for count in (1, new):  # the same prompts twice: what is common to both is no decode step
            began = time.perf_counter()
            chosen = vllm.SamplingParams(max_tokens=count, min_tokens=count, temperature=0)
            llm.generate([{"prompt_token_ids": prompt} for prompt in ids], chosen, use_tqdm=False)
            times.append(time.perf_counter() - began)
        seconds = (times[1] - times[0]) / (new - 1)
        work = decode_work(setting.decoder, rows, context, setting.value_bytes)
        return against(row, work, seconds, setting.limits, tokens_per_s=rows / seconds)

    sizes = product(setting.contexts, setting.decode_rows)
    cases = ((decode_row(setting, "vLLM", *size, note="from its own loop"), decode) for size in sizes)
    yield from in_time(setting, cases, least_s=10)
