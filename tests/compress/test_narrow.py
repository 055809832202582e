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
from builders.compress.plan import Teacher, check
from builders.compress.texts import CalibrationText
from builders.errors import SpecError
from builders.export.weights import load_encoder
from builders.judging import corpus
from builders.pipeline.compress import carried_out
from builders.pipeline.opened import opened
from builders.pipeline.result import Build
from builders.spec import PrecisionSlice, StepSlice
from builders.store.store import Store
from builders.training.recipe import TrainingProgress
from tests.compress.test_spec import WIDTHS
from tests.compress.tiny import Tiny, compressing
from tests.conftest import save_tiny

STEP: dict[str, Any] = {
    "tokens": 12_000, "text_tokens": 4_000, "batch_tokens": 512, "learning_rate": 0.003, "student_width": 16,
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


def test_projections_learn_and_are_no_part_of_the_result(tiny_bert: Path, texts: Path, tmp_path: Path) -> None:
    tiny = Tiny.of(tiny_bert)
    made = _narrowed(tiny, 16, [(0, 0), (1, 1)])
    assert [tuple(one.weight.shape) for one in (made.back, *made.hidden)] == [(32, 16)] * 3
    start = [copy.deepcopy(one.state_dict()) for one in made.hidden]
    learnt: list[Any] = []

    def keep(progress: TrainingProgress) -> None:
        learnt.append(progress.loss)

    losses = {"hidden": 1.0, "token_mse": 1.0, "embedding_cosine": 1.0}
    step = {**STEP, "losses": losses}
    seen: list[narrow.Narrow] = []
    with pytest.MonkeyPatch.context() as patch:
        whole = narrow.narrowed
        patch.setattr(narrow, "narrowed", lambda *given: seen.append(whole(*given)) or seen[-1])
        student = _built(tiny_bert, [{"distil": step}], texts, tmp_path)
    assert len(start) == len(seen[0].hidden) == 2
    assert "width 32 -> 16" in _notes(student)
    weights = load_file(student.path("model.safetensors"))
    assert not [name for name in weights if "hidden." in name or "back" in name]
    assert weights["embeddings.word_embeddings.weight"].shape[1] == 16
    kept = load_file(student.directory / "32_Dense" / "model.safetensors")
    assert torch.equal(kept["linear.weight"], seen[0].back.weight)
