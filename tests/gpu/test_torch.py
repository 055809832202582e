"""The torch executor on the GPU: CUDA graphs and compiled blocks change no token."""

from __future__ import annotations

import numpy as np
import pytest

from measure.gpu_proof.decoders import KEPT, engine_over
from measure.gpu_proof.llama import TorchStepExecutor, new_llama
from measure.gpu_proof.machine import require_torch
from measure.gpu_proof.setting import NotRun, Setting
from runtime.generation.engine import generate
from runtime.generation.request import SamplingParams
from runtime.step import Batch


@pytest.fixture(autouse=True)
def torch_on_the_gpu(tiny: Setting) -> None:
    try:
        require_torch(tiny)
    except NotRun as refused:
        pytest.skip(str(refused))


def test_a_graph_gives_the_logits_of_plain_calls(tiny: Setting) -> None:
    """Over steps at moving positions: what a graph was captured with must not stay in it."""
    model = new_llama(tiny.decoder, 64, tiny.dtype, tiny.device)
    plain, graphs = (TorchStepExecutor(model, (64,), 4, graphs=captured) for captured in (False, True))
    random = np.random.default_rng(0)
    for step in range(12):
        batch = Batch(0, 0, random.integers(0, tiny.decoder.vocabulary, (4, 1)), np.full(4, step))
        expected, got = (np.asarray(executor.run([batch])[0]) for executor in (plain, graphs))
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("compiled", [False, True])
def test_captured_steps_change_no_token_of_the_serving_loop(tiny: Setting, compiled: bool) -> None:
    random = np.random.default_rng(1)
    prompts = [random.integers(0, tiny.decoder.vocabulary, length) for length in (3, 9, 17, 5, 12)]
    outputs = []
    on_gpu = new_llama(tiny.decoder, 64, tiny.dtype, tiny.device)
    for captured in (False, True):
        compiler = tiny.compiler if compiled else None
        executor = TorchStepExecutor(on_gpu, (64,), 3 + KEPT, compiler=compiler, graphs=captured)
        outputs.append(generate(engine_over(executor, 64, 3, chunk=8), prompts, SamplingParams(max_tokens=16)))
    assert outputs[0] == outputs[1]
