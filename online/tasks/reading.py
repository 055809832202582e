"""Which feedback teaches which task, and the words that a person reads about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

LearntTask = Literal["generation", "embedding", "classification"]


@dataclass(frozen=True)
class TaskWords:
    """`kinds` of feedback that it learns from; `rows` of `window` tokens; `loss`: what the perplexity is of."""

    model: str
    kinds: tuple[str, ...]
    rows: str
    loss: str
    rate: float  # the highest learning rate, where a spec names none


WORDS: dict[LearntTask, TaskWords] = {
    "generation": TaskWords(
        "a language model", ("correction", "pair", "rating"), "rows of {window} tokens", "the next token", 0.0015
    ),
    "embedding": TaskWords(
        "an embedding model", ("pair",), "pairs", "the right text among those of the hold-out", 3e-5
    ),
    "classification": TaskWords("a classifier", ("label",), "labelled texts", "the right label", 3e-5),
}  # fmt: skip


def unread_kind(task: LearntTask, kind: str) -> str | None:
    """Why a task learns nothing from a kind of feedback; None where it does."""
    words = WORDS[task]
    if kind in words.kinds:
        return None
    return f"a {kind} says nothing to {words.model}, which learns from {', '.join(words.kinds)}"


def refused_line(task: LearntTask, sample: Mapping[str, Any], prompt: str | None, named: bool) -> str | None:
    """Why a line of a file could never teach this task anything; `named`: it names a request, whose texts may be kept
    elsewhere."""
    if (why := unread_kind(task, sample["kind"])) is not None:
        return why
    if task == "classification" and not (prompt or "").strip() and not named:
        return "a label needs the text that it is of, as `prompt`"
    return None
