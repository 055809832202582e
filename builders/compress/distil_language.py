"""A language model trained towards the original's next-token probabilities, and towards the text's own next tokens.

The teacher's states after its last norm are kept on disk; its head makes probabilities of them again, so that a
vocabulary costs no disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from builders.artifacts import Checkpoint
from builders.checkpoint.widths import layers_of
from builders.compress import losses, prune
from builders.compress.distil import DistilLesson, Teaching, draw, taught
from builders.compress.distil_plan import losses_of, matched_layers
from builders.compress.gradual import at_once, zeros_note
from builders.compress.teacher import TeacherStates
from builders.compress.texts import Batch, CalibrationText, batches
from builders.spec import DistilSlice

if TYPE_CHECKING:
    import torch


def distil_language(
    asked: DistilSlice, model: Any, checkpoint: Checkpoint, texts: CalibrationText, teaching: Teaching
) -> list[str]:
    """Trains `model` in place. A page with the loss curve is left in `teaching.scratch`.

    Raises InputError for texts that do not suffice, DivergedError for a student that training made no better.
    """
    import torch

    if asked.student_layers is not None:
        prune.keep_layers(model, asked.student_layers)
    lessons = _lessons(batches(texts.requests(asked.text_tokens, asked.batch_tokens), asked.batch_tokens))
    watched = _lessons(texts.watched())
    measure, probe = (_Measure(asked, model, teaching, side) for side in ("learnt", "probe"))

    def judged() -> float:
        with torch.no_grad():
            return float(sum(probe.loss(lesson).item() for lesson in watched) / len(watched))

    with at_once(model, asked.sparsity):
        before = perplexity(model, watched)
    found, rate = taught(asked, model, measure.loss, lessons, judged, teaching)
    after = perplexity(model, watched)
    seen = sum(lesson.tokens for lesson in watched)
    notes = [
        f"{found.tokens:,} tokens in {found.steps:,} steps, of a text of {sum(each.tokens for each in lessons):,}; "
        f"{found.cpu_s:.0f} CPU-seconds; {teaching.numbers}",
        f"loss {found.curve[0].train:.4g} -> {found.curve[-1].train:.4g}; perplexity of {seen:,} tokens that it did "
        f"not see {before:.3f} -> {after:.3f}, the original's {perplexity(teaching.model, watched):.3f}",
        rate,
        *zeros_note(model, asked.sparsity),
    ]
    draw(teaching, checkpoint, notes, found)
    return notes


def _lessons(made: Sequence[Batch]) -> list[DistilLesson]:
    return [DistilLesson(number, batch, None) for number, batch in enumerate(made)]


def final_states(model: Any) -> Callable[..., torch.Tensor]:
    """What the head reads: [texts, length, hidden]."""

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model.get_decoder()(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        return found

    return forward


def perplexity(model: Any, lessons: Sequence[DistilLesson]) -> float:
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for lesson in lessons:
            logits = model.get_output_embeddings()(final_states(model)(**lesson.batch))
            targets = lesson.batch["input_ids"][:, 1:]
            total += float(_cross_entropy(logits, lesson.batch["input_ids"])) * targets.numel()
            count += targets.numel()
    return math.exp(min(total / count, 700.0))


def _cross_entropy(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


class _Measure:
    """The student's loss of a batch, by the teacher's states of it."""

    def __init__(self, asked: DistilSlice, model: Any, teaching: Teaching, side: str) -> None:
        self._weights, self._model = losses_of(asked, "generation").given, model
        self._forward, self._head = final_states(model), teaching.model.get_output_embeddings()
        self._temperature = 1.0 if asked.temperature is None else asked.temperature
        own, its = len(layers_of(model)), len(layers_of(teaching.model))
        matched = matched_layers(asked, own, its)
        self._last = own - 1, its - 1
        self._pairs = list(enumerate(matched)) if matched is not None and "hidden" in self._weights else []
        last = [self._last] if "token_mse" in self._weights else []
        self._wanted, theirs = (
            losses.Wanted(sorted({pair[index] for pair in (*self._pairs, *last)})) for index in (0, 1)
        )
        self._teacher = TeacherStates(
            teaching.model, final_states(teaching.model), theirs, teaching.numbers, teaching.states / side
        )

    def loss(self, lesson: DistilLesson) -> torch.Tensor:
        wanted = self._teacher.of(lesson.number, lesson.batch)
        seen = losses.look(self._model, self._forward, lesson.batch, self._wanted)
        logits = self._model.get_output_embeddings()(seen.output)
        parts = [weight * self._one(name, seen, wanted, logits, lesson) for name, weight in self._weights.items()]
        return sum(parts[1:], parts[0])

    def _one(
        self, name: str, seen: losses.Seen, wanted: losses.Seen, logits: torch.Tensor, lesson: DistilLesson
    ) -> torch.Tensor:  # fmt: skip
        import torch

        if name == "soft_labels":
            with torch.no_grad():
                teacher = self._head(wanted.output.to(self._head.weight.dtype))
            return losses.soft_labels(logits.flatten(0, 1).float(), teacher.flatten(0, 1).float(), self._temperature)
        if name == "next_tokens":
            return _cross_entropy(logits, lesson.batch["input_ids"])
        if name == "token_mse":
            return losses.squared_error(seen.states[self._last[0]], wanted.states[self._last[1]])
        each = [losses.squared_error(seen.states[own], wanted.states[its]) for own, its in self._pairs]
        return sum(each[1:], each[0]) / len(each)
