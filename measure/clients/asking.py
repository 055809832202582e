"""What is asked and what is known of the answers, for clients in an environment of their own: nothing but Python's own.

A client's module has `CLIENT`, the name of its distribution, and `asks(served)`: what is asked by its name, each a
function that raises where the answer is not what it must be.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HELLO, WELCOME, BRIEF = "Say hello.", "Hello, and welcome to this place.", "Be brief."
QUESTION = "What is the weather in Rome?"
QUESTION_OF_TWO = "What is the weather in Rome and in Oslo?"
CITIES = ("Rome", "Oslo")
CALLED, ANSWER = "sunny", "It is sunny there today."
STORY = "Open the file, read every line of it, count the words, and close the file again."
STORY_BEGINS = "Open the file, read"
SOUGHT = "How is a file opened?"
DOCUMENTS = ["Bread is baked in an oven.", "A file is opened for reading.", "The sea is salt."]
TOOL: dict[str, Any] = {
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "Where."}},
        "required": ["city"],
    },
}
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
Asks = Mapping[str, Callable[[], None]]


class Wrong(Exception):
    """An answer that is not what it must be."""


@dataclass(frozen=True)
class ServedPair:
    """The two services that clients ask, and what their models give by themselves.

    text, text_grpc          of the language model `talker`
    vectors, vectors_grpc    of the encoder `minilm`
    key                      of both
    embedded                 texts with their vectors, by the fp32 graph
    likelihoods              by transformers: [context, continuation, its log-probability, whether it is the likeliest]
    greedy                   what transformers' own `generate` adds to a prompt: [prompt, text, tokens]
    folder                   the checkpoint, for clients that count tokens themselves
    """

    text: str
    text_grpc: str
    vectors: str
    vectors_grpc: str
    key: str
    folder: str
    embedded: list[tuple[str, list[float]]]
    likelihoods: list[tuple[str, str, float, bool]]
    greedy: list[tuple[str, str, int]]

    @classmethod
    def read(cls, file: Path) -> ServedPair:
        return cls(**json.loads(file.read_text()))

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))


def require(condition: object, said: object) -> None:
    if not condition:
        raise Wrong(str(said)[:600])


def same(got: object, expected: object) -> None:
    require(got == expected, f"got {got!r}, expected {expected!r}")


def near(got: list[float], expected: list[float]) -> None:
    """Two vectors of length 1."""
    same(len(got), len(expected))
    cosine = sum(a * b for a, b in zip(got, expected, strict=True))
    require(cosine > 0.99, f"cosine {cosine:.4f}")


def raised(kind: type[Exception] | tuple[type[Exception], ...], said: str, ask: Callable[[], object]) -> None:
    """The error's class, and a word of it."""
    try:
        ask()
    except kind as error:
        require(said in str(error), f"{type(error).__name__} says {error}, without {said!r}")
        return
    except Exception as error:
        raise Wrong(f"{type(error).__name__} instead of {kind}: {error}") from error
    raise Wrong(f"nothing was raised; expected {kind}")
