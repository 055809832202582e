"""One kind of Locust user: sends texts to a model and checks the answers. Imported by the locustfile only.

Closed loop: a user waits for its answer before it asks again, so the load is the number of users. Open loop: a user
starts requests at random moments, at a given mean rate (a Poisson process), and waits for none; many users together
are again such a process. The clock of a request then runs from the moment at which it was due, so a server or a load
generator that falls behind shows in the figures instead of thinning the load (coordinated omission).
"""

from __future__ import annotations

import itertools
import time
from typing import Any, ClassVar

import gevent
from gevent.pool import Pool
from locust import User

from loadtest.errors import LoadInputError
from loadtest.requests.clients import LoadClient, Orders, Outcome, open_client
from loadtest.requests.interface import RequestError
from loadtest.requests.texts import dice_of_user

SPREAD_S = 0.5  # users that all begin at once would be batched together for longer than the warm-up
PAUSE_AFTER_FAILURE_S = 0.1  # a refused connection fails in microseconds, and would drown every other figure
LOOK_S = 0.5  # a user that waits for its next request looks this often whether it should end
MOST_UNDER_WAY = 512  # of one user, in the open loop: beyond it, requests fail as NOT_SENT

_numbers = itertools.count()  # of users in this process


class TritonUser(User):  # type: ignore[misc]  # locust is untyped here
    """Fires Locust's `request` event; `context` carries what the trace needs beyond latency."""

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        number = next(_numbers)
        self.orders: Orders = environment.orders
        self.dice = dice_of_user(self.orders.seed, environment.runner.worker_index, number)
        protocols = sorted(self.orders.addresses)
        self.protocol = protocols[number % len(protocols)]
        self.client: LoadClient | None = None
        self.asks = False  # it has started its first request
        self.under_way = Pool()

    def on_start(self) -> None:
        gevent.sleep(self.dice.uniform(0, SPREAD_S))
        self.due = time.perf_counter() + self._pause_s()

    def on_stop(self) -> None:
        self.under_way.join(self.orders.request_timeout_s)
        if self.client is not None:
            self.client.close()

    def run_once(self) -> None:
        if self.orders.rate_per_user is not None:
            self._arrive()
        elif self._ask().error is not None:
            gevent.sleep(PAUSE_AFTER_FAILURE_S)

    def _ask(self) -> Outcome:
        """Asking for the metadata comes before the first request and is not timed; its failure is a failed request."""
        fault, due = self._connect(), time.perf_counter()
        started_at = self._start(due)
        return self._request(due, started_at) if fault is None else self._tell(due, started_at, fault)

    def _arrive(self) -> None:
        """Starts the next request when it is due, or returns soon. Late or not, every one that is due is started."""
        wait_s = self.due - time.perf_counter()
        gevent.sleep(min(max(0.0, wait_s), LOOK_S))
        if wait_s > LOOK_S:
            return
        due, self.due = self.due, self.due + self._pause_s()
        started_at, fault = self._start(due), self._connect()
        if fault is None and len(self.under_way) >= MOST_UNDER_WAY:
            message = f"{MOST_UNDER_WAY} requests of one user are under way; use more users, or a lower rate"
            fault = Outcome(error=RequestError("NOT_SENT", message))
        if fault is None:
            self.under_way.spawn(self._request, due, started_at).link_exception(self._report_fault)
        else:
            self._tell(due, started_at, fault)

    def _pause_s(self) -> float:
        rate = self.orders.rate_per_user
        return 0.0 if rate is None else self.dice.expovariate(rate)

    def _connect(self) -> Outcome | None:
        """What went wrong; None when there is a connection."""
        try:
            if self.client is None:
                parallel = 1 if self.orders.rate_per_user is None else MOST_UNDER_WAY
                self.client = open_client(self.orders, self.protocol, parallel)
        except RequestError as error:
            return Outcome(error=error)
        except LoadInputError as error:  # the model became another since it was probed
            return Outcome(error=RequestError("CLIENT_ERROR", str(error)))
        return None

    def _start(self, due: float) -> float:
        """When the request was due, in seconds since the epoch; noted now, so that one that never ends is known."""
        self.asks = True
        started_at = time.time() - (time.perf_counter() - due)
        self.environment.trace.started(self.protocol, started_at)
        return started_at

    def _request(self, due: float, started_at: float) -> Outcome:
        assert self.client is not None
        return self._tell(due, started_at, self.client.ask(self.dice, due))

    def _tell(self, due: float, started_at: float, outcome: Outcome) -> Outcome:
        elapsed_s = time.perf_counter() - due
        self.environment.events.request.fire(
            request_type=self.protocol,
            name=self.orders.model,
            response_time=elapsed_s * 1000,
            response_length=outcome.bytes,
            exception=outcome.error,
            context=outcome.context,
            start_time=started_at,
        )
        return outcome

    def _report_fault(self, greenlet: Any) -> None:
        """As Locust does for what a task raises."""
        self.environment.events.user_error.fire(user_instance=self, exception=greenlet.exception, tb=None)

    tasks: ClassVar[list[Any]] = [run_once]
