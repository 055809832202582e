"""The digest of a checkpoint is of the files that are loaded, and of every other that changes outputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from builders.checkpoint import load_checkpoint
from builders.spec import ModelSlice


@pytest.fixture
def folder(tiny_bert: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bert, tmp_path / "model"))


def digest(folder: Path) -> str:
    return load_checkpoint(ModelSlice(source=str(folder), task="embedding", pooling="mean", max_length=64)).digest


def test_one_file_goes_before_an_index_as_transformers_loads_them(folder: Path) -> None:
    """Someone saved new weights beside the parts of the old ones."""
    shutil.copyfile(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    names = load_file(folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    before = digest(folder)
    save_file({name: array + 1 for name, array in names.items()}, folder / "model.safetensors", {"format": "pt"})
    changed = digest(folder)
    assert changed != before
    (folder / "model.safetensors").unlink()
    assert digest(folder) not in (before, changed)
    listed = load_checkpoint(ModelSlice(source=str(folder), task="embedding", pooling="mean", max_length=64)).files
    assert "model-00001-of-00001.safetensors" in {file.name for file in listed}


@pytest.mark.parametrize("name", ["tokenizer_config.json", "sentence_bert_config.json", "1_Pooling/config.json"])
def test_every_setting_counts(folder: Path, name: str) -> None:
    before = digest(folder)
    modules = [{"type": "sentence_transformers.models.Transformer", "path": ""},
               {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    first = digest(folder)
    (folder / name).write_text('{"max_seq_length": 64}')
    assert len({before, first, digest(folder)}) == 3


def test_words_about_the_model_do_not(folder: Path) -> None:
    before = digest(folder)
    (folder / "README.md").write_text("# model")
    assert digest(folder) == before
