"""The loop of generation, and the thread-safe front before it.

One thread calls `run` (or `step`); any thread calls `submit`, `cancel` and `gauges`. What the steps bring is
fetched with `take_updates` by whoever delivers it. Every request gets one last update, whatever happens:

a fault of one request (its sampling, its text)     ends that request
a fault of the executor, or in its lazy logits      ends all that run; waiting ones go on with a fresh executor
a fresh executor that does not come                 requests are refused until it does (see `recovery`)
too many faults in a row, a device that is lost,    ends all and the loop: the process ends with it, and the supervisor
or a fault of the loop itself                       loads the model again
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from runtime.errors import BadRequest, ServerFault, ServingError, TooLate, Unavailable
from runtime.generation.detokenizer import Decoder
from runtime.generation.guides import Guide
from runtime.generation.metrics import Counters, Gauges
from runtime.generation.recovery import Recovery
from runtime.generation.request import Limits, Request, SamplingParams, ScoredToken, Tokens, Top, Update
from runtime.generation.sampler import sample, score_prompt
from runtime.generation.scheduler import Scheduler, StepPlan, Work
from runtime.generation.sequence import TokenSequence
from runtime.step import Logits, StepExecutor

_IDLE_SECONDS = 0.2

Sampler = Callable[[Logits, Sequence[TokenSequence]], tuple[list[int], list[float], list[Top]]]
Choice = tuple[int, float, Top]  # a token, its log-probability, the likeliest ones


class GenerationEngine:
    """Requests in, updates out. `decoder` turns tokens into text; without one, updates hold tokens alone."""

    def __init__(
        self,
        executor: StepExecutor,
        scheduler: Scheduler,
        limits: Limits,
        decoder: Decoder | None = None,
        clock: Callable[[], float] = time.monotonic,
        sampler: Sampler = sample,
    ) -> None:
        self.executor, self.scheduler, self.limits, self.clock = executor, scheduler, limits, clock
        self.counters = Counters()
        self._outbox: queue.SimpleQueue[list[Update]] = queue.SimpleQueue()
        self._decoder, self._sampler = decoder, sampler
        self._recovery = Recovery(executor, clock)
        self._arrived = threading.Condition()  # guards the next two
        self._inbox: deque[TokenSequence | int] = deque()  # an int cancels that request
        self._refusal: str | None = None  # why nothing is taken in
        self._ids = itertools.count(1)

    def submit(
        self,
        prompt: Tokens,
        params: SamplingParams,
        *,
        timeout_s: float | None = None,
        probe: bool = False,
        guide: Guide | None = None,
    ) -> int:
        """The request's number. `guide` is this request's alone. Raises BadRequest; that the queue is full comes as an
        update."""
        now = self.clock()
        request = Request(next(self._ids), prompt, params, None if timeout_s is None else now + timeout_s, probe)
        sequence = TokenSequence.start(request, self.limits, self._decoder, now, guide)
        with self._arrived:
            refusal = self._refusal
            if refusal is None:
                self._inbox.append(sequence)
                self._arrived.notify()
        if refusal is not None:
            self._outbox.put([_failed(sequence, Unavailable(refusal))])
        return request.id

    def cancel(self, request: int) -> None:
        """Its last update says `cancelled`, unless it ended before."""
        with self._arrived:
            self._inbox.append(request)
            self._arrived.notify()

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
        """Steps until `stopped`; sleeps while there is nothing to do. Whatever it raises, every request has ended."""
        with self._last_words():
            while not stopped.is_set():
                if not self._step() and not self._wait() and self._recovery.lost():
                    self._recover(ServerFault("the executor was lost while idle"))  # the next request need not learn it

    def step(self) -> bool:
        """One token for every running stream and one budget of prompts; False when there was nothing to do. Whatever
        it raises, every request has ended.
        """
        with self._last_words():
            return self._step()

    def _step(self) -> bool:
        began = self.clock()
        received = self._receive()
        if received:
            self._outbox.put(received)
        if self._recovery.pending:
            return self._reset() if self._recovery.due() else False
        plan = self.scheduler.plan(began)
        updates = [_failed(late, TooLate("the request's time ran out")) for late in plan.expired]
        if plan.work:
            try:
                self._carry_out(plan, updates)
            except Exception as error:  # noqa: BLE001 - whatever broke, the streams must hear of it and others go on
                self._outbox.put(updates)
                self._recover(error)
                return True
            self._recovery.worked()
            self.counters.steps += 1
            self.counters.step_seconds += self.clock() - began
        if updates:
            self._outbox.put(updates)
        return bool(plan.work or updates or received)

    def _wait(self) -> bool:
        """Whether something has arrived, within a moment."""
        with self._arrived:
            return self._arrived.wait_for(lambda: bool(self._inbox), _IDLE_SECONDS)

    def _receive(self) -> list[Update]:
        with self._arrived:
            messages = list(self._inbox)
            self._inbox.clear()
        updates: list[Update] = []
        for message in messages:
            if isinstance(message, TokenSequence):
                try:
                    self.scheduler.add(message)
                except Unavailable as error:
                    updates.append(_failed(message, error))
                continue
            sequence = self.scheduler.find(message)
            if sequence is not None:
                self.scheduler.remove(sequence)
                updates.append(Update(message, finish="cancelled"))
        return updates

    def _carry_out(self, plan: StepPlan, updates: list[Update]) -> None:
        """Adds to `updates` what the plan brings. Whatever it raises is a fault of the executor."""
        logits = self._execute(plan)
        self.scheduler.done(plan)
        for work, rows in zip(plan.work, logits, strict=True):
            if len(work.sequences) == 1 and work.sequences[0].scored and not self._tell_prompt(work, rows, updates):
                continue
            if work.last:
                self._advance(work, rows[-1:] if work.batch.every else rows, updates)

    def _execute(self, plan: StepPlan) -> list[Logits]:
        began = self.clock()
        self.executor.copy(plan.copies)
        for row, source in plan.encodes:
            self.executor.encode(row, source)
        logits = self.executor.run([work.batch for work in plan.work])
        self.counters.executor_seconds += self.clock() - began
        return logits

    def _advance(self, work: Work, logits: Logits, updates: list[Update]) -> None:
        """Gives each sequence of the batch its next token; a fault in that ends the sequence alone."""
        now = self.clock()
        chosen = self._choose(logits, work.sequences)
        self.counters.sample_seconds += self.clock() - now
        for sequence, choice in zip(work.sequences, chosen, strict=True):
            try:
                if isinstance(choice, Exception):
                    raise choice
                updates.append(self._append(sequence, *choice, now))
            except Exception as error:  # noqa: BLE001 - its text cannot be made, say: the others' can
                updates.append(self._end_alone(sequence, error))

    def _end_alone(self, sequence: TokenSequence, error: Exception) -> Update:
        """A fault that is one request's: its caller's, who is told, or ours."""
        self.scheduler.remove(sequence, keep=False)
        if isinstance(error, BadRequest):
            return _failed(sequence, error)
        traceback.print_exception(error)
        return _failed(sequence, ServerFault("the request failed; the server log has the cause"))

    def _tell_prompt(self, work: Work, logits: Logits, updates: list[Update]) -> bool:
        """Scores the tokens of a prompt that follow those of the chunk. Whether the request goes on."""
        sequence = work.sequences[0]
        if sequence.generated:
            return True
        begin, ended = int(work.batch.write_indices[0]), work.last and not sequence.room
        tokens = sequence.buffer[begin + 1 : min(begin + work.batch.input_ids.shape[1] + 1, sequence.prompt_length)]
        try:
            scored = score_prompt(logits, tokens, sequence.request.params.top_logprobs)
        except ServerFault:
            raise
        except Exception as error:  # noqa: BLE001 - ends the request alone
            updates.append(self._end_alone(sequence, error))
            return False
        if not begin:
            scored = (ScoredToken(int(sequence.buffer[0]), None, ()), *scored)
        if scored or ended:
            updates.append(sequence.told(scored, ended=ended))
        if ended:
            self._count(sequence, self.clock(), tokens=0)
            self.scheduler.remove(sequence)
        return not ended

    def _choose(self, logits: Logits, sequences: Sequence[TokenSequence]) -> list[Choice | Exception]:
        """Token and log-probability of each, or its fault. Raises ServerFault: lazy logits were lost with their device.

        A fault among many is looked for one by one, and each draws its random number again.
        """
        drawing = [sequence.random.bit_generator for sequence in sequences if sequence.request.params.temperature > 0]
        states = [generator.state for generator in drawing]
        try:
            return list(zip(*self._sampler(logits, sequences), strict=True))
        except ServerFault:
            raise
        except Exception as error:  # noqa: BLE001 - ends those that it comes from
            if len(sequences) == 1:
                return [error]
        for generator, state in zip(drawing, states, strict=True):
            generator.state = state
        return [self._choose(logits[at : at + 1], [one])[0] for at, one in enumerate(sequences)]

    def _append(self, sequence: TokenSequence, token: int, logprob: float, top: Top, now: float) -> Update:
        if token < 0:
            self.scheduler.remove(sequence, keep=False)
            return _failed(sequence, ServerFault("the model gave logits that are not numbers"))
        self._count(sequence, now)
        update = sequence.append(token, logprob, top)
        if update.finish is not None:
            self.scheduler.remove(sequence)
        return update

    def _count(self, sequence: TokenSequence, now: float, tokens: int = 1) -> None:
        if sequence.request.probe:
            return
        counters = self.counters
        counters.output_tokens += tokens
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
        self._reset()

    def _reset(self) -> bool:
        """Tries for a fresh executor; True, for that was something to do. Until there is one, requests are refused.

        Raises what only a new process mends.
        """
        refusal = self._recovery.reset()
        if refusal is None:
            with self._arrived:
                self._refusal = None
        else:
            self._turn_away(refusal)
        return True

    def _turn_away(self, refusal: str) -> None:
        """Ends who waits, and all who come from here on."""
        with self._arrived:
            self._refusal = refusal
            arrived = [message for message in self._inbox if isinstance(message, TokenSequence)]
            self._inbox.clear()
        ended = [_failed(item, Unavailable(refusal)) for item in (*self.scheduler.waiting, *arrived)]
        self.scheduler.waiting.clear()
        if ended:
            self._outbox.put(ended)

    @contextmanager
    def _last_words(self) -> Iterator[None]:
        """Who waits for an answer must not learn from silence that the loop has ended."""
        try:
            yield
        except BaseException as error:
            reason = str(error) if isinstance(error, ServingError) else "the generator failed; the server log says why"
            refusal = f"{reason}; the model is loaded again; send the request again"
            self.scheduler.waiting.extend(self.scheduler.clear())
            self._turn_away(refusal)
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
            recovering=int(self._recovery.under_way),
        )


def _failed(sequence: TokenSequence, error: ServingError) -> Update:
    return Update(sequence.request.id, finish="error", error=error)


def generate(engine: GenerationEngine, prompts: Sequence[Tokens], params: SamplingParams) -> list[list[int]]:
    """All prompts at once, to their end, on this thread. For tests, checks and benchmarks. Raises what ended one."""
    order = [engine.submit(prompt, params) for prompt in prompts]
    outputs: dict[int, list[int]] = {request: [] for request in order}
    while engine.step():
        for update in engine.take_updates():
            if update.error is not None:
                raise update.error
            outputs[update.request] += update.tokens
    return [outputs[request] for request in order]
