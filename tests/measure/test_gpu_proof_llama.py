"""The Llama in plain torch: transformers' own numbers, and the serving loop's tokens through rows and chunks."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders.export import decoder
from measure.bench.decoder_graph import DecoderShape
from measure.gpu_proof import decoder_engines, setting
from measure.gpu_proof.decoders import KEPT, engine_over
from measure.gpu_proof.llama import TorchStepExecutor, new_llama
from runtime.generation.engine import generate
from runtime.generation.request import SamplingParams
from runtime.step import Batch, Copy, Row

POSITIONS = 64


@pytest.fixture(scope="module")
def network() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:  # the usual 0.02 would make every token as likely as the next
                parameter.mul_(5)
    return model


@pytest.fixture(scope="module")
def llama(network: Any) -> Any:
    return copy.deepcopy(network)  # an executor takes its model over


@pytest.mark.parametrize(("row", "compiler"), [(0, None), (0, "eager"), (2, None)])
def test_logits_are_those_of_transformers(network: Any, llama: Any, row: int, compiler: str | None) -> None:
    """A prompt, a second chunk of it, then token by token; steps are made once for the rows from the first on."""
    import torch

    ids = np.random.default_rng(0).integers(0, 320, (1, 20))
    with torch.no_grad():
        expected = network(torch.from_numpy(ids)).logits[0].numpy()
    executor = TorchStepExecutor(llama, (32, POSITIONS), 3, compiler=compiler)
    for start, end in ((0, 9), (9, 14), *((at, at + 1) for at in range(14, 20))):
        logits = executor.run([Batch(1, row, ids[:, start:end], np.array([start]))])[0]
        assert np.abs(np.asarray(logits)[0] - expected[end - 1]).max() < 1e-4
        assert logits.argmax(axis=1)[0] == expected[end - 1].argmax()


def test_rows_share_a_step_and_copies_carry_their_keys(llama: Any) -> None:
    """Three rows in one step, padded to four, give what each gives alone, also one that came from another pool.

    The padding row holds a sequence of its own, which is none the worse for it.
    """
    ids = np.random.default_rng(1).integers(0, 320, (4, 8))

    def logits_after(executor: TorchStepExecutor, rows: list[int]) -> list[Any]:
        for row, which in enumerate(rows):
            executor.run([Batch(0, row, ids[which : which + 1], np.zeros(1, np.int64))])
        if len(rows) > 1:
            executor.copy([Copy(Row(0, 2), Row(1, 0), 8), Copy(None, Row(0, 2), 0), Copy(Row(1, 0), Row(0, 2), 8)])
        found = []
        for first, last in ((0, min(3, len(rows))), (3, len(rows))):
            if first < last:
                batch = Batch(0, first, np.full((last - first, 1), 7), np.full(last - first, 8))
                found += list(np.asarray(executor.run([batch])[0]))
        return found

    together = logits_after(TorchStepExecutor(llama, (16, 32), 4), [0, 1, 2, 3])
    for which in range(4):
        alone = logits_after(TorchStepExecutor(llama, (16,), 1), [which])
        assert np.abs(together[which] - alone[0]).max() < 1e-4


def test_the_serving_loop_gives_the_tokens_of_greedy_generation(network: Any, llama: Any) -> None:
    import torch

    random = np.random.default_rng(2)
    prompts = [random.integers(0, 320, length) for length in (3, 11, 7, 20, 5)]
    engine = engine_over(TorchStepExecutor(llama, (POSITIONS,), 2 + KEPT), POSITIONS, 2, chunk=8)
    got = generate(engine, prompts, SamplingParams(max_tokens=12))
    for prompt, tokens in zip(prompts, got, strict=True):
        expected = network.generate(
            torch.from_numpy(prompt)[None], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :]
        assert tokens == expected.tolist()


def test_a_graph_that_was_left_half_way_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A section may be ended while it exports, and the other flavour's asks for the same graph."""
    small = setting.dry(tmp_path)
    shape = replace(small.decoder, layers=1)
    write = decoder.write_graph

    def end_after(*arguments: Any) -> None:
        write(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "write_graph", end_after)
        with pytest.raises(KeyboardInterrupt):
            decoder_engines.decoder_graph(shape, small)
    assert not list(tmp_path.iterdir())
    first, _ = decoder_engines.decoder_graph(shape, small)
    again, _ = decoder_engines.decoder_graph(shape, small)
    assert first.file_path.is_file()
    assert first == again


def test_a_shape_is_compiled_once_for_all_layers(llama: Any) -> None:
    """On a GPU a compilation takes seconds, and there are 32 layers."""
    from torch._dynamo.utils import counters

    executor = TorchStepExecutor(llama, (24,), 2, compiler="eager")  # a capacity that no other test compiles for
    before = counters["stats"]["unique_graphs"]
    for position in range(3):
        executor.run([Batch(0, 0, np.array([[5], [6]]), np.full(2, position))])
    assert counters["stats"]["unique_graphs"] == before + 1


def test_random_weights_are_the_same_twice_and_a_reset_forgets() -> None:
    shape = DecoderShape(layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, vocabulary=100)
    batch = Batch(0, 0, np.array([[5, 6, 7]]), np.zeros(1, np.int64))
    first, second = (
        np.asarray(TorchStepExecutor(new_llama(shape, 16, "float32", "cpu"), (16,), 1).run([batch])[0])
        for _ in range(2)
    )
    assert (first == second).all()
    executor = TorchStepExecutor(new_llama(shape, 16, "float32", "cpu"), (16,), 1)
    step = Batch(0, 0, np.array([[9]]), np.array([3]))
    executor.run([batch])
    before = np.array(executor.run([step])[0])
    executor.reset()
    assert np.abs(np.array(executor.run([step])[0]) - before).max() > 1e-6
    executor.run([batch])
    assert np.abs(np.array(executor.run([step])[0]) - before).max() < 1e-6
