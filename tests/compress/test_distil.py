"""Distillation: each loss against a direct computation, students that learn, a kill that changes nothing, refusals."""

from __future__ import annotations

import copy
import itertools
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
from torch.nn import functional

from builders.artifacts import Checkpoint
from builders.checkpoint import load_checkpoint
from builders.checkpoint.widths import parts_of
from builders.compress import losses
from builders.compress.distil import Teaching, distil
from builders.compress.plan import Teacher, check
from builders.compress.texts import CalibrationText, labelled
from builders.errors import DivergedError, InputError, SpecError
from builders.judging import corpus
from builders.pipeline.compress import carried_out
from builders.pipeline.result import Build
from builders.spec import PrecisionSlice, StepSlice
from builders.store.store import Store
from builders.training.recipe import TrainingProgress
from tests.compress.killed import assert_same_weights, resumed_and_whole
from tests.compress.test_spec import WIDTHS
from tests.compress.tiny import Tiny, compressing
from tests.conftest import save_tiny

TRAINED = {"tokens": 20_000, "text_tokens": 4_000, "batch_tokens": 512, "learning_rate": 0.003}
STUDENT: dict[str, Any] = {**TRAINED, "student_layers": [1]}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("\n".join(text[:120] for text in corpus.texts(None, 600)))
    return file


def _built(source: Path, steps: list[dict[str, Any]], texts: Path, root: Path, task: str = "embedding") -> Checkpoint:
    precision = {"calibration_texts": str(texts), "calibration_samples": 16}
    spec = compressing(source, steps, task, precision=precision)
    built = Build(spec, "cpu", load_checkpoint(spec.model))
    return carried_out(built, Store(root / "store"), lambda stage, message: None).checkpoint


def _notes(checkpoint: Checkpoint) -> str:
    return "; ".join(json.loads(checkpoint.path("compression.json").read_text())[-1]["notes"])


def _cosines(notes: str) -> tuple[float, float]:
    before, _, after = notes.partition("cosine mean ")[2].partition(", worst")[0].split()
    return float(before), float(after)


def test_losses_are_what_they_say() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    probabilities = functional.softmax(teacher / 3, 1), functional.log_softmax(student / 3, 1)
    divergence = functional.kl_div(probabilities[1], probabilities[0], reduction="batchmean")
    assert torch.allclose(losses.soft_labels(student, teacher, 3.0), 9 * divergence)
    one, other = student[:, :1], teacher[:, :1]
    logistic = functional.binary_cross_entropy_with_logits(one / 2, torch.sigmoid(other / 2))
    entropy = functional.binary_cross_entropy_with_logits(other / 2, torch.sigmoid(other / 2))
    assert torch.allclose(losses.soft_labels(one, other, 2.0), 4 * (logistic - entropy), atol=1e-6)
    labels = torch.tensor([0, 1, 1, 0])
    wanted = functional.binary_cross_entropy_with_logits(one[:, 0], labels.float())
    assert torch.allclose(losses.hard_labels(one, labels), wanted)
    assert torch.allclose(losses.hard_labels(student, labels), functional.cross_entropy(student, labels))
    near = functional.cosine_similarity
    pairs = [
        (near(student[a], student[b], 0) - near(teacher[a], teacher[b], 0)) ** 2
        for a, b in itertools.permutations(range(4), 2)
    ]
    assert torch.allclose(losses.similarity(student, teacher), torch.stack(pairs).mean(), atol=1e-6)
    assert losses.similarity(student[:1], teacher[:1]) == 0
    cosine = functional.cosine_similarity(student, teacher).mean()
    assert torch.allclose(losses.embedding_cosine(student, teacher), 1 - cosine)


def test_attention_divergence_counts_real_tokens() -> None:
    torch.manual_seed(0)
    tokens = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    maps = [
        torch.softmax(torch.randn(2, 2, 3, 3).masked_fill(~tokens[:, None, None, :], -torch.inf), -1) for _ in range(2)
    ]
    found = [
        float((q[:n] * (q[:n] / p[:n]).log()).sum())
        for text, n in ((0, 3), (1, 2))
        for head in range(2)
        for p, q in ((maps[0][text, head, row], maps[1][text, head, row]) for row in range(n))
    ]
    assert float(losses.attention_divergence(*maps, tokens)) == pytest.approx(np.mean(found), abs=1e-6)
    assert losses.attention_divergence(maps[1], maps[1], tokens) == 0


def test_what_is_looked_at_is_what_the_model_has(tiny_bert: Path) -> None:
    tiny = Tiny.of(tiny_bert)
    batch = tiny.batches(8)[0]
    seen = losses.look(tiny.model, tiny.forward_of(tiny.model), batch, losses.Wanted([0, 1], [1]))
    eager = copy.deepcopy(tiny.model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        made = eager(**batch, output_hidden_states=True, output_attentions=True)
    tokens = batch["attention_mask"].bool()
    for layer in (0, 1):
        assert torch.allclose(seen.states[layer], made.hidden_states[layer + 1][tokens], atol=1e-5)
    rows = tokens[:, None, :, None].expand_as(made.attentions[1])
    assert torch.allclose(seen.attention[1][rows], made.attentions[1][rows], atol=1e-5)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"token_mse": 1.0},
        {"similarity": 1.0, "hidden": 0.5},
        {"embedding_cosine": 1.0, "attention": 1.0},
    ],
)
def test_a_student_comes_nearer_to_its_teacher(tiny_bert: Path, texts: Path, tmp_path: Path, given: Any) -> None:
    step = {**STUDENT, **({"losses": given} if given else {})}
    student = _built(tiny_bert, [{"distil": step}], texts, tmp_path)
    notes = _notes(student)
    before, after = _cosines(notes)
    assert after > before
    assert "layers 2 -> 1" in notes
    assert "CPU-seconds" in notes
    assert "<svg" in (student.directory / "distil.html").read_text()
    assert not list((tmp_path / "store" / "distil").iterdir())  # what only a run needs goes with it
    kept = list((tmp_path / "store" / "teacher").rglob("learnt/*.safetensors"))
    assert kept
    if not given:
        tokens = sum(load_file(file)["states.1"].shape[0] for file in kept)
        assert f"times the text of {tokens:,}" in notes


def test_another_student_finds_the_teachers_states(tiny_bert: Path, texts: Path, tmp_path: Path) -> None:
    first = _notes(_built(tiny_bert, [{"distil": STUDENT}], texts, tmp_path))
    assert "of them the teacher's" in first
    damaged = next((tmp_path / "store" / "teacher").rglob("learnt/000000.safetensors"))
    again = _notes(_built(tiny_bert, [{"distil": {**STUDENT, "seed": 1}}], texts, tmp_path))
    assert "the teacher's states read from disk" in again
    damaged.write_bytes(damaged.read_bytes()[:50])
    assert "of them the teacher's" in _notes(_built(tiny_bert, [{"distil": {**STUDENT, "seed": 2}}], texts, tmp_path))


def test_what_other_steps_left_recovers(tiny_bert: Path, texts: Path, tmp_path: Path) -> None:
    """Without student_layers, heads, neurons and factors as they are; and the result loads and exports elsewhere."""
    steps: list[dict[str, Any]] = [
        {"prune": {"heads": 2, "ffn": 40, "importance": "magnitude"}},
        {"low_rank": {"rank": 8, "tokens": 1000}},
        {"distil": TRAINED},
    ]
    before = _built(tiny_bert, steps[:2], texts, tmp_path)
    after = _built(tiny_bert, steps, texts, tmp_path)
    assert _cosines(_notes(after))[1] > _cosines(_notes(after))[0]
    old, new = (load_file(folder.path("model.safetensors")) for folder in (before, after))
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert {name: value.shape for name, value in old.items()} == {name: value.shape for name, value in new.items()}
    assert {f"encoder.layer.1.{parts_of('bert')['ffn_in']}.{factor}.weight" for factor in (0, 1)} <= moved
    assert not [name for name in moved if "embeddings.weight" in name]
    file = tmp_path / "g.onnx"
    command = ["export", str(after.directory), "-o", str(file), "--pooling", "mean", "--max-length", "64"]
    subprocess.run([sys.executable, "-m", "builders", *command], check=True, capture_output=True, timeout=300)
    assert file.stat().st_size


def test_the_table_of_words_is_trained_when_asked(tiny_bert: Path, texts: Path, tmp_path: Path) -> None:
    first = load_file(Tiny.of(tiny_bert).checkpoint.path("model.safetensors"))
    made = load_file(
        _built(tiny_bert, [{"distil": {**STUDENT, "words": True}}], texts, tmp_path).path("model.safetensors")
    )
    name = "embeddings.word_embeddings.weight"
    assert not torch.equal(first[name], made[name])


@pytest.mark.parametrize(("task", "labels"), [("classification", 3), ("reranking", 1)])
def test_scores_are_learnt_from_the_teacher_and_from_labels(
    texts: Path, tmp_path: Path, task: str, labels: int
) -> None:
    source = save_tiny(tmp_path / "m", "bert", task, labels)
    file = tmp_path / "labels.tsv"
    second = "\tand an answer" if task == "reranking" else ""
    kinds, first = ["class method", "return value", "file path"][: max(2, labels)], corpus.texts(None, 80)
    rows = [(n % len(kinds), f"{' '.join([kinds[n % len(kinds)]] * 6)} {text[:20]}") for n, text in enumerate(first)]
    file.write_text("".join(f"{label}\t{text}{second}\n" for label, text in rows))
    step = {**STUDENT, "losses": {"soft_labels": 1.0, "hard_labels": 0.5}, "labels": str(file), "temperature": 3}
    notes = _notes(_built(source, [{"distil": step}], texts, tmp_path, task))
    assert "10 texts that it did not see" in notes
    both = {**STUDENT, "losses": {"token_mse": 1.0, "soft_labels": 1.0}}
    plain = _notes(_built(source, [{"distil": both}], texts, tmp_path, task))
    assert "256 texts that it did not see" in plain


def test_a_rerankers_labels_are_of_pairs(tmp_path: Path) -> None:
    checkpoint = Tiny.of(save_tiny(tmp_path / "m", "bert", "reranking", 1), "reranking").checkpoint
    file = tmp_path / "labels.tsv"
    file.write_text("1\tquestion one\tanswer one\n0\tquestion one\tanswer that is a longer one\n")
    batches, labels = labelled(checkpoint, file)
    assert torch.cat(labels).tolist() == [1, 0]
    assert batches[0]["token_type_ids"].sum() > 0
    file.write_text("1\tquestion alone\n")
    with pytest.raises(InputError, match="a tab and a second one"):
        labelled(checkpoint, file)


def _teaching(folder: Path, tiny: Tiny, **more: Any) -> Teaching:
    teacher = copy.deepcopy(tiny.model)
    return Teaching(teacher, tiny.forward_of(teacher), folder / "states", folder / "scratch", "key", **more)


def _distilled(folder: Path, source: Path, texts: Path, **more: Any) -> Tiny:
    tiny = Tiny.of(source)
    asked = StepSlice.model_validate({"distil": {**STUDENT, "ema": 0.9}}).distil
    assert asked is not None
    budget = PrecisionSlice(calibration_texts=texts, calibration_samples=16)
    teaching = _teaching(folder, tiny, **more)
    distil(asked, tiny.model, tiny.forward_of, tiny.checkpoint, CalibrationText(tiny.checkpoint, budget), teaching)
    return tiny


def _kill(progress: TrainingProgress) -> None:
    if progress.share > 0.6:
        signal.raise_signal(signal.SIGKILL)


def test_after_a_kill_it_comes_to_the_same_weights(tiny_bert: Path, texts: Path, tmp_path: Path) -> None:
    resumed, whole = resumed_and_whole(_distilled, _kill, (tiny_bert, texts), tmp_path, 0.5)
    assert_same_weights(resumed.model, whole.model)


def test_training_that_diverges_leaves_nothing(tiny_bert: Path, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"diverged at step|no better") as caught:
        _built(tiny_bert, [{"distil": {**STUDENT, "learning_rate": 10}}], texts, tmp_path)
    assert caught.value.exit_code == 1
    left = [path for name in ("distil", "compress") for path in (tmp_path / "store" / name).glob("*")]
    assert left == []


@pytest.mark.parametrize("lines", [[], ["one line"], ["text of line"] * 1 + [f"line {n} of few" for n in range(420)]])
def test_too_little_text(tiny_bert: Path, tmp_path: Path, lines: list[str]) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"different texts|expected at least 2048"):
        _built(tiny_bert, [{"distil": {"student_layers": [1], "tokens": 100}}], file, tmp_path)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"student_layers": [0, 6]}, "student_layers: got 6; expected numbers of the 6 layers"),
        ({"student_layers": [0, 1, 2, 3, 4, 5, 6]}, "a student has no more layers than its teacher"),
        ({"student_layers": [0, 1, 2, 3, 4, 5]}, "leave student_layers out"),
        ({"losses": {"soft_labels": 1}}, "losses.soft_labels: got a model for embedding"),
        ({"losses": {"hard_labels": 1}, "labels": "x"}, "losses.hard_labels: got a model for embedding"),
        ({"student_layers": [0, 5], "losses": {"hidden": 1}, "match_layers": [1, 2, 3]}, "got [1, 2, 3]"),
        ({"student_layers": [0, 5], "losses": {"hidden": 1}, "match_layers": [1, 6]}, "got [1, 6]"),
        ({"temperature": 2}, "temperature: got 2.0; expected losses.soft_labels"),
    ],
)
def test_what_no_student_can_learn(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        check([StepSlice.model_validate({"distil": {"minutes": 1, **asked}})], WIDTHS, 1)
    assert said in str(caught.value)


def test_what_other_steps_leave_no_room_for() -> None:
    pruned: list[dict[str, Any]] = [{"prune": {"what": ["heads"], "heads": 8}}]
    layers: list[dict[str, Any]] = [{"prune": {"what": ["layers"], "amount": 0.5}}]
    for steps, loss, said in ((pruned, "attention", "got 8 heads"), (layers, "hidden", "match_layers: got none")):
        last = {"distil": {"minutes": 1, "losses": {loss: 1}}}
        given = [StepSlice.model_validate(step) for step in (*steps, last)]
        with pytest.raises(SpecError, match=said):
            check(given, WIDTHS, 1)
    alone = [StepSlice.model_validate({"distil": {"minutes": 1, "losses": {"similarity": 1}}})]
    with pytest.raises(SpecError, match="a model for classification; expected embedding"):
        check(alone, WIDTHS, 1, teacher=Teacher(WIDTHS, "classification"))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "minutes or tokens is needed"),
        ({"minutes": 0}, "greater than 0"),
        ({"tokens": 0}, "greater than 0"),
        ({"minutes": 1, "temperature": 0}, "greater than 0"),
        ({"minutes": float("nan")}, "minutes"),
        ({"minutes": 1, "learning_rate": 0}, "greater than 0"),
        ({"minutes": 1, "losses": {}}, "nothing would be learnt"),
        ({"minutes": 1, "losses": {"token_mse": -1}}, "greater than or equal"),
        ({"minutes": 1, "losses": {"logits": 1}}, "Extra inputs"),
        ({"minutes": 1, "losses": {"hard_labels": 1}}, "without the other"),
        ({"minutes": 1, "labels": "x"}, "labels says nothing"),
        ({"minutes": 1, "losses": {"token_mse": 1}, "temperature": 2}, "temperature says nothing"),
        ({"minutes": 1, "losses": {"token_mse": 1}, "match_layers": [1]}, "match_layers says nothing"),
        ({"minutes": 1, "student_layers": [2, 0]}, "in rising order"),
        ({"minutes": 1, "student_layers": []}, "at least one layer"),
    ],
)
def test_keys_that_say_nothing_or_nonsense(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        StepSlice.model_validate({"distil": asked})
