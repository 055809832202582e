"""A tiny real decoder, its tokenizer, and engines over them, for the tests of generation."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from builders.artifacts import file_digest
from builders.judging import corpus
from builders.judging.perplexity import continuation_losses
from builders.repository.generator_config import generator_config
from runtime.generation.cache import SlotCache
from runtime.generation.engine import GenerationEngine
from runtime.generation.executor.onnxruntime import OnnxRuntimeStepExecutor
from runtime.generation.guides import Guide
from runtime.generation.request import Limits, Tokens
from runtime.generation.scheduler import Scheduler
from runtime.model_config import to_pbtxt
from runtime.proof.record import PROOF_FILE, GeneratorProof, ProofRow
from runtime.settings import GeneratorModelSettings, ServedModel, ServerSettings
from runtime.step import StepExecutor
from tests import ROOT

ADAPTER = ROOT / "model_repository" / "adapters" / "generator" / "1" / "model.py"
VOCABULARY = 384
SERVED = ServedModel(ensemble="tiny", version=1, precision="fp32", model_digest="m", spec_digest="s")


def write_tokenizer(file: Path, vocabulary: int = VOCABULARY) -> Path:
    """Byte-level BPE: every token sequence is bytes, whole characters or not."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.texts(None, 100), trainer)
    tokenizer.save(str(file))
    return file


def write_decoder(file: Path, kind: str = "llama") -> Path:
    import torch

    from tests.partition.exported import decoder

    torch.manual_seed(0)  # other weights would now and then have two tokens that rounding decides between
    return decoder(kind, file, vocab_size=VOCABULARY)


def engine_over(
    executor: StepExecutor,
    capacities: Sequence[int],
    slots: int,
    *,
    kept: int = 2,
    chunk: int = 16,
    queue: int = 1000,
    call_cost: int | None = None,
    end_ids: tuple[int, ...] = (),
    start: int | None = None,
) -> GenerationEngine:
    """`start` is the token that outputs begin with where an encoder reads the prompts."""
    cache = SlotCache(capacities, slots, kept)
    cost = executor.call_cost if call_cost is None else call_cost
    scheduler = Scheduler(
        cache,
        chunk_tokens=chunk,
        queue_size=queue,
        call_cost=cost,
        stages=executor.stages,
        encoder=start is not None,
        every=executor.every,
    )
    return GenerationEngine(executor, scheduler, Limits(executor.vocabulary, capacities[-1], 16, end_ids, start))


def real_engine(graph: Path, capacities: Sequence[int], slots: int, **options: int) -> GenerationEngine:
    kept = options.pop("kept", 2)
    executor = OnnxRuntimeStepExecutor(graph, capacities, slots + kept, threads=1)
    return engine_over(executor, capacities, slots, kept=kept, **options)


@functools.cache
def prompts(count: int, longest: int = 30, seed: int = 0) -> tuple[Tokens, ...]:
    random = np.random.default_rng(seed)
    return tuple(random.integers(3, VOCABULARY, size).astype(np.int64) for size in random.integers(1, longest, count))


def write_repository(root: Path, graph: Path, **changes: object) -> Path:
    """A model repository with one generator, `tiny`, as a build would leave it."""
    version = root / "tiny" / "1"
    version.mkdir(parents=True)
    (version / "graph.onnx").symlink_to(graph)
    (version / "model.py").write_bytes(ADAPTER.read_bytes())
    write_tokenizer(version / "tokenizer.json")
    settings = {
        "executor": "onnxruntime", "files": {"decoder": "graph.onnx"}, "threads": 1, "capacities": (64, 256, 4096),
        "slots": 8, "chunk_tokens": 32, "max_length": 4096, "end_ids": (2,), "served": SERVED,
    }  # fmt: skip
    GeneratorModelSettings.model_validate(settings | changes).save(version)
    (root / "tiny" / "config.pbtxt").write_text(to_pbtxt(generator_config("tiny", "KIND_CPU")))
    digest = write_proof(version, graph)
    server = ServerSettings(
        ensemble="tiny", models=("tiny",), version=1, response_cache_bytes=0, rate_limited=False, content_digest="c",
        proof_digest=digest,
    )  # fmt: skip
    (root / "settings.json").write_text(json.dumps(server.model_dump(mode="json")))
    return root


def write_proof(version: Path, graph: Path) -> str:
    """What a build would leave: prompts, and the graph's own log-probabilities of what follows. Its digest."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(version / "tokenizer.json"))
    prompts = corpus.texts(None, 3)
    encoded = [tokenizer.encode(prompt).ids[:48] for prompt in prompts]
    prompts = [tokenizer.decode(ids) for ids in encoded]
    lengths = np.array([len(ids) for ids in encoded])
    padded = np.stack([np.pad(np.array(ids, np.int64), (0, 48 - len(ids))) for ids in encoded])
    outputs = np.random.default_rng(0).integers(3, VOCABULARY, (len(encoded), 8))
    logprobs = -continuation_losses(graph, padded, lengths, outputs)
    rows = [
        ProofRow(prompt=prompt, output=tuple(output), logprobs=tuple(values))
        for prompt, output, values in zip(prompts, outputs.tolist(), logprobs.tolist(), strict=True)
    ]
    proof = GeneratorProof(rows=tuple(rows), at_once=len(rows), max_perplexity_ratio=1.03)
    (version / PROOF_FILE).write_text(proof.model_dump_json())
    return file_digest(version / PROOF_FILE)


def accepts(guide: Guide, tokens: Sequence[int], end: int) -> bool:
    """Whether these tokens can come, and the output can end behind them."""
    for place, token in enumerate(tokens, 1):
        logits = np.zeros(VOCABULARY, np.float32)
        guide.bar(logits)
        if not np.isfinite(logits[token]):
            return False
        if guide.complete_with(token):
            return place == len(tokens)
    logits = np.zeros(VOCABULARY, np.float32)
    guide.bar(logits)
    return bool(np.isfinite(logits[end]))
