"""T5 becomes an encoder and a decoder graph that say together what the model says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from builders.artifacts import GenerationQuality, OnnxGraph
from builders.errors import CheckpointError, UnsupportedError
from builders.export.seq2seq import DECODER_FILE, export_seq2seq, write_graphs
from builders.graph import describe
from builders.judging.perplexity import ENCODER_FILE, DecoderSession, encode
from builders.quantize.weight_only import quantize_weights
from tests.generators import TEXTS, eager_logits, generator_checkpoint, make_generator, save_generator

VOCABULARY, START = 400, 1


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> OnnxGraph:
    folder = tmp_path_factory.mktemp("t5")
    checkpoint = generator_checkpoint(save_generator(folder / "checkpoint", "t5"), "seq2seq")
    (folder / "graph").mkdir()
    return export_seq2seq(checkpoint, "fp32", TEXTS, folder / "graph")


def test_both_graphs_and_their_record(exported: OnnxGraph) -> None:
    assert isinstance(exported.quality, GenerationQuality)
    assert exported.quality.max_relative_difference is not None
    assert exported.quality.max_relative_difference < 1e-4
    assert (exported.file, [item.name for item in exported.files]) == (DECODER_FILE, [DECODER_FILE, ENCODER_FILE])
    decoder = {item.name: item.dims for item in (*exported.inputs, *exported.outputs)}
    assert decoder["source_length"] == ("batch",)
    assert decoder["cross_key_1"] == ("batch", 4, "source", 8)
    assert decoder["key_cache_1"] == decoder["new_value_cache_0"] == ("batch", 4, "capacity", 8)
    inputs, outputs, _ = describe(exported.path(ENCODER_FILE))
    assert {item.name: item.dims for item in inputs} == {"input_ids": ("batch", "source"), "source_length": ("batch",)}
    assert [item.name for item in outputs] == [
        f"cross_{part}_{layer}" for layer in range(2) for part in ("key", "value")
    ]


def test_rows_at_positions_and_with_sources_of_their_own(exported: OnnxGraph) -> None:
    """Past the largest distance that the relative positions tell apart (24), in uneven chunks, then token by token."""
    generator = np.random.default_rng(3)
    lengths, totals = np.array([9, 3, 30]), np.array([60, 41, 33])
    texts = [[START, *generator.integers(4, VOCABULARY, total - 1)] for total in totals]
    source = generator.integers(4, VOCABULARY, (3, 30))  # what stands behind a source's end is noise
    model = make_generator("t5")
    expected = [
        eager_logits(model, input_ids=source[row, : lengths[row]].tolist(), decoder_input_ids=list(map(int, text)))
        for row, text in enumerate(texts)
    ]
    session = DecoderSession(exported.file_path, 3, 128, encode(exported.path(ENCODER_FILE), source, lengths))
    for counts in ([20, 5, 1], [10, 11, 7], *[[1, 1, 1]] * 25):
        ids = np.zeros((3, max(counts)), np.int64)
        for row, (text, start, count) in enumerate(zip(texts, session.positions, counts, strict=True)):
            ids[row, :count] = text[start : start + count]
        logits = session.step(ids, np.array(counts))[0]
        for row, at in enumerate(session.positions - 1):
            assert np.abs(logits[row] - expected[row][at]).max() < 1e-4 * np.abs(expected[row][at]).max()


@pytest.mark.parametrize("precision", ["w8", "w4"])
def test_both_graphs_are_quantised(exported: OnnxGraph, precision: str, tmp_path: Path) -> None:
    checkpoint = generator_checkpoint(exported.directory.parent / "checkpoint", "seq2seq")
    found = quantize_weights(exported, exported, checkpoint, precision, 1.2, TEXTS[:40], TEXTS[40:], tmp_path)  # type: ignore[arg-type]
    assert [item.name for item in found.files] == [DECODER_FILE, ENCODER_FILE]
    assert found.operators["DequantizeLinear"] == found.operators["MatMul"]
    assert describe(found.path(ENCODER_FILE))[2]["DequantizeLinear"] > 0
    assert (found.precision, found.inputs, found.outputs) == (precision, exported.inputs, exported.outputs)


@pytest.mark.slow
def test_what_an_export_replaces_comes_back(tmp_path: Path) -> None:
    """The biases of relative positions are replaced while the decoder is traced, by a model that is used again."""
    checkpoint = generator_checkpoint(save_generator(tmp_path / "checkpoint", "t5"), "seq2seq")
    model = make_generator("t5")
    before = [dict(vars(module)) for module in model.modules()]
    said = eager_logits(model, input_ids=[5, 6, 7], decoder_input_ids=[1, 8, 9])
    write_graphs(model, checkpoint, tmp_path)
    assert [dict(vars(module)) for module in model.modules()] == before
    assert np.array_equal(eager_logits(model, input_ids=[5, 6, 7], decoder_input_ids=[1, 8, 9]), said)


def test_what_is_not_like_t5_is_refused(tmp_path: Path) -> None:
    import transformers

    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": VOCABULARY}
    folder = save_generator(tmp_path / "bart", "t5")
    transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **heads)).save_pretrained(folder)
    with pytest.raises(UnsupportedError, match="type bart; expected one of t5, mt5, umt5"):
        generator_checkpoint(folder, "seq2seq")
    with pytest.raises(CheckpointError, match=r"set model\.task: seq2seq"):
        generator_checkpoint(save_generator(tmp_path / "t5", "t5"), "generation")
