"""A student trained towards the original model: knowledge distillation, and recovery after other steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from builders.artifacts import Checkpoint
from builders.checkpoint.widths import layers_of
from builders.compress import losses, narrow, prune
from builders.compress.distil_plan import losses_of, matched_layers
from builders.compress.gradual import at_once, rising, zeros_note
from builders.compress.importance import Forward
from builders.compress.judged import by_text, outputs
from builders.compress.rate import SHARE, rate_by_trial, told
from builders.compress.teacher import TeacherStates
from builders.compress.texts import WATCHED, Batch, CalibrationText, batches, labelled_batches, labelled_requests
from builders.errors import DivergedError, InputError
from builders.spec import DistilSlice
from builders.training.arithmetic import Arithmetic, arithmetic, reproducible
from builders.training.curve import training_page
from builders.training.loop import Bounds, Trained, TrainingSettings, TrainingWork, train
from builders.training.optimiser import Optimiser, rise_and_fall
from builders.training.recipe import TrainingProgress
from builders.training.resume import EVERY_S, Resume

if TYPE_CHECKING:
    import torch

PAGE = "distil.html"  # the loss curve
_PROBE = 64  # watched texts behind each point of the curve
_TOO_MUCH = 100  # a loss this many times that of the untrained student has left it for good
_TEMPERATURE = 2.0


@dataclass(frozen=True)
class Teaching:
    """`states` is where the teacher's states stay, by text; `scratch` is this run's alone, and `key` tells it from
    others. Both models compute in `numbers`. `what` is being done, in messages."""

    model: Any
    forward: Forward
    states: Path
    scratch: Path
    key: str
    report: Callable[[TrainingProgress], None] = lambda progress: None
    save_every_s: float = EVERY_S
    numbers: Arithmetic = field(default_factory=arithmetic)
    what: str = "distil"


@dataclass(frozen=True)
class DistilLesson:
    number: int  # of the batch
    batch: Batch
    labels: torch.Tensor | None

    @property
    def tokens(self) -> int:
        return int(self.batch["attention_mask"].sum())


def distil(
    asked: DistilSlice,
    model: Any,
    as_forward: Callable[[Any], Forward],
    checkpoint: Checkpoint,
    texts: CalibrationText,
    teaching: Teaching,
) -> list[str]:
    """Trains `model` in place. A page with the loss curve is left in `teaching.scratch`, and, of a student that is
    narrower, what leads back to the teacher's width, as `narrow.BACK`.

    Raises InputError for texts that do not suffice, DivergedError for a student that training made no better.
    """
    import torch

    if asked.student_layers is not None:
        prune.keep_layers(model, asked.student_layers)
    if teaching.numbers == "bfloat16":  # torch's fused attention takes half of a step in its backward pass there
        model.set_attn_implementation("eager")
    lessons, watched = lessons_of(asked, checkpoint, texts)
    made = None if asked.student_width is None else _narrowed(asked, model, as_forward, lessons, teaching)
    forward = as_forward(model) if made is None else made.forward
    measure = _Measure(asked, model, forward, checkpoint, teaching, made)
    probe = _Measure(asked, model, forward, checkpoint, teaching, made, "probe")
    shown = watched[: max(1, len(watched) * _PROBE // WATCHED)]
    wanted = outputs(teaching.forward, [lesson.batch for lesson in watched])

    def cosines() -> Any:
        return by_text(wanted, outputs(forward, [lesson.batch for lesson in watched]))

    def judged() -> float:
        with torch.no_grad():
            return float(np.mean([probe.loss(lesson).item() for lesson in shown]))

    with at_once(model, asked.sparsity):
        before = cosines()
    trained = model if made is None else made.trained
    found, rate = taught(asked, trained, measure.loss, lessons, judged, teaching)
    notes = [*_notes(found, lessons, measure.teacher, (before, cosines()), teaching.numbers), rate]
    notes += zeros_note(model, asked.sparsity)
    draw(teaching, checkpoint, notes, found)
    if made is not None:
        made.write(teaching.scratch / narrow.BACK)
    return notes


def _narrowed(
    asked: DistilSlice, model: Any, as_forward: Callable[[Any], Forward], lessons: Sequence[DistilLesson],
    teaching: Teaching,
) -> narrow.Narrow:  # fmt: skip
    assert asked.student_width is not None
    matched = matched_layers(asked, len(layers_of(model)), len(layers_of(teaching.model)))
    given = asked.losses is not None and "hidden" in asked.losses.given
    pairs = list(enumerate(matched)) if given and matched is not None else []
    some, tokens = list[Batch](), 0
    for lesson in endless(lessons, asked.seed):  # of all lengths
        if tokens >= narrow.FIT_TOKENS or len(some) == len(lessons):
            break
        some.append(lesson.batch)
        tokens += lesson.tokens
    teacher = teaching.model, teaching.forward
    return narrow.narrowed(model, asked.student_width, as_forward, teacher, some, pairs)


def taught(
    asked: DistilSlice,
    model: Any,
    loss: Callable[[DistilLesson], torch.Tensor],
    lessons: Sequence[DistilLesson],
    judged: Callable[[], float],
    teaching: Teaching,
) -> tuple[Trained, str]:
    """`model`, trained in place by `loss`, and a note of the rate; `judged` is its loss of texts that it is not trained
    on. Raises DivergedError where that gets no less."""
    with at_once(model, asked.sparsity):
        start = judged()
    tokens_per_step = sum(lesson.tokens for lesson in lessons) / len(lessons)

    def work(judge: Callable[[], float] | None) -> TrainingWork[DistilLesson]:
        return TrainingWork(model, loss, endless(lessons, asked.seed), lambda lesson: lesson.tokens, judge)

    def settings(rate: float, share: float = 1.0) -> TrainingSettings:
        ceiling = _TOO_MUCH * start or math.inf
        return _settings(asked, _bounds(asked, tokens_per_step, share), rate, ceiling, teaching.numbers)

    def trial(rate: float) -> float:
        try:
            with reproducible(asked.seed):
                train(work(None), settings(rate, SHARE))
        except DivergedError:
            return math.inf
        return judged()

    with frozen(model, asked.words):
        rate = asked.learning_rate or rate_by_trial(model, trial, start, teaching.scratch / "rate.json")
        resume = Resume(teaching.scratch / "training.pt", teaching.key, teaching.save_every_s)
        with reproducible(asked.seed), rising(model, asked.sparsity, work(judged), teaching.report) as (whole, report):
            found = train(whole, settings(rate), report, resume)
    end = judged()
    if not end < start:
        raise DivergedError(
            f"{teaching.what} made the model no better: of texts that it was not trained on, the loss was {start:.4g} "
            f"and is {end:.4g}, by {told(asked.learning_rate, rate)}; lower it, or train longer"
        )
    return found, told(asked.learning_rate, rate)


def draw(teaching: Teaching, checkpoint: Checkpoint, notes: Sequence[str], found: Trained) -> None:
    """The page with the loss curve."""
    teaching.scratch.mkdir(parents=True, exist_ok=True)
    (teaching.scratch / PAGE).write_text(training_page(f"{teaching.what} of {checkpoint.source}", notes, found.curve))


def lessons_of(
    asked: DistilSlice, checkpoint: Checkpoint, texts: CalibrationText
) -> tuple[list[DistilLesson], list[DistilLesson]]:
    """To learn from, and to watch."""
    most = asked.batch_tokens
    if asked.labels is None:
        learnt, watched = batches(texts.requests(asked.text_tokens, most), most), texts.watched()
        return (
            [DistilLesson(number, batch, None) for number, batch in enumerate(learnt)],
            [DistilLesson(number, batch, None) for number, batch in enumerate(watched)],
        )
    requests, labels = labelled_requests(checkpoint, asked.labels)
    if len(requests) < 2:
        raise InputError(
            f"labels in {asked.labels}", got="one line", expected="some to learn from, and an eighth to watch",
            fix="give more lines",
        )  # fmt: skip
    apart = max(1, min(WATCHED, len(requests) // 8))
    sides = (slice(apart, None), slice(0, apart))
    learnt_side, watched_side = (
        [DistilLesson(number, *pair) for number, pair in enumerate(zip(*found, strict=True))]
        for found in (labelled_batches(requests[side], labels[side], most) for side in sides)
    )
    return learnt_side, watched_side


def endless(lessons: Sequence[DistilLesson], seed: int) -> Iterator[DistilLesson]:
    """In another order at each pass."""
    random = np.random.default_rng(seed)
    while True:
        for number in random.permutation(len(lessons)):
            yield lessons[number]


def _bounds(asked: DistilSlice, tokens_per_step: float, share: float) -> Bounds:
    import torch

    return Bounds(
        steps=None if asked.tokens is None else max(1, round(share * asked.tokens / tokens_per_step)),
        cpu_s=None if asked.minutes is None else share * asked.minutes * 60 * torch.get_num_threads(),
    )


def _settings(
    asked: DistilSlice, bounds: Bounds, rate: float, ceiling: float, numbers: Arithmetic
) -> TrainingSettings:  # fmt: skip
    return TrainingSettings(
        bounds,
        rise_and_fall(rate),
        Optimiser(kind=asked.optimiser, weight_decay=asked.weight_decay, betas=(0.9, 0.99)),
        numbers,
        asked.clip,
        asked.ema,
        ceiling,
    )


class _Measure:
    """The student's loss of a batch, by the teacher's states of it."""

    def __init__(
        self, asked: DistilSlice, model: Any, forward: Forward, checkpoint: Checkpoint, teaching: Teaching,
        narrower: narrow.Narrow | None = None, side: str = "learnt",
    ) -> None:  # fmt: skip
        self._narrower = narrower
        self._weights = losses_of(asked, checkpoint.task).given
        self._model, self._forward = model, forward
        self._temperature = _TEMPERATURE if asked.temperature is None else asked.temperature
        own, its = len(layers_of(model)), len(layers_of(teaching.model))
        matched = matched_layers(asked, own, its)
        self._pairs = [] if matched is None else list(enumerate(matched))
        self._last = own - 1, its - 1
        hidden = self._pairs if "hidden" in self._weights else []
        maps = self._pairs if "attention" in self._weights else []
        last = [self._last] if "token_mse" in self._weights else []

        def wanted(side: int) -> losses.Wanted:
            states = sorted({pair[side] for pair in (*hidden, *last)})
            return losses.Wanted(states, [pair[side] for pair in maps])

        self._wanted = wanted(0)
        self.teacher = TeacherStates(
            teaching.model, teaching.forward, wanted(1), teaching.numbers, teaching.states / side
        )

    def loss(self, lesson: DistilLesson) -> torch.Tensor:
        wanted = self.teacher.of(lesson.number, lesson.batch)
        seen = losses.look(self._model, self._forward, lesson.batch, self._wanted)
        parts = [weight * self._one(name, seen, wanted, lesson) for name, weight in self._weights.items()]
        return sum(parts[1:], parts[0])

    def _one(self, name: str, seen: losses.Seen, wanted: losses.Seen, lesson: DistilLesson) -> torch.Tensor:
        if name == "token_mse":
            last = seen.states[self._last[0]]
            last = last if self._narrower is None else self._narrower.back(last)
            return losses.squared_error(last, wanted.states[self._last[1]])
        if name == "embedding_cosine":
            return losses.embedding_cosine(seen.output, wanted.output)
        if name == "similarity":
            return losses.similarity(seen.output, wanted.output)
        if name == "soft_labels":
            return losses.soft_labels(seen.output, wanted.output, self._temperature)
        if name == "hard_labels":
            assert lesson.labels is not None
            return losses.hard_labels(seen.output, lesson.labels)
        tokens = lesson.batch["attention_mask"].bool()
        each = [
            losses.squared_error(self._compared(seen, own), wanted.states[its])
            if name == "hidden"
            else losses.attention_divergence(seen.attention[own], wanted.attention[its], tokens)
            for own, its in self._pairs
        ]
        return sum(each[1:], each[0]) / len(each)

    def _compared(self, seen: losses.Seen, layer: int) -> torch.Tensor:
        """The student's states at the teacher's width."""
        states = seen.states[layer]
        return states if self._narrower is None else self._narrower.hidden[layer](states)


class frozen:  # noqa: N801
    """The tables of words and positions need no gradient for a while, unless they are trained."""

    def __init__(self, model: Any, words: bool) -> None:
        import torch

        tables = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
        self._tables = [] if words else tables

    def __enter__(self) -> None:
        for table in self._tables:
            table.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for table in self._tables:
            table.requires_grad_(True)


def _notes(
    found: Trained, lessons: Sequence[DistilLesson], teacher: TeacherStates, cosines: tuple[Any, Any], numbers: str
) -> list[str]:
    text = sum(lesson.tokens for lesson in lessons)
    before, after = cosines
    spent = (
        f", {teacher.cpu_s:.0f} of them the teacher's" if teacher.tokens else ", the teacher's states read from disk"
    )
    return [
        f"{found.tokens:,} tokens in {found.steps:,} steps, {found.tokens / text:.1f} times the text of {text:,}; "
        f"{found.cpu_s:.0f} CPU-seconds{spent}; {numbers}",
        f"loss {found.curve[0].train:.4g} -> {found.curve[-1].train:.4g}; {len(before)} texts that it did not see, "
        f"cosine mean {before.mean():.4f} -> {after.mean():.4f}, worst {before.min():.4f} -> {after.min():.4f}",
    ]
