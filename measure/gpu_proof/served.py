"""Built as users build it: tokens and sentences a second through Triton's gRPC port, with the engines behind it; and a
decoder on tensor and pipeline ranks, a process a GPU, in the bare loop.

The section "serving loop" (see `decoders`) measures that loop in process, also where no engine or no server is there.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from builders.judging import corpus
from builders.spec import DeploymentSpec, Flavour
from measure.bench.bare_loop import bare_loop
from measure.gpu_proof.folders import encoder_spec, llama, repository, spec
from measure.gpu_proof.machine import require_gpus, try_flavour
from measure.gpu_proof.record import Measured
from measure.gpu_proof.setting import NotRun, Setting, in_time
from runtime.client import Client, stream
from runtime.errors import BadEnvironment
from runtime.generation.opening import open_engine
from runtime.server.supervise import ready_server
from runtime.settings import GeneratorModelSettings

_NEW_TOKENS = 32
_CLIENTS = 8
_LEAST_S = 40.0  # of the budget, to build, to start and to ask
_LAYOUTS = ((4, 1), (2, 1), (2, 2), (1, 2))  # tensor x pipeline; LLAMA_100M has 4 key-value heads
_RANK_ROWS = 4
_IMAGE = Path("/opt/tritonserver")  # where NVIDIA's image keeps its server


def measure(setting: Setting, flavour: Flavour) -> Iterator[Measured]:
    """Without a GPU the service runs on ONNX Runtime; it is asked for with a flavour that builds, like the engines."""
    try_flavour(flavour, setting)
    for module in ("tritonclient", "tritonclient.grpc"):
        if importlib.util.find_spec(module) is None:
            raise NotRun(f"no module {module}; the serving loop is measured in process")
    how = "embedded Triton, gRPC"
    cases = (
        (Measured("language model behind Triton", how), partial(_generation, setting, flavour)),
        (Measured("sentences behind Triton", how), partial(_sentences, setting, flavour)),
    )
    return in_time(setting, cases, _LEAST_S)


def _served(setting: Setting, asked: DeploymentSpec, drive: Callable[[str, str], float]) -> float:
    """Builds, serves, drives: the commands that users give. Raises NotRun where no server is there."""
    folder, _ = repository(setting, asked)
    try:
        with ready_server(folder) as server:
            return drive(server.grpc_address, asked.name)
    except BadEnvironment as error:
        raise NotRun(f"{error}; the serving loop is measured in process") from error


def _generation(setting: Setting, flavour: Flavour, row: Measured) -> Measured:
    source, sizes, name = llama(setting)
    streams = max(rows for rows in setting.decode_rows if rows <= 32)
    model = {"source": source, "task": "generation", "max_length": sizes.context}
    prompts = np.random.default_rng(0).integers(1, sizes.vocabulary, (2 * streams, 16))

    def drive(address: str, model: str) -> float:
        streamed_per_second(address, model, prompts[:streams], 4)  # warm
        return streamed_per_second(address, model, prompts[streams:], _NEW_TOKENS)

    rate = _served(setting, spec(setting, flavour, "proof-llama", model, generation={"slots": streams}), drive)
    case = f"{name} behind Triton, {streams} streams"
    return replace(row, case=case, axes={"batch": streams}, figures={"tokens_per_s": rate})


def streamed_per_second(address: str, model: str, prompts: Any, new_tokens: int) -> float:
    """Tokens a second of one stream for each prompt, all at once."""

    def ask(prompt: Any) -> int:
        options = {"input_ids": prompt.tolist(), "max_tokens": new_tokens, "min_length": new_tokens}
        return sum(len(chunk.tokens) for chunk in stream(address, model, None, options))

    began = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        tokens = sum(pool.map(ask, prompts))
    return tokens / (time.perf_counter() - began)


def _sentences(setting: Setting, flavour: Flavour, row: Measured) -> Measured:
    if flavour == "tensorrt" and not _IMAGE.is_dir():
        raise NotRun("Triton's own tensorrt backend serves such an encoder, and only NVIDIA's image has it")
    shape, size = setting.encoders[0], min(32, max(setting.batches))
    texts = corpus.texts(None, 256 if setting.dry else 2048)

    def drive(address: str, model: str) -> float:
        embedded_per_second(address, model, texts[:size], 1, size)  # warm
        return embedded_per_second(address, model, texts, _CLIENTS, size)

    rate = _served(setting, encoder_spec(shape, setting, flavour), drive)
    return replace(row, case=f"{shape.name} behind Triton, {_CLIENTS} clients", figures={"sentences_per_s": rate})


def embedded_per_second(address: str, model: str, texts: Sequence[str], clients: int, size: int) -> float:
    """Sentences a second: requests of `size` texts, `clients` of them under way."""

    def ask(start: int) -> int:
        return len(client.vectors(model, texts[start : start + size]))

    with Client(address) as client, ThreadPoolExecutor(clients) as pool:
        began = time.perf_counter()
        done = sum(pool.map(ask, range(0, len(texts), size)))
        return done / (time.perf_counter() - began)


def ranks(setting: Setting) -> Iterator[Measured]:
    gpus = require_gpus(setting)
    if not setting.dry:
        try_flavour("tensorrt", setting)  # TensorRT for RTX has no collectives over several GPUs
    name, how = llama(setting)[2], "rank step executor"
    cases = (
        (
            Measured(f"{name} on {tensor} x {stages} ranks", how, {"batch": _RANK_ROWS}),
            partial(_on_ranks, setting, tensor, stages),
        )
        for tensor, stages in _LAYOUTS
        if tensor * stages <= gpus and (tensor == 2 or not setting.dry)
    )
    yield from in_time(setting, cases, _LEAST_S)


def _on_ranks(setting: Setting, tensor: int, stages: int, row: Measured) -> Measured:
    source, sizes, _ = llama(setting)
    asked = spec(
        setting, "tensorrt", f"proof-ranks-{tensor}-{stages}",
        {"source": source, "task": "generation", "max_length": sizes.context},
        parallel={"tensor": tensor, "pipeline": stages}, generation={"slots": _RANK_ROWS},
    )  # fmt: skip
    _, directory = repository(setting, asked)
    settings = GeneratorModelSettings.load(directory)
    engine, _ = open_engine(settings, directory)
    try:
        prompt, new = sizes.context // 2, min(_NEW_TOKENS, sizes.context // 2)
        pool = next(at for at, size in enumerate(settings.capacities) if size >= prompt + new)
        loop = bare_loop(engine.executor, pool, _RANK_ROWS, prompt, new)
    finally:
        engine.executor.close()
    return replace(row, figures={"tokens_per_s": loop.decode_tokens_per_second})
