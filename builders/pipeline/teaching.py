"""A model as a teacher, and the folders in which a training towards it can be killed and taken up again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from builders.artifacts import Checkpoint
from builders.compress.distil import Teaching
from builders.errors import DivergedError
from builders.judging import corpus
from builders.pipeline.opened import opened
from builders.pipeline.result import Report, Stage
from builders.spec import DistilSlice, PrecisionSlice
from builders.store.closure import code_key
from builders.store.store import Store, key_of
from builders.training.arithmetic import Arithmetic
from builders.training.progress import losses_text
from builders.training.recipe import TrainingProgress

_LINES = 100  # of progress, at most
_OF_STATES = ("labels", "texts", "left out", "teacher", "more texts", "arithmetic")  # of what `inputs` and steps say

Line = Callable[[TrainingProgress], None]


def inputs(teacher: Checkpoint, precision: PrecisionSlice, numbers: Arithmetic) -> dict[str, Any]:
    """What is learnt depends on this, beside what every step depends on."""
    return {
        "teacher": teacher.model_dump(mode="json", exclude={"source"}),
        "texts": corpus.corpus_key(precision.calibration_texts),
        "left out": precision.calibration_samples,
        "more texts": corpus.library_key() if precision.calibration_texts is None else None,
        "arithmetic": numbers,
    }


@contextmanager
def teaching(
    teacher: Checkpoint, asked: DistilSlice, made_from: dict[str, Any], store: Store, line: Line, what: str,
    code: Callable[..., Any],
) -> Iterator[Teaching]:  # fmt: skip
    """The run's own folder goes when it has ended, well or by diverging; a run that is killed, or interrupted, leaves
    it. The teacher's states stay: the next student of the same text finds them. `code` is what trains."""
    model, as_forward = opened(teacher)
    key = key_of({**made_from, "made by": code_key(code)})
    text = {"text_tokens": asked.text_tokens, "batch_tokens": asked.batch_tokens, "match": asked.match_layers}
    shared = {name: made_from[name] for name in _OF_STATES if name in made_from}
    kept = {} if asked.losses is None else asked.losses.given
    layers = asked.student_layers if {"hidden", "attention"} & set(kept) else None
    states = key_of({**shared, **text, "kept": sorted(kept), "layers": layers, "made by": code_key(_states_code)})
    scratch = store.root / what / key
    lesson = Teaching(
        model,
        as_forward(model),
        store.root / "teacher" / states,
        scratch,
        key,
        line,
        numbers=made_from["arithmetic"],
        what=what,
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

    return TeacherStates, opened, folder


def lines(report: Report, stage: Stage, what: str) -> Line:
    shown = -1

    def line(progress: TrainingProgress) -> None:
        nonlocal shown
        if int(progress.share * _LINES) > shown:
            shown = int(progress.share * _LINES)
            report(stage, f"{what} {progress.share:.0%}, {losses_text(progress)}")

    return line
