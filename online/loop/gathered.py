"""Feedback -> documents -> rows; a part of the documents is held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from builders.judging.corpus import Document
from builders.training import text
from online.gate.forgetting import FEWEST_ROWS
from online.tasks.task import LearningTask, Rows
from runtime.errors import InputError

# Once it is old, a half of a hold-out chooses how far the next update goes, and the other half judges it.
FEWEST_HELD_OUT = 2 * FEWEST_ROWS
MOST_HELD_OUT = 512  # rows of a domain: each later update is judged on all of them
MOST_SAMPLES = 20_000  # that one update learns from; the rest is the next one's


@dataclass(frozen=True)
class Gathered:
    """`unread`: samples that say nothing to the model, by why. `fed_to`: number of the last sample that was read."""

    documents: tuple[Document, ...]
    unread: Mapping[str, int]
    fed_to: int
    numbers: tuple[int, ...] = ()  # of the documents' samples

    def after(self, number: int) -> list[Document]:
        """Of samples that came after this one."""
        return [item for item, place in zip(self.documents, self.numbers, strict=True) if place > number]


def gather(
    samples: Iterable[tuple[int, dict[str, Any]]], after: int, min_rating: float, task: LearningTask,
    most: int = MOST_SAMPLES,
) -> Gathered:  # fmt: skip
    """Of what `FeedbackStore.read` gives from `after` on. What says nothing counts for nothing: however much of it
    there is, what comes after is read."""
    documents, numbers, unread, last = list[Document](), list[int](), Counter[str](), after
    for number, sample in samples:
        if len(documents) == most:
            break
        found, last = task.read(sample, min_rating), number
        if isinstance(found, str):
            unread[found] += 1
        else:
            documents.append(found)
            numbers.append(number)
    return Gathered(tuple(documents), dict(unread), last, tuple(numbers))


def unread_text(unread: Mapping[str, int]) -> str:
    """Empty where all was read."""
    return ", ".join(f"{count} x {why}" for why, count in unread.items())


def split_rows(documents: Sequence[Document], held_out_share: float, task: LearningTask) -> tuple[Rows, Rows]:
    """To learn from, and held out. A document's name decides where it goes."""
    learnt, held_out = text.split(documents, held_out_share)
    return task.rows(learnt), thinned(task.rows(held_out), MOST_HELD_OUT)


def thinned(rows: Rows, most: int) -> Rows:
    """At most so many, evenly, in their order."""
    if len(rows) <= most:
        return rows
    found: Rows = rows[np.linspace(0, len(rows) - 1, most).astype(int)]
    return found


def lacking(learnt: Rows, held_out: Rows, batch: int, noun: str) -> str | None:
    """What there is too little of for an update, in words."""
    if len(held_out) < FEWEST_HELD_OUT:
        return f"{len(held_out)} {noun} held out; {FEWEST_HELD_OUT} bound something"
    if len(learnt) < batch:
        return f"{len(learnt)} {noun} to learn from; a batch has {batch}"
    return None


def require_enough(learnt: Rows, held_out: Rows, batch: int, what: str, noun: str) -> None:
    if why := lacking(learnt, held_out, batch, noun):
        raise InputError(
            what, got=why, expected="enough to learn from, and to hold out", fix="give more of them in online.old_texts"
        )
