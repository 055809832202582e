"""Causal language models become one graph that says what the model says, whatever the rows around a row do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builders.artifacts import GenerationQuality, OnnxGraph
from builders.engine.tensorrt import compile_plan
from builders.errors import CheckpointError, InputError, ParityError, UnsupportedError
from builders.export.decoder import export_decoder, layer_windows
from builders.export.rewrites import IMPLEMENTATION, exportable
from builders.graph import describe, fix_dimension, require_standard
from builders.judging import parity
from builders.judging.perplexity import DecoderSession, model_logits
from builders.partition.cut.shard import partition_graph
from builders.partition.prove.verify import verify_partition
from builders.spec import ProfileSlice, Range
from tests import ROOT
from tests.generators import (
    DECODERS,
    PARTLY_ROTATED,
    POSITIONS,
    TEXTS,
    WINDOW,
    eager_logits,
    generator_checkpoint,
    make_generator,
    save_generator,
)

VOCABULARY = 400
KINDS = [
    pytest.param(kind, marks=() if kind in ("gpt2", "llama", "mistral") else pytest.mark.slow) for kind in DECODERS
]
Export = Callable[[str, str], OnnxGraph]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Each graph once."""
    done: dict[tuple[str, str], OnnxGraph] = {}

    def export(kind: str, precision: str = "fp32") -> OnnxGraph:
        if (kind, precision) not in done:
            folder = tmp_path_factory.mktemp(kind)
            checkpoint = generator_checkpoint(save_generator(folder / "checkpoint", kind))
            (folder / "graph").mkdir()
            done[kind, precision] = export_decoder(checkpoint, precision, TEXTS, folder / "graph")  # type: ignore[arg-type]
        return done[kind, precision]

    return export


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_agrees_with_its_model(exported: Export, kind: str) -> None:
    graph = exported(kind, "fp32")
    quality = graph.quality
    assert isinstance(quality, GenerationQuality)
    assert quality.max_relative_difference is not None
    assert quality.max_relative_difference < 1e-5
    assert quality.ratio == pytest.approx(1, abs=1e-5)
    names = {item.name: item.dims for item in (*graph.inputs, *graph.outputs)}
    heads, width = {"gpt2": (8, 8), "gemma": (1, 16)}.get(kind, (2, 8))
    assert names["input_ids"] == ("batch", "length")
    assert names["write_indices"] == names["last_index"] == ("batch",)
    assert names["key_cache_1"] == names["new_value_cache_1"] == ("batch", heads, "capacity", width)
    assert names["logits"] == ("batch", VOCABULARY)
    assert graph.operators["Attention"] == 2
    assert graph.operators["TensorScatter"] == 4


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "gpt_neox" else pytest.mark.slow) for kind in PARTLY_ROTATED]
)
def test_heads_that_are_rotated_in_part(exported: Export, kind: str) -> None:
    """The rest passes through, whether the model cuts it off before its function or inside; GLM turns pairs."""
    graph = exported(kind, "fp32")
    assert isinstance(graph.quality, GenerationQuality)
    assert graph.quality.ratio == pytest.approx(1, abs=1e-5)
    assert graph.operators.get("RotaryEmbedding", 0) == (0 if kind == "glm" else 4)
    _agrees(graph.file_path, kind, [[20, 1, 1], [3, 9]])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_at_positions_of_their_own(exported: Export, kind: str) -> None:
    """Texts come in chunks of any length beside each other; Mistral's window is passed more than once."""
    generator = np.random.default_rng(1)
    totals = [70, 33, 51, 5]
    _agrees(exported(kind, "fp32").file_path, kind, [_cut(total, generator) for total in totals])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=6), min_size=1, max_size=4))
def test_any_chunks(exported: Export, chunks: list[list[int]]) -> None:
    _agrees(exported("llama", "fp32").file_path, "llama", chunks)


def _cut(total: int, generator: np.random.Generator) -> list[int]:
    cuts = np.unique(generator.integers(1, total, 5))
    return [int(size) for size in np.diff([0, *cuts, total])]


def _agrees(file: Path, kind: str, chunks: list[list[int]]) -> None:
    """Row r takes `chunks[r]` tokens run by run; a row that has ended stays in the batch and takes padding."""
    generator = np.random.default_rng(0)
    texts = [generator.integers(4, VOCABULARY, sum(sizes)) for sizes in chunks]
    model = make_generator(kind)
    expected = [eager_logits(model, input_ids=text.tolist()) for text in texts]
    session = DecoderSession(file, len(chunks), 2 * POSITIONS)
    session_positions = np.zeros(len(chunks), np.int64)
    for turn in range(max(map(len, chunks))):
        sizes = np.array([row[turn] if turn < len(row) else 0 for row in chunks])
        ids = generator.integers(0, VOCABULARY, (len(chunks), max(1, sizes.max())))
        for row, size in enumerate(sizes):
            ids[row, :size] = texts[row][session_positions[row] : session_positions[row] + size]
        session.positions = session_positions.copy()
        logits = session.step(ids, np.maximum(sizes, 1))[0]
        session_positions += sizes
        for row in np.flatnonzero(sizes):
            wanted = expected[row][session_positions[row] - 1]
            assert np.abs(logits[row] - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_fp16_caches_and_fp32_logits(exported: Export) -> None:
    graph = exported("llama", "fp16")
    types = {item.name: item.dtype for item in (*graph.inputs, *graph.outputs)}
    assert types["key_cache_0"] == types["new_value_cache_1"] == "float16"
    assert types["logits"] == "float32"
    assert isinstance(graph.quality, GenerationQuality)
    assert graph.quality.ratio == pytest.approx(1, abs=0.01)


def test_norms_and_rotations_are_single_operators(exported: Export) -> None:
    llama, gpt2 = exported("llama", "fp32").operators, exported("gpt2", "fp32").operators
    assert (llama["RMSNormalization"], llama["RotaryEmbedding"]) == (5, 4)
    assert not {"Pow", "Sqrt", "Cos", "Sin", "Neg", "Slice"} & set(llama)
    assert (gpt2["LayerNormalization"], gpt2["Gelu"], "Gemm" in gpt2) == (5, 2, False)


@pytest.mark.slow
def test_the_same_weights_give_the_same_file(exported: Export, tmp_path: Path) -> None:
    checkpoint = generator_checkpoint(save_generator(tmp_path / "checkpoint", "llama"))
    (tmp_path / "graph").mkdir()
    again = export_decoder(checkpoint, "fp32", TEXTS, tmp_path / "graph")
    assert again.digest == exported("llama", "fp32").digest
    assert str(ROOT).encode() not in again.file_path.read_bytes()


@pytest.mark.parametrize("kind", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_shared_out_to_two_ranks_in_two_stages(exported: Export, kind: str, tmp_path: Path) -> None:
    file = exported(kind, "fp32").file_path
    partition = partition_graph(file, 2, 2, tmp_path / "parts")
    assert ("new_key_cache_1", "key_cache_1") in partition.states
    assert partition.kept_whole == {}
    assert verify_partition(tmp_path / "parts", file, seed=1).max_relative < 1e-5


def test_tensorrt_builds_it_with_a_fixed_capacity(exported: Export, tmp_path: Path) -> None:
    graph = exported("llama", "fp16")
    fixed = fix_dimension(graph.file_path, "capacity", 64, tmp_path)
    require_standard(fixed)
    inputs = describe(fixed)[0]
    assert next(item.dims for item in inputs if item.name == "key_cache_0") == ("batch", 2, 64, 8)
    decode, prefill = (
        ProfileSlice(batch=Range(min=1, opt=4, max=8), length=Range(min=1, opt=1, max=1)),
        ProfileSlice(batch=Range(min=1, opt=1, max=2), length=Range(min=1, opt=32, max=64)),
    )
    assert len(compile_plan(fixed, "tensorrt-rtx", "sm89", (decode, prefill), inputs).plan) > 10_000


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", DECODERS)
def test_what_an_export_replaces_comes_back(kind: str, fails: bool) -> None:
    import sys

    from transformers import AttentionInterface

    model = make_generator(kind)
    source = sys.modules[type(model).__module__]
    before = [dict(vars(module)) for module in model.modules()], dict(vars(source)), model.config._attn_implementation
    text = list(range(4, 30))
    said = eager_logits(model, input_ids=text)
    try:
        with exportable(model, POSITIONS, lambda *_, **__: None):  # type: ignore[arg-type, return-value]
            assert IMPLEMENTATION in AttentionInterface._global_mapping
            assert [dict(vars(module)) for module in model.modules()] != before[0]
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert IMPLEMENTATION not in AttentionInterface._global_mapping
    after = [dict(vars(module)) for module in model.modules()], dict(vars(source)), model.config._attn_implementation
    assert after == before
    assert np.array_equal(eager_logits(model, input_ids=text), said)


def test_windows_of_layers() -> None:
    config = make_generator("mistral").config
    assert layer_windows(config, POSITIONS) == (WINDOW, WINDOW)
    assert layer_windows(config, WINDOW) == (None, None)  # never reached, so no mask for it
    config.layer_types = ["full_attention", "sliding_attention"]
    assert layer_windows(config, POSITIONS) == (None, WINDOW)
    config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(UnsupportedError, match="linear_attention"):
        layer_windows(config, POSITIONS)


def test_a_forgotten_window_is_found(exported: Export) -> None:
    """The parity check goes past the window: the model without it says something else there."""
    rows = np.random.default_rng(0).integers(4, VOCABULARY, (4, 48))
    file = exported("mistral", "fp32").file_path
    assert parity.require_parity(file, rows, model_logits(make_generator("mistral"), rows), "fp32", "mistral") < 1e-5
    wrong = model_logits(make_generator("mistral", sliding_window=None), rows)
    with pytest.raises(ParityError, match="logits differ from eager fp32"):
        parity.require_parity(file, rows, wrong, "fp32", "mistral")
    with pytest.raises(ParityError, match="worst cosine"):
        parity.require_parity(file, rows, wrong, "fp16", "mistral")


def test_the_parity_plan_covers_prefill_chunks_and_decode() -> None:
    for rows, length in ((1, 8), (4, 48), (4, 12), (3, 300)):
        steps = parity.plan_steps(rows, length)
        totals = np.sum(steps, axis=0)
        assert all((step >= 1).all() for step in steps)
        assert totals[0] == length == totals.max()
        assert len(set(totals)) == rows or length < 16


def test_an_encoder_generates_nothing(tiny_bert: Path) -> None:
    with pytest.raises(CheckpointError, match=r"an encoder \(bert.*set model\.task: embedding"):
        generator_checkpoint(tiny_bert)


def test_the_task_must_fit_the_checkpoint(tmp_path: Path) -> None:
    folder = save_generator(tmp_path / "llama", "llama")
    with pytest.raises(CheckpointError, match=r"set model\.task: generation"):
        generator_checkpoint(folder, "seq2seq")
    with pytest.raises(UnsupportedError, match=r"set model\.task: generation"):
        generator_checkpoint(folder, "embedding")
    with pytest.raises(CheckpointError, match=f"at most {POSITIONS}"):
        generator_checkpoint(folder, max_length=POSITIONS + 1)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        generator_checkpoint(folder)


def test_facts_that_generation_needs(tmp_path: Path) -> None:
    found = generator_checkpoint(save_generator(tmp_path / "gemma", "gemma")).generation
    assert found is not None
    assert (found.bos_id, found.eos_ids, found.pad_id, found.start_id) == (2, (3,), 1, None)
    assert (found.layers, found.heads, found.kv_heads, found.head_dim) == (2, 8, 1, 16)
    assert (found.max_positions, found.vocabulary) == (POSITIONS, VOCABULARY)
    gpt2 = generator_checkpoint(save_generator(tmp_path / "gpt2", "gpt2")).generation
    assert gpt2 is not None
    assert (gpt2.layers, gpt2.heads, gpt2.kv_heads, gpt2.head_dim, gpt2.max_positions) == (2, 8, 8, 8, POSITIONS)


def test_several_ends_of_text(tmp_path: Path, edit_json: Any) -> None:
    folder = save_generator(tmp_path, "llama")
    edit_json(folder / "generation_config.json", {"eos_token_id": [3, 7]})
    found = generator_checkpoint(folder).generation
    assert found is not None
    assert found.eos_ids == (3, 7)


def _refused(folder: Path, out: Path, error: type[InputError], match: str) -> None:
    checkpoint = generator_checkpoint(folder)
    out.mkdir()
    with pytest.raises(error, match=match):
        export_decoder(checkpoint, "fp32", TEXTS, out)
    assert not list(out.iterdir())


def test_input_that_cannot_be_exported(tmp_path: Path, edit_json: Any) -> None:
    folder = save_generator(tmp_path / "llama", "llama")
    config = folder / "config.json"
    original = config.read_text()
    edit_json(config, {"intermediate_size": 64})
    _refused(folder, tmp_path / "a", CheckpointError, "0 missing, .* of another shape")
    config.write_text(original)
    edit_json(config, {"num_hidden_layers": 3})
    _refused(folder, tmp_path / "b", CheckpointError, "missing, 0 of another shape")
    config.write_text(original)
    edit_json(config, {"model_type": "no-such-model"})
    _refused(folder, tmp_path / "c", CheckpointError, "use a model type of this release")
    config.write_text(original)


def test_angles_that_change_with_the_length_are_refused() -> None:
    growing = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = make_generator("llama", rope_parameters=growing)
    with (
        pytest.raises(UnsupportedError, match="angles that change with the length"),
        exportable(model, 2 * POSITIONS, lambda *_, **__: None),  # type: ignore[arg-type, return-value]
    ):
        pass
    assert model.config._attn_implementation != IMPLEMENTATION


def test_an_attention_of_its_own_is_refused(tmp_path: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 2, "eos_token_id": 3}
    config = transformers.GPTNeoConfig(max_position_embeddings=POSITIONS, **ids, **sizes)
    folder = save_generator(tmp_path / "neo", "llama")
    (folder / "model.safetensors").unlink()
    transformers.GPTNeoForCausalLM(config).save_pretrained(folder)
    _refused(folder, tmp_path / "out", UnsupportedError, "code of its own")


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    checkpoint = generator_checkpoint(save_generator(tmp_path, "llama"))
    with pytest.raises(InputError, match="held-out texts: got"):
        export_decoder(checkpoint, "fp32", ["short"], tmp_path)
