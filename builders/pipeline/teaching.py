"""The original as a teacher, and the folders in which a distillation can be killed and taken up again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from builders.artifacts import Checkpoint
from builders.compress.distil import Teaching, distil
from builders.errors import DivergedError
from builders.export.encoder import graph_module
from builders.export.sentence import head_modules
from builders.export.weights import load_encoder
from builders.judging import corpus
from builders.pipeline.result import Build, Report
from builders.spec import DistilSlice, PrecisionSlice
from builders.store.closure import code_key
from builders.store.store import Store, key_of
from builders.training.arithmetic import arithmetic
from builders.training.progress import losses_text
from builders.training.recipe import TrainingProgress

_LINES = 100  # of progress, at most


def inputs(original: Checkpoint, precision: PrecisionSlice) -> dict[str, Any]:
    """What a student depends on beside what every step does."""
    return {
        "teacher": original.model_dump(mode="json", exclude={"source"}),
        "more texts": corpus.library_key() if precision.calibration_texts is None else None,
        "arithmetic": arithmetic(),
    }


@contextmanager
def teaching(
    built: Build, asked: DistilSlice, made_from: dict[str, Any], store: Store, report: Report, number: int
) -> Iterator[Teaching]:
    """The run's own folder goes when it has ended, well or by diverging; a run that is killed, or interrupted, leaves
    it. The teacher's states stay: the next student of the same text finds them."""
    original = built.original
    assert original is not None
    model = load_encoder(original)
    key = key_of({**made_from, "made by": code_key(distil)})
    text = {"text_tokens": asked.text_tokens, "batch_tokens": asked.batch_tokens, "match": asked.match_layers}
    shared = {name: value for name, value in made_from.items() if name not in ("checkpoint", "step", "tensor")}
    kept = {} if asked.losses is None else asked.losses.given
    layers = asked.student_layers if {"hidden", "attention"} & set(kept) else None
    states = key_of({**shared, **text, "kept": sorted(kept), "layers": layers, "made by": code_key(_states_code)})
    scratch = store.root / "distil" / key
    lesson = Teaching(
        model,
        graph_module(model, head_modules(original), original),
        store.root / "teacher" / states,
        scratch,
        key,
        _lines(report, number),
    )
    try:
        yield lesson
    except DivergedError:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(scratch, ignore_errors=True)


def _states_code(folder: Path) -> Any:
    """Not called: its imports are the code that the teacher's states come from."""
    from builders.compress.teacher import TeacherStates

    return TeacherStates, load_encoder, graph_module, head_modules, folder


def _lines(report: Report, number: int) -> Any:
    shown = -1

    def line(progress: TrainingProgress) -> None:
        nonlocal shown
        if int(progress.share * _LINES) > shown:
            shown = int(progress.share * _LINES)
            report("compress", f"step {number}: distil {progress.share:.0%}, {losses_text(progress)}")

    return line
