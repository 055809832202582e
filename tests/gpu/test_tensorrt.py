"""TensorRT on the GPU: engines compute what ONNX Runtime computes, tokens and vectors alike."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from builders import pipeline
from builders.engine.tensorrt import build_decoder_engine, decoder_profiles
from builders.judging import vectors
from builders.spec import Flavour
from measure.gpu_proof.decoder_engines import KEPT, decoder_graph, engine_over
from measure.gpu_proof.encoders import engine_runner, output_of
from measure.gpu_proof.folders import encoder_spec
from measure.gpu_proof.setting import Setting
from runtime.generation.engine import generate
from runtime.generation.executor.onnxruntime import OnnxRuntimeStepExecutor
from runtime.generation.request import SamplingParams
from runtime.step import Batch, StepExecutor
from runtime.tensorrt.executor import TensorRtStepExecutor

CAPACITY, SLOTS = 64, 3


@pytest.fixture(scope="module")
def executors(tiny: Setting, flavour: Flavour) -> Iterator[tuple[StepExecutor, StepExecutor]]:
    """The same decoder by TensorRT and by ONNX Runtime."""
    graph, _ = decoder_graph(tiny.decoder, tiny)
    rows = SLOTS + KEPT
    profiles = decoder_profiles(rows, 16)
    engine = build_decoder_engine(graph, CAPACITY, flavour, tiny.target, profiles, tiny.scratch)
    plans = {f"{tiny.target}.{CAPACITY}": engine.file_path}
    tensorrt = TensorRtStepExecutor(plans, (CAPACITY,), rows, flavour=flavour, device=0)
    try:
        yield tensorrt, OnnxRuntimeStepExecutor(graph.file_path, (CAPACITY,), rows, threads=2)
    finally:
        tensorrt.close()


def test_tokens_are_those_of_onnx_runtime(executors: tuple[StepExecutor, StepExecutor], tiny: Setting) -> None:
    """Streams that come and go, prompts in chunks, rows that move: every kind of step and of copy."""
    random = np.random.default_rng(0)
    prompts = [random.integers(0, tiny.decoder.vocabulary, length) for length in (3, 20, 7, 33, 5, 12)]
    found, expected = (
        generate(engine_over(executor, CAPACITY, SLOTS, chunk=16), prompts, SamplingParams(max_tokens=16))
        for executor in executors
    )
    assert found == expected


def test_a_captured_step_gives_the_logits_of_the_plain_one(executors: tuple[StepExecutor, StepExecutor]) -> None:
    """The first run of a shape is plain, later ones are launched as a graph: the same step again, the same logits."""
    tensorrt, _ = executors
    tensorrt.reset()
    batch = Batch(0, 0, np.arange(SLOTS)[:, None], np.zeros(SLOTS, np.int64))
    first, *later = (np.array(tensorrt.run([batch])[0]) for _ in range(4))
    for again in later:
        assert (again == first).all()


def test_logits_and_largest_tokens_are_those_of_onnx_runtime(executors: tuple[StepExecutor, StepExecutor]) -> None:
    prompt = Batch(0, 1, np.arange(1, 14)[None], np.zeros(1, np.int64))
    found, expected = (executor.run([prompt])[0] for executor in executors)
    tokens = found.argmax(axis=1)
    assert np.abs(np.asarray(found) - expected).max() <= 1e-3 * np.abs(expected).max()
    assert tokens.tolist() == expected.argmax(axis=1).tolist()


def test_an_encoder_engine_gives_the_vectors_of_onnx_runtime(tiny: Setting, flavour: Flavour) -> None:
    """With padding of several lengths, at the edges of the profile and inside it."""
    spec = encoder_spec(tiny.encoders[0], tiny, flavour)
    built = pipeline.build(spec, "gpu", tiny.scratch, "engine")
    bind = engine_runner(built.engines[0])
    random = np.random.default_rng(0)
    for batch, length in ((1, 1), (max(tiny.batches), max(tiny.lengths)), (3, 17)):
        lengths = random.integers(1, length + 1, batch)
        mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
        feeds = {"input_ids": random.integers(0, tiny.encoders[0].vocabulary, (batch, length)), "attention_mask": mask}
        expected = vectors.graph_outputs(built.graph("fp32").file_path, [feeds], built.checkpoint)
        found = output_of(bind(feeds))
        cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
        assert cosines.min() > 0.999
