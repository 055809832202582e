"""The loop of generation, and the thread-safe front before it.

One thread calls `run` (or `step`); any thread calls `submit`, `cancel` and `gauges`. What the steps bring is
fetched with `take_updates` by whoever delivers it.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
import traceback
from collections.abc import Callable
from collections.abc import Sequence as Collection

from runtime.cuda import DeviceLost
from runtime.errors import ServerFault, ServingError, Unavailable
from runtime.generation.detokenizer import Decoder, Detokenizer
from runtime.generation.executor import Logits, StepExecutor
from runtime.generation.metrics import Counters, Gauges
from runtime.generation.request import Limits, Request, SamplingParams, Tokens, Update
from runtime.generation.sampler import sample
from runtime.generation.scheduler import Plan, Scheduler, Work
from runtime.generation.sequence import Sequence

_IDLE_SECONDS = 0.2


class Engine:
    """Requests in, updates out. `decoder` turns tokens into text; without one, updates hold tokens alone."""

    def __init__(
        self,
        executor: StepExecutor,
        scheduler: Scheduler,
        limits: Limits,
        decoder: Decoder | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.executor, self.scheduler, self.limits, self.clock = executor, scheduler, limits, clock
        self.counters = Counters()
        self._outbox: queue.SimpleQueue[list[Update]] = queue.SimpleQueue()
        self._decoder = decoder
        self._inbox: queue.SimpleQueue[Sequence | int] = queue.SimpleQueue()  # an int cancels that request
        self._ids = itertools.count(1)

    def submit(
        self, prompt: Tokens, params: SamplingParams, *, timeout_s: float | None = None, probe: bool = False
    ) -> int:
        """The request's number. Raises BadRequest; that the queue is full comes as an update."""
        now = self.clock()
        request = Request(next(self._ids), prompt, params, None if timeout_s is None else now + timeout_s, probe)
        detokenizer = None if self._decoder is None else Detokenizer(self._decoder, params.stop)
        self._inbox.put(Sequence.start(request, self.limits, detokenizer, now))
        return request.id

    def cancel(self, request: int) -> None:
        """Its last update says `cancelled`, unless it ended before."""
        self._inbox.put(request)

    def take_updates(self, *, wait_s: float = 0.0) -> list[Update]:
        """What has come and was not taken yet; waits at most `wait_s` for the first."""
        updates: list[Update] = []
        try:
            updates += self._outbox.get(timeout=wait_s) if wait_s else self._outbox.get_nowait()
            while True:
                updates += self._outbox.get_nowait()
        except queue.Empty:
            return updates

    def run(self, stopped: threading.Event) -> None:
        """Steps until `stopped`; sleeps while there is nothing to do."""
        while not stopped.is_set():
            if not self.step():
                try:
                    self._inbox.put(self._inbox.get(timeout=_IDLE_SECONDS))
                except queue.Empty:
                    if self.executor.lost():  # nobody waits: the next request need not learn of it
                        self._recover(ServerFault("the executor was lost while idle"))

    def step(self) -> bool:
        """One token for every running stream and one budget of prompts; False when there was nothing to do."""
        began = self.clock()
        updates = self._receive()
        plan = self.scheduler.plan(began)
        updates += [_failed(late, Unavailable("the request's time ran out")) for late in plan.expired]
        if plan.work:
            try:
                logits = self._execute(plan)
            except Exception as error:  # noqa: BLE001 - whatever broke, the streams must hear of it and others go on
                self._outbox.put(updates)
                updates = []
                self._recover(error)
            else:
                for work, rows in zip(plan.work, logits, strict=True):
                    updates += self._advance(work, rows)
            self.counters.steps += 1
            self.counters.step_seconds += self.clock() - began
        if updates:
            self._outbox.put(updates)
        return bool(plan.work or updates)

    def _receive(self) -> list[Update]:
        updates: list[Update] = []
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return updates
            if isinstance(message, Sequence):
                try:
                    self.scheduler.add(message)
                except Unavailable as error:
                    updates.append(_failed(message, error))
                continue
            sequence = self.scheduler.find(message)
            if sequence is not None:
                self.scheduler.remove(sequence)
                updates.append(Update(message, finish="cancelled"))

    def _execute(self, plan: Plan) -> list[Logits]:
        began = self.clock()
        self.executor.copy(plan.copies)
        for row, source in plan.encodes:
            self.executor.encode(row, source)
        logits = self.executor.run([work.batch for work in plan.work])
        self.counters.executor_seconds += self.clock() - began
        return logits

    def _advance(self, work: Work, logits: Logits) -> list[Update]:
        """Books what the batch computed, and gives each of its sequences its next token."""
        self.scheduler.done(work)
        if not work.last:
            return []
        now = self.clock()
        tokens, logprobs = sample(logits, work.sequences)
        self.counters.sample_seconds += self.clock() - now
        return [
            self._append(sequence, token, logprob, now)
            for sequence, token, logprob in zip(work.sequences, tokens, logprobs, strict=True)
        ]

    def _append(self, sequence: Sequence, token: int, logprob: float, now: float) -> Update:
        if token < 0:
            self.scheduler.remove(sequence, keep=False)
            return _failed(sequence, ServerFault("the model gave logits that are not numbers"))
        self._count(sequence, now)
        text, finish, shown = sequence.append(token)
        if finish is not None:
            self.scheduler.remove(sequence)
        return Update(
            request=sequence.request.id,
            tokens=(token,) if shown else (),
            text=text,
            logprobs=(logprob,) if shown and sequence.request.params.logprobs else (),
            finish=finish,
        )

    def _count(self, sequence: Sequence, now: float) -> None:
        if sequence.request.probe:
            return
        counters = self.counters
        counters.output_tokens += 1
        if sequence.last_token_at is None:
            counters.requests += 1
            counters.prompt_tokens += len(sequence.request.prompt)
            counters.reused_tokens = self.scheduler.reused_tokens
            counters.ttft.add(now - sequence.arrived)
        else:
            counters.itl.add(now - sequence.last_token_at)
        sequence.last_token_at = now

    def _recover(self, error: Exception) -> None:
        """All caches are taken for lost: running requests end, waiting ones go on with a fresh executor."""
        traceback.print_exception(error)
        reason = str(error) if isinstance(error, ServingError) else "the executor failed; the server log has the cause"
        ended = [_failed(item, Unavailable(f"{reason}; send the request again")) for item in self.scheduler.clear()]
        if ended:
            self._outbox.put(ended)  # before the reset, which may take seconds
        try:
            self.executor.reset()
        except ServerFault as again:
            # The next step fails on the same executor and comes back here: waiting requests end one batch at a time.
            traceback.print_exception(again)
            if isinstance(again, DeviceLost):
                # The process ends with its step thread, and the supervisor loads the model again.
                refused = self._receive()
                ended = [
                    _failed(item, Unavailable(f"{reason}; send the request again")) for item in self.scheduler.waiting
                ]
                self._outbox.put([*refused, *ended])
                raise

    def gauges(self) -> Gauges:
        scheduler, cache = self.scheduler, self.scheduler.cache
        tokens = cache.running_tokens
        return Gauges(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            slots=cache.slots,
            kept=cache.kept,
            cache_tokens=tokens,
            cache_use=tokens / (cache.slots * cache.capacities[-1]),
        )


def _failed(sequence: Sequence, error: ServingError) -> Update:
    return Update(sequence.request.id, finish="error", error=error)


def generate(engine: Engine, prompts: Collection[Tokens], params: SamplingParams) -> list[list[int]]:
    """All prompts at once, to their end, on this thread. For tests, checks and benchmarks. Raises what ended one."""
    order = [engine.submit(prompt, params) for prompt in prompts]
    outputs: dict[int, list[int]] = {request: [] for request in order}
    while engine.step():
        for update in engine.take_updates():
            if update.error is not None:
                raise update.error
            outputs[update.request] += update.tokens
    return [outputs[request] for request in order]
