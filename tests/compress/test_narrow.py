"""Students of another hidden width: what they start from, what of them is kept, and that the result is as any other."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from builders.artifacts import Checkpoint
from builders.checkpoint import load_checkpoint
from builders.checkpoint.widths import FILE, Widths, widths_of_model
from builders.compress import narrow
from builders.compress.distil import Teaching, distil
from builders.compress.distil_plan import Teacher
from builders.compress.plan import check
from builders.compress.texts import CalibrationText
from builders.errors import SpecError
from builders.export.weights import load_encoder
from builders.judging import corpus
from builders.pipeline.compress import carried_out
from builders.pipeline.result import Build
from builders.spec import PrecisionSlice, StepSlice, Task
from builders.store.store import Store
from builders.training.recipe import TrainingProgress
from runtime.session import open_session
from tests.compress.killed import assert_same_weights, resumed_and_whole
from tests.compress.test_spec import WIDTHS
from tests.compress.tiny import Tiny, compressing
from tests.conftest import save_tiny

STEP: dict[str, Any] = {
    "tokens": 6_000, "text_tokens": 4_000, "batch_tokens": 512, "learning_rate": 0.003, "student_width": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("\n".join(text[:120] for text in corpus.texts(None, 600)))
    return file


def _built(source: Path, steps: list[dict[str, Any]], texts: Path, root: Path) -> Checkpoint:
    precision = {"calibration_texts": str(texts), "calibration_samples": 16}
    spec = compressing(source, steps, precision=precision)
    built = Build(spec, "cpu", load_checkpoint(spec.model))
    return carried_out(built, Store(root / "store"), lambda stage, message: None).checkpoint


def _notes(checkpoint: Checkpoint) -> str:
    return "; ".join(json.loads(checkpoint.path("compression.json").read_text())[-1]["notes"])


def _narrowed(tiny: Tiny, width: int, pairs: list[tuple[int, int]]) -> narrow.Narrow:
    teacher = copy.deepcopy(tiny.model)
    return narrow.narrowed(
        tiny.model, width, tiny.forward_of, (teacher, tiny.forward_of(teacher)), tiny.batches(64), pairs
    )


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_at_full_width_it_computes_what_the_teacher_does(tmp_path: Path, model_type: str) -> None:
    tiny = Tiny.of(save_tiny(tmp_path, model_type))
    whole, batches = copy.deepcopy(tiny.model), tiny.batches()
    narrow.pick(tiny.model, 32, tiny.forward_of(tiny.model), batches)
    with torch.no_grad():
        for batch in batches:
            assert torch.equal(tiny.forward_of(tiny.model)(**batch), tiny.forward_of(whole)(**batch))
    tiny = Tiny(tiny.checkpoint, whole)
    before = tiny.outputs()
    made = _narrowed(tiny, 32, [])
    with torch.no_grad():
        after = torch.cat([made.forward(**batch) for batch in tiny.batches()]).numpy()
    assert np.allclose(after, before, atol=1e-3)  # `back` is fitted, with a ridge


def test_dimensions_that_tell_the_others_stay() -> None:
    """Of copies of a few, one each: a larger variance of what is told already is worth nothing."""
    torch.manual_seed(0)
    three = torch.randn(500, 3) * torch.tensor([3.0, 2.0, 1.0])
    states = torch.cat([three, three[:, :2] * 0.9], 1)[:, [3, 0, 4, 1, 2]]
    assert narrow._told_best(states.T @ states, 3).tolist() == [1, 3, 4]


def test_what_reads_takes_up_what_the_picked_dimensions_tell(tiny_bert: Path) -> None:
    """Nearer to the original than the same dimensions cut out, without training."""
    tiny = Tiny.of(tiny_bert)
    whole = tiny.outputs()

    def cosine(take_up: bool) -> float:
        found = Tiny(tiny.checkpoint, copy.deepcopy(tiny.model))
        with pytest.MonkeyPatch.context() as patch:
            if not take_up:
                patch.setattr(narrow, "_take_up", lambda *_: None)
            made = _narrowed(found, 24, [])
        with torch.no_grad():
            vectors = torch.cat([made.forward(**batch) for batch in tiny.batches()]).numpy()
        return float((vectors * whole).sum(1).mean())

    assert cosine(True) > cosine(False) > 0


def test_projections_learn_and_are_no_part_of_the_result(
    tiny_bert: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, seen, start = narrow.narrowed, list[narrow.Narrow](), list[Any]()

    def narrowed(*given: Any) -> narrow.Narrow:
        seen.append(whole(*given))
        start.extend(copy.deepcopy(one) for one in (seen[0].back, *seen[0].hidden))
        return seen[0]

    monkeypatch.setattr(narrow, "narrowed", narrowed)
    losses = {"hidden": 1.0, "token_mse": 1.0, "embedding_cosine": 1.0}
    student = _built(tiny_bert, [{"distil": {**STEP, "losses": losses}}], texts, tmp_path)
    assert [tuple(one.weight.shape) for one in start] == [(32, 16)] * 3
    for before, after in zip(start, (seen[0].back, *seen[0].hidden), strict=True):
        assert not torch.equal(before.weight, after.weight)
        assert not torch.equal(before.bias, after.bias)
    assert "width 32 -> 16" in _notes(student)
    weights = load_file(student.path("model.safetensors"))
    assert not [name for name in weights if name.split(".")[0] not in ("embeddings", "encoder")]
    assert weights["embeddings.word_embeddings.weight"].shape[1] == 16
    kept = load_file(student.directory / "32_Dense" / "model.safetensors")
    assert torch.equal(kept["linear.weight"], seen[0].back.weight)
    assert [path.name for path in student.directory.iterdir() if path.is_dir()].count("32_Dense") == 1


_COMMANDS = """
import json, sys
from builders.__main__ import app
for arguments in json.loads(sys.argv[1]):
    app(arguments, standalone_mode=False)
"""


def _asked(**more: Any) -> dict[str, Any]:
    return {"distil": {**STEP, **more}}


def test_a_narrow_student_comes_nearer_and_is_an_ordinary_folder(tiny_bert: Path, texts: Path, tmp_path: Path) -> None:
    """Of one layer too. Its vectors are as wide as before; a new process exports, shards and verifies it."""
    student = _built(tiny_bert, [_asked(student_layers=[1], tokens=12_000)], texts, tmp_path)
    before, after = _notes(student).partition("cosine mean ")[2].partition(", worst")[0].split(" -> ")
    assert float(after) > float(before)
    assert (student.hidden_size, student.width, student.normalize) == (16, 32, True)
    assert [layer.kind for layer in student.head] == ["dense", "normalize"]
    said = json.loads(student.path("config.json").read_text())
    assert (said["hidden_size"], said["num_attention_heads"], said["num_hidden_layers"]) == (16, 2, 1)
    assert Widths.model_validate_json(student.path(FILE).read_text()).layers[0].heads == 4
    assert widths_of_model(load_encoder(student)).hidden == 16

    graph, parts = tmp_path / "g.onnx", tmp_path / "parts"
    arguments = [
        ["export", str(student.directory), "-o", str(graph), "--max-length", "64"],
        ["shard", str(graph), "-o", str(parts), "--tensor-parallel", "2"],
        ["verify", str(parts), "--against", str(graph)],
    ]
    command = [sys.executable, "-c", _COMMANDS, json.dumps(arguments)]
    said_last = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    assert "equal: 2 rank processes" in said_last
    session = open_session(graph)
    tiny = Tiny(student, load_encoder(student))
    batch = {name: value.numpy() for name, value in tiny.batches(8)[0].items()}
    inputs = {one.name for one in session.get_inputs()}
    found = session.run(None, {name: value for name, value in batch.items() if name in inputs})[0]
    assert found.shape[1] == 32
    assert np.allclose(found, tiny.outputs(tiny.batches(8)[:1]), atol=1e-4)


def test_with_as_many_heads_as_it_is_wide_transformers_loads_it(tiny_bert: Path, texts: Path, tmp_path: Path) -> None:
    """16 wide, two heads of 8: config.json says it all."""
    import transformers

    steps = [{"prune": {"what": ["heads"], "heads": 2, "importance": "magnitude"}}, _asked()]
    student = _built(tiny_bert, steps, texts, tmp_path)
    assert not (student.directory / FILE).exists()
    model, info = transformers.AutoModel.from_pretrained(student.directory, output_loading_info=True)
    assert {key.split(".")[0] for key in info["missing_keys"]} <= {"pooler"}
    assert np.allclose(Tiny(student, model.eval()).outputs(), Tiny(student, load_encoder(student)).outputs(), atol=1e-6)


@pytest.mark.slow
def test_int8_of_a_narrow_student_with_ranks(tiny_bert: Path, texts: Path, tmp_path: Path) -> None:
    from builders import pipeline

    steps = [_asked(), {"low_rank": {"rank": 8, "tokens": 1000}}]
    precision = {
        "calibration_texts": str(texts), "calibration_samples": 16, "cpu": "int8", "min_mean_cosine": 0.5,
        "min_worst_cosine": 0,
    }  # fmt: skip
    spec = compressing(tiny_bert, steps, precision=precision)
    built = pipeline.build(spec, "cpu", tmp_path, "qualify", lambda stage, message: None)
    assert built.checkpoint.width == 32
    assert "DequantizeLinear" in built.graph("int8").operators


def test_modules_that_stand_behind_the_pooling_stay(tiny_bert: Path, texts: Path, tmp_path: Path) -> None:
    """A folder of sentence-transformers with a Dense of its own: the new one comes between."""
    import shutil

    from safetensors.torch import save_file

    source = tmp_path / "source"
    shutil.copytree(tiny_bert, source)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    (source / "modules.json").write_text(json.dumps(listed))
    for name, said in (
        ("1_Pooling", {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}),
        ("2_Dense", {"in_features": 32, "out_features": 8, "bias": False}),
    ):
        (source / name).mkdir()
        (source / name / "config.json").write_text(json.dumps(said))
    torch.manual_seed(0)
    save_file({"linear.weight": torch.randn(8, 32)}, source / "2_Dense" / "model.safetensors")
    student = _built(source, [_asked()], texts, tmp_path)
    assert [(layer.kind, layer.width) for layer in student.head] == [("dense", 32), ("dense", 8), ("normalize", 8)]
    pooling = json.loads(student.path("1_Pooling/config.json").read_text())
    assert pooling == {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}


def _distilled(folder: Path, source: Path, texts: Path, **more: Any) -> tuple[Any, bytes]:
    tiny = Tiny.of(source)
    teacher = copy.deepcopy(tiny.model)
    asked = StepSlice.model_validate(_asked(ema=0.9, losses={"hidden": 1, "embedding_cosine": 1})).distil
    assert asked is not None
    budget = PrecisionSlice(calibration_texts=texts, calibration_samples=16)
    states, scratch = folder / "states", folder / "scratch"
    teaching = Teaching(teacher, tiny.forward_of(teacher), states, scratch, "key", **more)
    distil(asked, tiny.model, tiny.forward_of, tiny.checkpoint, CalibrationText(tiny.checkpoint, budget), teaching)
    return tiny.model, (scratch / narrow.BACK).read_bytes()


def _kill(progress: TrainingProgress) -> None:
    if progress.share > 0.6:
        signal.raise_signal(signal.SIGKILL)


def test_after_a_kill_it_comes_to_the_same_weights(tiny_bert: Path, texts: Path, tmp_path: Path) -> None:
    (resumed, back), (whole, wanted) = resumed_and_whole(_distilled, _kill, (tiny_bert, texts), tmp_path, 0.5)
    assert back == wanted
    # The pooler is random, and saved nowhere.
    assert_same_weights(resumed, whole, lambda name: not name.startswith("pooler."))


@pytest.mark.parametrize(
    ("width", "said"),
    [
        (384, "student_width: got 384; expected a multiple of 32, the width of a head, under 384"),
        (512, "use 352"),
        (250, "student_width: got 250; expected a multiple of 32"),
        (8, "use 32"),
    ],
)
def test_widths_that_no_student_can_have(width: int, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        check([StepSlice.model_validate({"distil": {"minutes": 1, "student_width": width}})], WIDTHS, 1)
    assert said in str(caught.value)


def test_models_and_steps_that_take_no_width() -> None:
    def steps(*asked: dict[str, Any]) -> list[StepSlice]:
        return [StepSlice.model_validate({"distil": {"minutes": 1, **one}}) for one in asked]

    once = {"student_width": 256}
    assert check(steps(once, {"losses": {"embedding_cosine": 1}}), WIDTHS, 1).hidden == 256
    with pytest.raises(
        SpecError, match=r"compress.1.distil.student_width: got a model that a step before has made 256"
    ):
        check(steps(once, {"student_width": 128}), WIDTHS, 1)
    with pytest.raises(SpecError, match=r"compress.1.distil.losses.token_mse: got states 256 wide"):
        check(steps(once, {}), WIDTHS, 1)
    tasks: tuple[Task, ...] = ("classification", "reranking", "generation")
    for task in tasks:
        with pytest.raises(SpecError, match=f"student_width: got a model for {task}; expected embedding"):
            check(steps({**once, "losses": {"token_mse": 1}}), WIDTHS, 1, teacher=Teacher(WIDTHS, task))
    with pytest.raises(ValueError, match="greater than 0"):
        steps({"student_width": 0})
