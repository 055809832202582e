"""Feedback -> documents -> rows of tokens; a part of the documents is held out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from builders.judging.corpus import Document
from builders.training import text
from builders.training.text import TokenIds
from online.gate.forgetting import FEWEST_ROWS
from runtime.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Once it is old, a half of a hold-out chooses how far the next update goes, and the other half judges it.
FEWEST_HELD_OUT = 2 * FEWEST_ROWS
MOST_HELD_OUT = 512  # rows of a domain: each later update is judged on all of them
_MOST_SAMPLES = 20_000  # of one update; the rest is the next one's


@dataclass(frozen=True)
class Gathered:
    """`documents` are named by their request's id and the kind of sample. `unread`: samples that say nothing to a
    language model. `fed_to`: number of the last sample that was read."""

    documents: tuple[Document, ...]
    unread: int
    fed_to: int
    numbers: tuple[int, ...] = ()  # of the documents' samples

    def after(self, number: int) -> list[Document]:
        """Of samples that came after this one."""
        return [item for item, place in zip(self.documents, self.numbers, strict=True) if place > number]


def gather(samples: Iterable[tuple[int, dict[str, Any]]], after: int, min_rating: float) -> Gathered:
    """Of what `FeedbackStore.read` gives from `after` on."""
    documents, numbers, unread, last = [], [], 0, after
    for number, sample in islice(samples, _MOST_SAMPLES):
        found, last = learnable(sample, min_rating), number
        if found is None:
            unread += 1
        else:
            documents.append(Document(f"{sample['request_id']} {sample['kind']}", (found,)))
            numbers.append(number)
    return Gathered(tuple(documents), unread, last, tuple(numbers))


def learnable(sample: dict[str, Any], min_rating: float) -> str | None:
    """What should have been said, after what was asked where that is kept. None for what a language model learns
    nothing from: labels, poor ratings, and ratings of texts that nobody kept."""
    prompt = sample.get("prompt") or ""
    if sample["kind"] == "correction":
        return str(prompt + sample["text"])
    if sample["kind"] == "pair":
        return f"{sample['query']}\n{sample['positive']}"
    if sample["kind"] == "rating" and sample["score"] >= min_rating and prompt and sample.get("answer"):
        return str(prompt + sample["answer"])
    return None


def rows_of(documents: Sequence[Document], tokenizer: Tokenizer, end: int, window: int) -> TokenIds:
    """[rows, window + 1] of all documents one after the other, each between ends of text."""
    return text.windows(text.to_tokens(tokenizer, documents, end), window)


def split_rows(
    documents: Sequence[Document], held_out_share: float, tokenizer: Tokenizer, end: int, window: int
) -> tuple[TokenIds, TokenIds]:
    """To learn from, and held out. A document's name decides where it goes."""
    learnt, held_out = text.split(documents, held_out_share)
    return rows_of(learnt, tokenizer, end, window), thinned(rows_of(held_out, tokenizer, end, window), MOST_HELD_OUT)


def thinned(rows: TokenIds, most: int) -> TokenIds:
    """At most so many, evenly, in their order."""
    if len(rows) <= most:
        return rows
    found: TokenIds = rows[np.linspace(0, len(rows) - 1, most).astype(int)]
    return found


def lacking(learnt: TokenIds, held_out: TokenIds, batch: int) -> str | None:
    """What there is too little of for an update, in words."""
    window = held_out.shape[1] - 1
    if len(held_out) < FEWEST_HELD_OUT:
        return f"{len(held_out)} rows of {window} tokens held out; {FEWEST_HELD_OUT} bound something"
    if len(learnt) < batch:
        return f"{len(learnt)} rows of {window} tokens to learn from; a batch has {batch}"
    return None


def require_enough(learnt: TokenIds, held_out: TokenIds, batch: int, what: str) -> None:
    if why := lacking(learnt, held_out, batch):
        raise InputError(
            what, got=why, expected="enough text to learn from, and to hold out",
            fix="give more text, or lower online.learner.window",
        )  # fmt: skip
