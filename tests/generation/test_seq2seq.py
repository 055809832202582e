"""Encoder-decoders: each row attends to its own source, whatever runs beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from builders.export.seq2seq import write_graphs
from runtime.errors import BadRequest
from runtime.generation.cache import SlotCache
from runtime.generation.engine import GenerationEngine, generate
from runtime.generation.executor.onnxruntime import OnnxRuntimeStepExecutor
from runtime.generation.request import Limits, SamplingParams
from runtime.generation.scheduler import Scheduler
from tests.generators import eager_logits, generator_checkpoint, make_generator, save_generator

START, NEW_TOKENS = 1, 12


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    checkpoint = generator_checkpoint(save_generator(folder / "checkpoint", "t5"), "seq2seq")
    write_graphs(make_generator("t5"), checkpoint, folder)
    return folder


def _engine(graphs: Path, capacities: tuple[int, ...], slots: int) -> GenerationEngine:
    executor = OnnxRuntimeStepExecutor(
        graphs / "decoder.onnx", capacities, slots + 2, encoder=graphs / "encoder.onnx", threads=1
    )
    scheduler = Scheduler(SlotCache(capacities, slots, 2), chunk_tokens=16, queue_size=100, call_cost=4, encoder=True)
    return GenerationEngine(
        executor, scheduler, Limits(executor.vocabulary, capacities[-1], 16, decoder_start_id=START)
    )


def test_tokens_are_those_of_the_model(graphs: Path) -> None:
    random = np.random.default_rng(2)
    sources = [random.integers(4, 300, size).astype(np.int64) for size in (3, 30, 9, 17, 3, 21, 8)]
    params = SamplingParams(max_tokens=NEW_TOKENS)
    engine = _engine(graphs, (8, 16, 32), 3)
    got = generate(engine, sources, params)
    engine.scheduler.cache.check_integrity()
    model = make_generator("t5")
    for source, tokens in zip(sources, got, strict=True):
        text = [START, *tokens]
        logits = np.asarray(eager_logits(model, input_ids=source.tolist(), decoder_input_ids=text[:-1]))
        assert logits.reshape(NEW_TOKENS, -1).argmax(axis=1).tolist() == tokens
    assert generate(_engine(graphs, (32,), 1), sources, params) == got


def test_more_rows_than_a_chunk_has_tokens(graphs: Path) -> None:
    """Rows that wait for their first token are moved, and their sources with them."""
    random = np.random.default_rng(5)
    sources = [random.integers(4, 300, size).astype(np.int64) for size in random.integers(1, 30, 60)]
    params = SamplingParams(max_tokens=NEW_TOKENS)
    alone = generate(_engine(graphs, (32,), 1), sources, params)
    assert generate(_engine(graphs, (16, 32), 24), sources, params) == alone


def test_source_and_output_are_limited_each(graphs: Path) -> None:
    engine = _engine(graphs, (16, 32), 2)
    assert len(generate(engine, [np.arange(4, 36)], SamplingParams(max_tokens=32))[0]) == 32
    with pytest.raises(BadRequest, match="the prompt has 34 tokens; this model takes at most 32"):
        engine.submit(np.full(34, 5), SamplingParams(max_tokens=1))
