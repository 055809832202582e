"""Built as users build it: tokens and sentences a second through Triton's gRPC port, with the engines behind it; and a
decoder on tensor and pipeline ranks, a process a GPU, in the bare loop.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from builders.judging import corpus
from builders.spec import DeploymentSpec, Flavour
from measure.bench.bare_loop import bare_loop
from measure.bench.random_llama import random_prompts
from measure.gpu_proof.folders import encoder_spec, llama, llama_spec, repository
from measure.gpu_proof.machine import require_gpus, try_flavour
from measure.gpu_proof.record import Measured
from measure.gpu_proof.setting import Setting
from measure.gpu_proof.timing import NotRun, in_time
from runtime.client import Client, stream
from runtime.errors import BadEnvironment
from runtime.generation.grouping import pool_for
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
    if importlib.util.find_spec("tritonclient") is None:
        raise NotRun("no module tritonclient; the serving loop over engines is measured in process")
    streams = max(rows for rows in setting.decode_rows if rows <= 32)
    generating = f"{llama(setting)[0]} behind Triton, {streams} streams"
    encoding = f"{setting.encoders[0].name} behind Triton, {_CLIENTS} clients"
    how = "embedded Triton, gRPC"
    cases = [
        (Measured(generating, how, {"batch": streams}), partial(_generation, setting, flavour)),
        (Measured(encoding, how), partial(_sentences, setting, flavour)),
    ]
    return in_time(setting, cases, _LEAST_S)


def _generation(setting: Setting, flavour: Flavour, row: Measured) -> Iterator[Measured]:
    streams, (_, sizes) = row.axes["batch"], llama(setting)
    asked = llama_spec(setting, flavour, "proof-llama", streams)

    def ask(client: Client, address: str, prompt: Any) -> int:  # a stream has a connection of its own
        options = {"input_ids": prompt.tolist(), "max_tokens": _NEW_TOKENS, "min_length": _NEW_TOKENS}
        return sum(len(chunk.tokens) for chunk in stream(address, asked.name, None, options))

    rate = _per_second(setting, asked, list(random_prompts(2 * streams, 16, sizes.vocabulary)), streams, ask)
    yield replace(row, figures={"tokens_per_s": rate})


def _sentences(setting: Setting, flavour: Flavour, row: Measured) -> Iterator[Measured]:
    if flavour == "tensorrt" and not _IMAGE.is_dir():
        raise NotRun("Triton's own tensorrt backend serves such an encoder, and only NVIDIA's image has it")
    size, texts = min(32, max(setting.batches)), corpus.texts(None, 64 if setting.dry else 2048)
    asked = encoder_spec(setting.encoders[0], setting, flavour)

    def ask(client: Client, address: str, some: list[str]) -> int:
        return len(client.vectors(asked.name, some))

    requests = [texts[start : start + size] for start in range(0, len(texts), size)]
    yield replace(row, figures={"sentences_per_s": _per_second(setting, asked, requests, _CLIENTS, ask)})


def _per_second(
    setting: Setting, asked: DeploymentSpec, requests: list[Any], clients: int, ask: Callable[[Client, str, Any], int]
) -> float:
    """What `ask` counts, a second: built and served by what users call, warmed by half of the requests, timed over the
    rest with `clients` of them under way. Raises NotRun where no server is there.
    """
    folder, _ = repository(setting, asked)
    half = len(requests) // 2
    try:
        with ready_server(folder) as server, Client(server.grpc_address) as client, ThreadPoolExecutor(clients) as pool:
            counted = partial(ask, client, server.grpc_address)
            list(pool.map(counted, requests[:half]))
            began = time.perf_counter()
            return sum(pool.map(counted, requests[half:])) / (time.perf_counter() - began)
    except BadEnvironment as error:
        raise NotRun(f"{error}; the serving loop over engines is measured in process") from error


def ranks(setting: Setting) -> Iterator[Measured]:
    gpus, (name, _) = require_gpus(setting), llama(setting)
    if not setting.dry:
        try_flavour("tensorrt", setting)  # TensorRT for RTX has no collectives over several GPUs
    layouts = [(2, 1)] if setting.dry else [each for each in _LAYOUTS if each[0] * each[1] <= gpus]
    rows = (
        Measured(f"{name} on {tensor} x {stages} ranks", "rank step executor", {"tensor": tensor, "pipeline": stages})
        for tensor, stages in layouts
    )
    return in_time(setting, ((row, partial(_on_ranks, setting)) for row in rows), _LEAST_S)


def _on_ranks(setting: Setting, row: Measured) -> Iterator[Measured]:
    name, (_, sizes) = "proof-ranks-{tensor}-{pipeline}".format_map(row.axes), llama(setting)
    asked = llama_spec(setting, "tensorrt", name, _RANK_ROWS, parallel=row.axes)
    _, directory = repository(setting, asked)
    settings = GeneratorModelSettings.load(directory)
    engine, _ = open_engine(settings, directory)
    try:
        prompt, new = sizes.context // 2, min(_NEW_TOKENS, sizes.context // 2)
        loop = bare_loop(engine.executor, pool_for(prompt + new, settings.capacities), _RANK_ROWS, prompt, new)
    finally:
        engine.executor.close()
    axes = {"batch": _RANK_ROWS, **row.axes}
    yield replace(row, axes=axes, figures={"tokens_per_s": loop.decode_tokens_per_second})
