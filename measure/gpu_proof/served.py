"""The service end to end: tokens and sentences a second through Triton's gRPC port, with the engines behind it.

The section "serving loop" (see `step`) measures the same loop in process, also where no engine or no server is there.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from builders import pipeline
from builders.judging import corpus
from builders.spec import DeploymentSpec, Flavour
from measure.bench.random_llama import LLAMA_100M
from measure.gpu_proof.folders import TINY_LLAMA, encoder_source, write_llama
from measure.gpu_proof.machine import try_flavour
from measure.gpu_proof.record import Row
from measure.gpu_proof.roofline import Limits
from measure.gpu_proof.setting import Budget, NotRun, Setting
from runtime.client import Client, stream
from runtime.errors import BadEnvironment
from runtime.server.supervise import ready_server

_NEW_TOKENS = 32
_TEXTS_A_REQUEST = 32
_LEAST_S = 30.0  # of the budget, to build, to start and to ask
_HOW = "embedded Triton, gRPC"
_IMAGE = Path("/opt/tritonserver")  # where NVIDIA's image keeps its server


def measure(setting: Setting, limits: Limits | None, budget: Budget, *, flavour: Flavour) -> Iterator[Row]:
    """Without a GPU the service runs on ONNX Runtime; it is asked for with a flavour that builds, like the engines."""
    try_flavour(flavour, setting)
    for module in ("tritonclient", "tritonclient.grpc"):
        if importlib.util.find_spec(module) is None:
            raise NotRun(f"no module {module}; the serving loop is measured in process")
    for case, serve in (("language model", _generation), ("sentences", _sentences)):
        if budget.left_s < _LEAST_S and not setting.dry:
            yield Row(f"{case} behind Triton", _HOW, reason="time")
            continue
        try:
            yield serve(setting, flavour)
        except NotRun as refused:
            yield Row(f"{case} behind Triton", _HOW, reason=str(refused))


def _served(setting: Setting, flavour: Flavour, spec: dict[str, Any], drive: Callable[[str, str], Row]) -> Row:
    """Builds, serves, drives: the commands that users give. Raises NotRun where no server is there."""
    engine = {"engine": {"flavour": flavour, "targets": [setting.target]}}
    serving = {"executor": "onnxruntime", **spec.get("serving", {})}  # without a GPU, as everywhere in the dry run
    checked = DeploymentSpec.model_validate({**spec, **engine, "serving": serving})
    built = pipeline.build(checked, "cpu" if setting.dry else "gpu", setting.scratch, "repository")
    assert built.entry is not None
    try:
        with ready_server(built.entry.repository) as server:
            return drive(server.grpc_address, checked.name)
    except BadEnvironment as error:
        raise NotRun(f"{error}; the serving loop is measured in process") from error


def _generation(setting: Setting, flavour: Flavour) -> Row:
    sizes = TINY_LLAMA if setting.dry else LLAMA_100M
    source = write_llama(sizes, setting.scratch / "llama-folder")
    streams = max(rows for rows in setting.decode_rows if rows <= 32)
    spec = {
        "name": "proof-llama",
        "model": {"source": str(source), "task": "generation", "max_length": sizes.context},
        "precision": {"cpu": "fp32", "gpu": "fp16"},
        "generation": {"slots": streams},
    }
    case = f"language model of {'100 M' if not setting.dry else 'few'} weights behind Triton, {streams} streams"

    def drive(address: str, name: str) -> Row:
        prompts = np.random.default_rng(0).integers(1, sizes.vocabulary, (2 * streams, 16))
        streamed_per_second(address, name, prompts[:streams], 4)  # warm
        rate = streamed_per_second(address, name, prompts[streams:], _NEW_TOKENS)
        return Row(case, _HOW, {"batch": streams}, {"tokens_per_s": rate})

    return _served(setting, flavour, spec, drive)


def streamed_per_second(address: str, model: str, prompts: Any, new_tokens: int) -> float:
    """Tokens a second of one stream for each prompt, all at once."""

    def ask(prompt: Any) -> int:
        options = {"input_ids": prompt.tolist(), "max_tokens": new_tokens, "min_length": new_tokens}
        return sum(len(chunk.tokens) for chunk in stream(address, model, None, options))

    began = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        tokens = sum(pool.map(ask, prompts))
    return tokens / (time.perf_counter() - began)


def _sentences(setting: Setting, flavour: Flavour) -> Row:
    if flavour == "tensorrt" and not _IMAGE.is_dir():
        raise NotRun("Triton's own tensorrt backend serves such an encoder, and only NVIDIA's image has it")
    shape, longest = setting.encoders[0], max(setting.lengths)
    spec = {
        "name": "proof-encoder",
        "model": {
            "source": encoder_source(shape, setting), "task": "embedding", "max_length": longest, "pooling": "mean"
        },
        "precision": {"cpu": "fp32", "gpu": "fp16"},
        "serving": {"max_batch_size": _TEXTS_A_REQUEST, "length_buckets": list(setting.lengths)},
    }  # fmt: skip
    texts = corpus.texts(None, 256 if setting.dry else 2048)

    def drive(address: str, name: str) -> Row:
        embedded_per_second(address, name, texts[:_TEXTS_A_REQUEST], 1)  # warm
        rate = embedded_per_second(address, name, texts, 8)
        return Row(f"{shape.name} behind Triton, 8 clients", _HOW, {}, {"sentences_per_s": rate})

    return _served(setting, flavour, spec, drive)


def embedded_per_second(address: str, model: str, texts: Sequence[str], clients: int) -> float:
    """Sentences a second: requests of 32 texts, `clients` of them under way."""

    def ask(start: int) -> int:
        return len(client.vectors(model, texts[start : start + _TEXTS_A_REQUEST]))

    with Client(address) as client, ThreadPoolExecutor(clients) as pool:
        began = time.perf_counter()
        done = sum(pool.map(ask, range(0, len(texts), _TEXTS_A_REQUEST)))
        return done / (time.perf_counter() - began)
