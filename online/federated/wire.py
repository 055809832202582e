"""What coordinator and clients say to each other: JSON, and tensors as safetensors in pieces. Nothing is pickled.

Join  JoinHello -> Welcome
Pull  Ask -> Task, and where it is a round the bytes of its weights
Push  Pushed, then the bytes of the update -> PushTaken
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError

from online.federated.rounds import UpdateAnswer
from online.learner.recipe import UpdateRecipe
from runtime.record import Record

PROTOCOL = 1
SERVICE = "trireme.federated.v1.Rounds"
PIECE = 512 << 10  # bytes of a message
LARGEST_MESSAGE = 1 << 20
HEADER_ROOM = 1 << 20  # of a safetensors file, beside its numbers
POLL_S = 10.0  # a client that waits for a round asks again
OPTIONS = (
    ("grpc.max_receive_message_length", LARGEST_MESSAGE),
    ("grpc.max_send_message_length", LARGEST_MESSAGE),
    ("grpc.per_message_decompression", 0),  # 400 MB may hide in a few hundred kB
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


class JoinHello(Record):
    """`architecture`: a digest of configuration, tokenizer, and names and shapes of tensors. `samples`: rows that the
    client learns from."""

    protocol: int = PROTOCOL
    architecture: str = Field(max_length=64)
    window: int = Field(ge=1)
    samples: int


class Welcome(Record):
    """`client`: the name in its certificate. `key`: of the update that the rounds make."""

    client: str
    session: str
    key: str
    recipe: UpdateRecipe
    rounds: int = Field(ge=1)
    local_steps: int = Field(ge=1)
    prox: float = Field(ge=0)
    shared: bool  # moments


class Ask(Record):
    session: str = Field(max_length=64)


class Task(Record):
    """`size`: bytes of the weights that follow."""

    kind: Literal["round", "wait", "done"]
    number: int = 0
    attempt: int = 0
    size: int = Field(default=0, ge=0)


class Pushed(Record):
    """`loss`: mean while it learnt; `held_out`: of the weights that it got, on rows of its own. `failed`: why there is
    no update."""

    session: str = Field(max_length=64)
    number: int
    attempt: int
    samples: int
    loss: float | None = None
    held_out: float | None = None
    failed: str | None = Field(default=None, max_length=500)


class PushTaken(Record):
    answer: UpdateAnswer
    why: str = ""


R = TypeVar("R", bound=Record)


class NotOurs(ValueError):
    """A message that this protocol does not know."""


def read(kind: type[R], message: bytes) -> R:
    """Raises NotOurs."""
    try:
        return kind.model_validate_json(message)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        raise NotOurs(f"{kind.__name__}: {'.'.join(map(str, fault['loc'])) or 'message'}: {fault['msg']}") from error


def said(message: Record) -> bytes:
    return message.model_dump_json().encode()


def pieces(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while piece := stream.read(PIECE):
            yield piece


def receive(parts: Iterable[bytes], file: Path, most: int) -> int:
    """Writes what comes; returns its bytes. Raises NotOurs as soon as there is more than `most`."""
    size = 0
    with file.open("wb") as stream:
        for part in parts:
            size += len(part)
            if size > most:
                raise NotOurs(f"more than {most} bytes")
            stream.write(part)
    return size
