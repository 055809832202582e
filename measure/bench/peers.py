"""What people use today, in process: text to vector over the same texts, sorted by length, in batches of 32.

Each peer runs as its own documentation says, on all cores. Those that are not installed are left out and named.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from builders.judging.vectors import graph_outputs, measure, sample_requests, tokenizer_settings
from builders.pipeline import Build
from runtime.encoding.tokenizer import Encoded, Tokenizer
from runtime.session import open_session

BATCH = 32
ROUNDS = 3
Vectors = NDArray[np.float32]
Embed = Callable[[Sequence[str]], Vectors]


@dataclass(frozen=True)
class Peer:
    name: str
    texts_per_s: float
    mean_cosine: float
    worst_cosine: float


def reference(built: Build, texts: Sequence[str]) -> Vectors:
    """The fp32 graph by ONNX Runtime."""
    return graph_outputs(built.graph("fp32").file_path, sample_requests(built.checkpoint, texts), built.checkpoint)


def absent() -> list[str]:
    return [name for name in ("sentence_transformers", "ctranslate2") if importlib.util.find_spec(name) is None]


def run_all(built: Build, texts: Sequence[str], expected: Vectors) -> list[Peer]:
    """The best of three rounds for each."""
    with tempfile.TemporaryDirectory(prefix="trireme-peers-") as scratch:
        makers: dict[str, Callable[[], Embed]] = {
            "ONNX Runtime fp32": lambda: _onnxruntime(built, built.graph("fp32").file_path),
            "ONNX Runtime dynamic int8": lambda: _onnxruntime(built, _dynamic_int8(built, Path(scratch))),
            "OpenVINO bf16": lambda: openvino(built, built.graph("fp32").file_path, "bf16"),
        }
        missing = absent()
        if "sentence_transformers" not in missing:
            makers["sentence-transformers fp32"] = lambda: _sentence_transformers(built)
        if "ctranslate2" not in missing:
            makers["CTranslate2 int8"] = lambda: _ctranslate2(built, Path(scratch))
        return [_measure(name, make(), texts, expected) for name, make in makers.items()]


def _measure(name: str, embed: Embed, texts: Sequence[str], expected: Vectors) -> Peer:
    embed(texts[:BATCH])
    best = 0.0
    for _ in range(ROUNDS):
        best = max(best, rate(embed, texts))
    quality = measure(expected, embed(texts), "embedding", name)
    return Peer(name, best, quality.mean_cosine, quality.worst_cosine)


def rate(embed: Embed, texts: Sequence[str]) -> float:
    """Texts a second of one pass."""
    started = time.perf_counter()
    embed(texts)
    return len(texts) / (time.perf_counter() - started)


def _batched(built: Build, run: Callable[[list[Encoded], Tokenizer], Vectors]) -> Embed:
    """Tokenise, sort by length, batches of 32, original order."""
    tokenizer = Tokenizer(built.checkpoint.path("tokenizer.json"), tokenizer_settings(built.checkpoint))

    def embed(texts: Sequence[str]) -> Vectors:
        encoded = tokenizer.encode(texts)
        order = sorted(range(len(texts)), key=lambda index: len(encoded[index].ids))
        vectors = np.empty((len(texts), built.checkpoint.width), np.float32)
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            vectors[part] = run([encoded[index] for index in part], tokenizer)
        return vectors

    return embed


def _onnxruntime(built: Build, file: Path) -> Embed:
    session = open_session(file, threads=os.cpu_count() or 1)
    return _batched(built, lambda batch, tokenizer: session.run(None, tokenizer.pad(batch))[0])


def _dynamic_int8(built: Build, scratch: Path) -> Path:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = scratch / "dynamic.onnx"
    source = built.graph("fp32").file_path
    # Its operator for a quantised Attention does not know opset 24's, so attention stays in fp32.
    names = [node.name for node in onnx.load(str(source)).graph.node if node.op_type == "Attention"]
    options = {"weight_type": QuantType.QInt8, "per_channel": True, "nodes_to_exclude": names}
    quantize_dynamic(str(source), str(target), **options)
    return target


def openvino(built: Build, file: Path, arithmetic: str) -> Embed:
    """OpenVINO's Python API as documented: one batch at a time on all cores."""
    import openvino as ov

    config = {"INFERENCE_PRECISION_HINT": arithmetic, "PERFORMANCE_HINT": "LATENCY"}
    model = ov.Core().compile_model(str(file), "CPU", config)
    return _batched(built, lambda batch, tokenizer: model(tokenizer.pad(batch))[0])


def _sentence_transformers(built: Build) -> Embed:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(built.checkpoint.directory), device="cpu")
    model.max_seq_length = built.checkpoint.max_length
    return lambda texts: model.encode(list(texts), batch_size=BATCH, show_progress_bar=False)


def _ctranslate2(built: Build, scratch: Path) -> Embed:
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    folder = scratch / "ctranslate2"
    TransformersConverter(str(built.checkpoint.directory)).convert(str(folder), quantization="int8")
    encoder = ctranslate2.Encoder(str(folder), device="cpu", compute_type="int8", intra_threads=os.cpu_count() or 1)

    def run(batch: list[Encoded], tokenizer: Tokenizer) -> Vectors:
        output = encoder.forward_batch([item.ids for item in batch])
        hidden = np.array(output.last_hidden_state)
        vectors = np.stack([hidden[row, : len(item.ids)].mean(axis=0) for row, item in enumerate(batch)])
        unit: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit

    return _batched(built, run)
