"""What one user sends and how the answer is read: the same seam for encoders and for generators."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Protocol

from loadtest.requests.connection import Connection
from loadtest.requests.connection import Protocol as Transport
from loadtest.requests.interface import Interface, RequestError, interface_from_metadata
from loadtest.requests.prompts import StreamLoad, draw_prompt
from loadtest.requests.streaming import StreamConnection, require_generator, streams_text


@dataclass(frozen=True)
class Orders:
    """What the users of a process do."""

    model: str
    addresses: dict[Transport, str]  # users take these in turn
    texts: tuple[str, ...]
    texts_per_request: int
    stream: StreamLoad  # read where the model is a generator
    rate_per_user: float | None  # requests a second that a user starts; None: it waits for each answer
    seed: int
    request_timeout_s: float
    key: str | None = None  # of a gateway that asks for one


@dataclass(frozen=True)
class Outcome:
    """One request's end. `context` is what the trace keeps beside the latency."""

    context: dict[str, Any] = field(default_factory=dict)
    bytes: int = 0
    error: RequestError | None = None


class LoadClient(Protocol):
    def ask(self, dice: random.Random, due: float) -> Outcome:
        """One request, whose clock runs from `due`, a moment of time.perf_counter."""
        ...

    def close(self) -> None: ...


class EncoderClient:
    """Texts in, vectors out."""

    def __init__(self, connection: Connection, interface: Interface, orders: Orders) -> None:
        self._connection, self._interface, self._orders = connection, interface, orders

    def ask(self, dice: random.Random, due: float) -> Outcome:
        orders, columns = self._orders, len(self._interface.inputs)
        rows = [dice.choices(orders.texts, k=columns) for _ in range(orders.texts_per_request)]
        try:
            answer = self._connection.ask(orders.model, self._interface, rows)
        except RequestError as error:
            return Outcome(error=error)
        counts = {"texts": len(rows), "tokens": answer.tokens, "truncated": answer.truncated}
        return Outcome(counts, answer.bytes)

    def close(self) -> None:
        self._connection.close()


class GeneratorClient:
    """A prompt in, a stream of tokens out."""

    def __init__(self, connection: StreamConnection, orders: Orders) -> None:
        self._connection, self._orders = connection, orders

    def ask(self, dice: random.Random, due: float) -> Outcome:
        prompt = draw_prompt(dice, self._orders.texts, self._orders.stream)
        stream = self._connection.ask(self._orders.model, prompt, due)
        return Outcome({"stream": stream}, error=stream.error)

    def close(self) -> None:
        self._connection.close()


def open_client(orders: Orders, transport: Transport, parallel: int) -> LoadClient:
    """Asks the model what it is. `parallel`: most requests under way at once.

    Raises RequestError, and LoadInputError for a model of neither kind.
    """
    address = orders.addresses[transport]
    connection = Connection(transport, address, orders.request_timeout_s, parallel, orders.key)
    try:
        metadata = connection.metadata(orders.model)
        if not streams_text(metadata):
            return EncoderClient(connection, interface_from_metadata(metadata), orders)
        require_generator(metadata, transport)
    except BaseException:
        connection.close()
        raise
    connection.close()
    return GeneratorClient(StreamConnection(address, orders.request_timeout_s, orders.key), orders)
