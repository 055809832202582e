"""Checkpoints that load, and those that must not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from builders.checkpoint import load_checkpoint
from builders.errors import CheckpointError, TriremeError, UnsupportedError
from builders.spec import ModelSlice

Edit = Callable[[Path, dict[str, object]], None]


def _model(source: Path | str, **more: object) -> ModelSlice:
    return ModelSlice.model_validate(
        {"source": str(source), "task": "embedding", "max_length": 64, "pooling": "mean", **more}
    )


def test_the_packaged_minilm_says_how_it_pools() -> None:
    found = load_checkpoint(ModelSlice(source="packaged:all-MiniLM-L6-v2", task="embedding"))
    assert (found.pooling, found.normalize, found.hidden_size) == ("mean", True, 384)
    assert found.parameters == 22_713_728
    assert found.digest == load_checkpoint(ModelSlice(source="packaged:all-MiniLM-L6-v2", task="embedding")).digest


def test_the_digest_follows_the_weights(bert_copy: Path) -> None:
    before = load_checkpoint(_model(bert_copy)).digest
    weights = bert_copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert load_checkpoint(_model(bert_copy)).digest != before


def test_truncated_weights_are_refused(bert_copy: Path) -> None:
    weights = bert_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_checkpoint(_model(bert_copy))


def test_pickles_are_refused_unless_asked_for(bert_copy: Path) -> None:
    (bert_copy / "model.safetensors").rename(bert_copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="can run code"):
        load_checkpoint(_model(bert_copy))
    assert load_checkpoint(_model(bert_copy, allow_pickle=True)).files


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_missing_file_is_named(bert_copy: Path, name: str) -> None:
    (bert_copy / name).unlink()
    with pytest.raises(CheckpointError, match="no weights" if name.startswith("model") else name):
        load_checkpoint(_model(bert_copy))


def test_a_missing_part_of_sharded_weights_is_named(bert_copy: Path) -> None:
    (bert_copy / "model.safetensors").unlink()
    (bert_copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')
    with pytest.raises(CheckpointError, match="model-00002"):
        load_checkpoint(_model(bert_copy))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            UnsupportedError,
            r"set model\.task: generation",
        ),
        ({"model_type": "t5", "is_encoder_decoder": True}, UnsupportedError, r"set model\.task: generation"),
        ({"is_decoder": True}, UnsupportedError, r"set model\.task: generation"),
        ({"model_type": "resnet", "architectures": ["ResNetModel"]}, CheckpointError, "one of bert, roberta"),
    ],
)
def test_other_architectures_are_told_apart(
    bert_copy: Path, edit_json: Edit, changes: dict[str, object], error: type[TriremeError], said: str
) -> None:
    edit_json(bert_copy / "config.json", changes)
    with pytest.raises(error, match=said):
        load_checkpoint(_model(bert_copy))


def test_a_length_over_the_position_table_is_refused(bert_copy: Path, edit_json: Edit) -> None:
    with pytest.raises(CheckpointError, match="at most 80"):
        load_checkpoint(_model(bert_copy, max_length=81))
    edit_json(bert_copy / "config.json", {"model_type": "roberta"})
    with pytest.raises(CheckpointError, match="at most 78"):  # RoBERTa's positions start after the padding id
        load_checkpoint(_model(bert_copy, max_length=79))


def test_unknown_pooling_is_asked_for(bert_copy: Path) -> None:
    with pytest.raises(CheckpointError, match=r"set model\.pooling"):
        load_checkpoint(_model(bert_copy, pooling=None))


@pytest.mark.parametrize("source", ["./no-such-folder", "/no/such/folder", "packaged:no-such-model", "a b c"])
def test_a_source_that_is_nothing(source: str) -> None:
    with pytest.raises(CheckpointError):
        load_checkpoint(_model(source))


@pytest.mark.parametrize(
    ("name", "text"),
    [("config.json", "{"), ("modules.json", "[{"), ("config.json", '{"model_type": "bert"}')],
)
def test_a_damaged_description_is_named(bert_copy: Path, name: str, text: str) -> None:
    (bert_copy / name).write_text(text)
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(_model(bert_copy))
