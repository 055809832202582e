"""What users ask a generator: drawn texts, lengths, and who leaves early. Pure."""

from __future__ import annotations

import heapq
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, model_validator

from loadtest.errors import LoadInputError
from runtime.record import Record

CANDIDATES = 2  # by each measure
LETTERS_A_PIECE = 6

Positive = Annotated[int, Field(gt=0)]


class Lengths(Record):
    """Drawn uniformly from low to high, both included."""

    low: Positive
    high: Positive

    @model_validator(mode="after")
    def _ordered(self) -> Lengths:
        if self.low > self.high:
            raise ValueError(f"low={self.low} is over high={self.high}")
        return self

    def draw(self, dice: random.Random) -> int:
        return dice.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


class StreamLoad(Record):
    """The requests of a load on a generator."""

    prompt_words: Lengths | None = None  # None: each text as it is
    output_tokens: Lengths = Lengths(low=32, high=128)  # exactly that many: the end of a text is held off
    cancel_share: Annotated[float, Field(ge=0, le=1)] = 0.0  # of requests that their client leaves before the end

    def __str__(self) -> str:
        words = "whole texts" if self.prompt_words is None else f"{self.prompt_words} words"
        leaving = f", {self.cancel_share:.0%} leave early" if self.cancel_share else ""
        return f"{words} in, {self.output_tokens} tokens out{leaving}"


@dataclass(frozen=True)
class Prompt:
    """One request. `leave_after`: tokens after which the client hangs up; None: it stays.

    It is drawn from the first half: Triton 2.51 can crash when a client leaves a stream in the moment in which it ends.
    """

    text: str
    output_tokens: int
    leave_after: int | None = None


def parse_lengths(text: str, what: str) -> Lengths:
    """`64`, or `16-128`. Raises LoadInputError that names `what`."""
    match = re.fullmatch(r"(\d{1,7})(?:-(\d{1,7}))?", text.strip())
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 0 < low <= high:
        raise LoadInputError(
            what, got=repr(text), expected="one length, or the least and the most", fix="write 64, or 16-128"
        )
    return Lengths(low=low, high=high)


def draw_prompt(dice: random.Random, texts: Sequence[str], load: StreamLoad) -> Prompt:
    text = dice.choice(texts)
    if load.prompt_words is not None:
        count, words = load.prompt_words.draw(dice), text.split()
        while len(words) < count:
            words += dice.choice(texts).split()
        text = " ".join(words[:count])
    tokens = load.output_tokens.draw(dice)
    leaves = dice.random() < load.cancel_share
    return Prompt(text, tokens, dice.randint(1, max(1, tokens // 2)) if leaves else None)


def longest_prompts(texts: Sequence[str], load: StreamLoad) -> tuple[Prompt, ...]:
    """About the largest requests that `draw_prompt` can give: a server that takes them takes the load.

    Which of them has the most tokens only the server's tokenizer knows, so these are the longest few by each of the
    measures that tokenizers go by.
    """
    long = list(texts)
    if load.prompt_words is not None:
        long = [_repeated(text.split(), load.prompt_words.high) for text in texts]
    few = dict.fromkeys(
        text
        for measure in (len, lambda text: len(text.encode()), _pieces)
        for text in heapq.nlargest(CANDIDATES, long, key=measure)
    )
    return tuple(Prompt(text, load.output_tokens.high) for text in few)


def _repeated(words: list[str], count: int) -> str:
    return " ".join((words * (count // len(words) + 1))[:count])


def _pieces(text: str) -> int:
    """About as many as a tokenizer makes: a few for a word, one for each digit, mark and character of other scripts."""
    words = re.findall(r"[A-Za-z]+|[^A-Za-z\s]", text)
    return sum(-(-len(word) // LETTERS_A_PIECE) for word in words)
