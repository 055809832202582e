"""A compressed checkpoint is an ordinary folder: it loads in a new process, exports, shards and verifies."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from builders.artifacts import Checkpoint
from builders.checkpoint import load_checkpoint
from builders.checkpoint.widths import FILE
from builders.compress.saving import LOG, save
from builders.errors import CheckpointError, UnsupportedError
from builders.export.weights import load_encoder
from builders.spec import StepSlice
from tests.compress.tiny import Tiny, compressing
from tests.conftest import save_tiny, tiny_spec

STEP = StepSlice.model_validate({"prune": {"amount": 0.5}})


def _smaller(source: Path, out: Path, task: str = "embedding") -> tuple[Tiny, Checkpoint]:
    """Pruned unevenly and then factored, as a model and as the folder that it was saved in."""
    tiny = Tiny.of(source, task)
    tiny.carry_out({"prune": {"amount": 0.4, "importance": "magnitude"}}, tensor=2)
    tiny.carry_out({"low_rank": {"rank": 8, "tokens": 1000}}, tensor=2)
    out.mkdir()
    return tiny, save(tiny.model, tiny.checkpoint, tiny_spec(source, task).model, STEP, ["a note"], out)


@pytest.fixture
def smaller(tiny_bert: Path, tmp_path: Path) -> Path:
    return _smaller(tiny_bert, tmp_path / "smaller")[1].directory


@pytest.mark.parametrize(
    ("model_type", "task"), [("bert", "embedding"), ("roberta", "embedding"), ("xlm-roberta", "classification")]
)
def test_what_is_saved_is_what_loads(tmp_path: Path, model_type: str, task: str) -> None:
    tiny, saved = _smaller(save_tiny(tmp_path / "m", model_type, task), tmp_path / "out", task)
    again = Tiny(saved, load_encoder(saved))
    assert np.array_equal(tiny.outputs(), again.outputs())
    assert (saved.pooling, saved.head, saved.labels) == (
        tiny.checkpoint.pooling, tiny.checkpoint.head, tiny.checkpoint.labels,
    )  # fmt: skip
    assert saved.parameters < tiny.checkpoint.parameters
    assert json.loads((saved.directory / LOG).read_text())[-1]["notes"] == ["a note"]


def test_a_new_process_exports_shards_and_verifies_it(smaller: Path, tmp_path: Path) -> None:
    def trireme(*arguments: str) -> str:
        command = [sys.executable, "-m", "builders", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout

    trireme("export", str(smaller), "-o", str(tmp_path / "g.onnx"), "--pooling", "mean", "--max-length", "64")
    parts = tmp_path / "parts"
    trireme("shard", str(tmp_path / "g.onnx"), "-o", str(parts), "--tensor-parallel", "2")
    assert trireme("verify", str(parts), "--against", str(tmp_path / "g.onnx")).startswith("equal: 2 rank processes")


def test_transformers_alone_does_not_take_it(smaller: Path) -> None:
    """Its config.json cannot say these widths: other weights than were saved must not pass for them."""
    import transformers

    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        transformers.AutoModel.from_pretrained(smaller)


def test_fewer_layers_need_no_manifest(tiny_bert: Path, tmp_path: Path) -> None:
    import transformers

    tiny = Tiny.of(tiny_bert)
    tiny.carry_out({"prune": {"what": ["layers"], "keep_layers": [1]}})
    saved = save(tiny.model, tiny.checkpoint, tiny_spec(tiny_bert).model, STEP, [], tmp_path)
    assert not (tmp_path / FILE).exists()
    model, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert {key.split(".")[0] for key in info["missing_keys"]} <= {"pooler"}
    assert np.allclose(Tiny(saved, model.eval()).outputs(), tiny.outputs(), atol=1e-6)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("{", "expected valid JSON"),
        ("[]", "got the file: Input should be"),
        ('{"tiles": 3}', "Field required"),
        ({"version": 2}, "version: Input should be 1"),
        ({"hidden": 64}, "hidden 64, where config.json says 32"),
        ({"model_type": "roberta"}, "model_type roberta, where config.json says bert"),
        ({"layers": [{"heads": 4, "ffn": 64}]}, "1 layers, where config.json says 2"),
        ({"layers": [{"heads": 4, "ffn": 64}] * 2}, "0.attention.self.query.weight of shape [32, 32], where"),
        ({"layers": [{"heads": 2, "ffn": 64, "ranks": {"gate": 8}}] * 2}, "ranks of gate, which no layer has"),
        ({"layers": [{"heads": 0, "ffn": 64}] * 2}, "layers.0.heads: Input should be greater than"),
    ],
)
def test_a_damaged_or_foreign_manifest_is_refused(smaller: Path, damage: str | dict[str, object], said: str) -> None:
    file = smaller / FILE
    file.write_text(damage if isinstance(damage, str) else json.dumps({**json.loads(file.read_text()), **damage}))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tiny_spec(smaller).model)
    assert said in str(caught.value)


def test_weights_of_another_model_are_refused(smaller: Path, tiny_bert: Path) -> None:
    shutil.copyfile(tiny_bert / "model.safetensors", smaller / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"width manifest .* where the weights have"):
        load_checkpoint(tiny_spec(smaller).model)


def test_a_manifest_beside_another_family_is_refused(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "m", "mpnet")
    (source / FILE).write_text("{}")
    with pytest.raises(CheckpointError, match="got a model of type mpnet beside it"):
        load_checkpoint(tiny_spec(source).model)


def test_other_families_are_refused_by_name(tmp_path: Path) -> None:
    from builders.pipeline import build

    source = save_tiny(tmp_path / "m", "distilbert")
    spec = compressing(source, [{"prune": {"amount": 0.5}}])
    with pytest.raises(UnsupportedError, match="got model type distilbert; expected one of bert, roberta"):
        build(spec, "cpu", tmp_path / "out", "compress")


def test_a_part_of_the_folder_is_no_checkpoint(smaller: Path) -> None:
    (smaller / FILE).unlink()
    checkpoint = load_checkpoint(tiny_spec(smaller).model)
    assert any("0.weight" in name for name in load_file(smaller / "model.safetensors"))
    with pytest.raises(CheckpointError, match=r"missing|another shape"):
        load_encoder(checkpoint)
