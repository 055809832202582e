"""What a distillation may ask of a student and its teacher, known from widths and the task alone."""

from __future__ import annotations

from dataclasses import dataclass

from builders.checkpoint.widths import Widths
from builders.errors import SpecError
from builders.spec import DistilSlice, LossesSlice, Task

_OF_TASK: dict[str, tuple[Task, ...]] = {
    "embedding_cosine": ("embedding",),
    "similarity": ("embedding",),
    "soft_labels": ("classification", "reranking", "generation"),
    "next_tokens": ("generation",),
    "attention": ("embedding", "classification", "reranking"),  # a decoder's keys are turned by their positions first
    "hard_labels": ("classification", "reranking"),
}


@dataclass(frozen=True)
class Teacher:
    """The original."""

    widths: Widths
    task: Task


def losses_of(asked: DistilSlice, task: Task) -> LossesSlice:
    """As given, or what suits the task."""
    if asked.losses is not None:
        return asked.losses
    return LossesSlice(token_mse=1.0, embedding_cosine=4.0) if task == "embedding" else LossesSlice(soft_labels=1.0)


def matched_layers(asked: DistilSlice, student: int, teacher: int) -> tuple[int, ...] | None:
    """The teacher's layer for each of the student's; None where nothing says which."""
    if asked.match_layers is not None:
        return asked.match_layers
    if student == teacher:
        return tuple(range(teacher))
    return asked.student_layers


def distilled(asked: DistilSlice, widths: Widths, teacher: Teacher, key: str) -> Widths:
    """The student's widths. Raises SpecError for layers that do not exist and losses that do not fit."""
    there = len(widths.layers)
    chosen = asked.student_layers
    if chosen is not None:
        if chosen[-1] >= there:
            raise SpecError(
                f"{key}.student_layers", got=chosen[-1], expected=f"numbers of the {there} layers, from 0",
                fix=f"name layers up to {there - 1}: a student has no more layers than its teacher",
            )  # fmt: skip
        if len(chosen) == there:
            raise SpecError(
                f"{key}.student_layers", got=f"all {there} layers", expected="fewer",
                fix="leave student_layers out: what the step before left is then trained as it is",
            )  # fmt: skip
        widths = widths.model_copy(update={"layers": tuple(widths.layers[number] for number in chosen)})
    losses = losses_of(asked, teacher.task)
    for name in losses.given:
        if teacher.task not in _OF_TASK.get(name, (teacher.task,)):
            raise SpecError(
                f"{key}.losses.{name}", got=f"a model for {teacher.task}", expected=" or ".join(_OF_TASK[name]),
                fix="leave this loss out",
            )  # fmt: skip
    if asked.temperature is not None and "soft_labels" not in losses.given:
        raise SpecError(
            f"{key}.temperature", got=asked.temperature, expected="losses.soft_labels beside it", fix="leave it out"
        )
    _require_layers(asked, losses, widths, teacher.widths, key)
    widths = _of_width(asked, losses, widths, teacher, key)
    return widths if asked.exits is None else _left_at_exit(asked, widths, teacher, key)


def _left_at_exit(asked: DistilSlice, widths: Widths, teacher: Teacher, key: str) -> Widths:
    """The first layers, up to the exit that becomes the model."""
    assert asked.exits is not None
    there = len(widths.layers)
    if teacher.task != "embedding":
        raise SpecError(
            f"{key}.exits", got=f"a model for {teacher.task}", expected="embedding: exits share its pooling, and have "
            "no head to learn", fix="use student_layers",
        )  # fmt: skip
    if asked.exits[-1] >= there:
        raise SpecError(
            f"{key}.exits", got=asked.exits[-1], expected=f"fewer than the {there} layers: the last one teaches",
            fix=f"name numbers of layers up to {there - 1}",
        )  # fmt: skip
    return widths.model_copy(update={"layers": widths.layers[: asked.exit]})


def _of_width(asked: DistilSlice, losses: LossesSlice, widths: Widths, teacher: Teacher, key: str) -> Widths:
    """The student at the width that it is asked for."""
    wanted, size = asked.student_width, widths.head_size
    narrower = widths.hidden != teacher.widths.hidden
    if wanted is None:
        between = next((name for name in ("token_mse", "hidden") if name in losses.given), None)
        if narrower and between is not None:
            raise SpecError(
                f"{key}.losses.{between}", got=f"states {widths.hidden} wide, where the teacher's are "
                f"{teacher.widths.hidden}", expected="student_width beside it, whose step learns how they compare",
                fix="use losses: {embedding_cosine: 1}, or train longer in the step with student_width",
            )  # fmt: skip
        return widths
    if teacher.task != "embedding":
        raise SpecError(
            f"{key}.student_width", got=f"a model for {teacher.task}", expected="embedding: behind its pooling, a "
            "Dense leads back to the teacher's width", fix="leave it out, and take out layers, heads or neurons",
        )  # fmt: skip
    if narrower:
        raise SpecError(
            f"{key}.student_width", got=f"a model that a step before has made {widths.hidden} wide",
            expected=f"one of the teacher's width, {teacher.widths.hidden}",
            fix="give student_width once",
        )  # fmt: skip
    if wanted >= widths.hidden or wanted % size:
        raise SpecError(
            f"{key}.student_width", got=wanted,
            expected=f"a multiple of {size}, the width of a head, under {widths.hidden}, the teacher's own",
            fix=f"use {max(size, min(wanted, widths.hidden - size) // size * size)}"
            if widths.hidden > size else "leave it out: the model has one head",
        )  # fmt: skip
    return widths.model_copy(update={"hidden": wanted})


def _require_layers(asked: DistilSlice, losses: LossesSlice, student: Widths, teacher: Widths, key: str) -> None:
    """What hidden and attention need: a layer of the teacher for each of the student's, with as many heads."""
    layer_wise = [name for name in ("hidden", "attention") if name in losses.given]
    if not layer_wise:
        return
    matched, count = matched_layers(asked, len(student.layers), len(teacher.layers)), len(student.layers)
    if matched is None or len(matched) != count or matched[-1] >= len(teacher.layers):
        raise SpecError(
            f"{key}.match_layers", got="none" if matched is None else list(matched),
            expected=f"{count} layers of the teacher's {len(teacher.layers)}, from 0, one for each of the student's",
            fix=f"name them, or leave losses.{' and losses.'.join(layer_wise)} out",
        )  # fmt: skip
    if "attention" not in layer_wise:
        return
    for number, (own, other) in enumerate(zip(student.layers, matched, strict=True)):
        if own.heads != teacher.layers[other].heads:
            raise SpecError(
                f"{key}.losses.attention", got=f"{own.heads} heads in layer {number}",
                expected=f"{teacher.layers[other].heads}, as in the teacher's layer {other}: each head has a map",
                fix="leave this loss out, or prune no heads",
            )  # fmt: skip
