"""One kind of Locust user: sends texts to a model, checks the answer, sends the next. Imported by the locustfile only.

Users are a closed loop: each waits for its answer before it asks again, so the load is the number of users.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import gevent
from locust import User

from loadtest.connection import Connection, Protocol
from loadtest.interface import Interface, RequestError
from loadtest.texts import dice_of_user

SPREAD_S = 0.5  # users that all begin at once would be batched together for longer than the warm-up
PAUSE_AFTER_FAILURE_S = 0.1  # a refused connection fails in microseconds, and would drown every other figure

_numbers = itertools.count()  # of users in this process


@dataclass(frozen=True)
class Orders:
    """What the users of this process do."""

    model: str
    addresses: dict[Protocol, str]  # users take these in turn
    texts: tuple[str, ...]
    texts_per_request: int
    seed: int
    request_timeout_s: float


class TritonUser(User):  # type: ignore[misc]  # locust is untyped here
    """Fires Locust's `request` event; `context` carries what the trace needs beyond latency."""

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        number = next(_numbers)
        self.orders: Orders = environment.orders
        self.dice = dice_of_user(self.orders.seed, environment.runner.worker_index, number)
        protocols = sorted(self.orders.addresses)
        self.protocol = protocols[number % len(protocols)]
        self.connection = Connection(self.protocol, self.orders.addresses[self.protocol], self.orders.request_timeout_s)
        self.interface: Interface | None = None

    def on_start(self) -> None:
        gevent.sleep(self.dice.uniform(0, SPREAD_S))

    def on_stop(self) -> None:
        self.connection.close()

    def ask(self) -> None:
        """One request. Asking for the metadata is not timed, but its failure is a failed request."""
        started_at, started = time.time(), time.perf_counter()
        context: dict[str, int] = {}
        failure: RequestError | None = None
        size = 0
        try:
            if self.interface is None:
                self.interface = self.connection.interface(self.orders.model)
            rows = [
                self.dice.choices(self.orders.texts, k=len(self.interface.inputs))
                for _ in range(self.orders.texts_per_request)
            ]
            started_at, started = time.time(), time.perf_counter()
            answer = self.connection.ask(self.orders.model, self.interface, rows)
            context = {"texts": len(rows), "tokens": answer.tokens, "truncated": answer.truncated}
            size = answer.bytes
        except RequestError as error:
            failure = error
        self.environment.events.request.fire(
            request_type=self.protocol,
            name=self.orders.model,
            response_time=(time.perf_counter() - started) * 1000,
            response_length=size,
            exception=failure,
            context=context,
            start_time=started_at,
        )
        if failure is not None:
            gevent.sleep(PAUSE_AFTER_FAILURE_S)

    tasks: ClassVar[list[Any]] = [ask]
