"""Faults anywhere in a step, at random: every request ends once, and whom a fault does not touch gets every token."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.errors import BadEnvironment, ServerFault, Unavailable
from runtime.generation.engine import GenerationEngine, generate
from runtime.generation.opening import _limits
from runtime.generation.recovery import MOST_FAULTS
from runtime.generation.request import SamplingParams, Update
from runtime.generation.sampler import sample
from runtime.settings import GeneratorModelSettings
from runtime.step import Batch, Copy, Logits, Row, Tokens
from runtime.tensorrt.cuda import DeviceLost
from runtime.tensorrt.logits import DeviceLogits
from tests.generation.ledger import VOCABULARY, Ledger, continuation
from tests.generation.setup import SERVED, engine_over

CAPACITIES, SLOTS, START = (8, 16, 32), 5, 1
FAULTS = (ServerFault("a fault of a rank"), RuntimeError("a fault of a library"), MemoryError("no memory"))
Calls = dict[str, list[Exception]]  # what the next calls of that name raise


class Faulty(Ledger):
    """Fails where it is told to; its logits are lazy."""

    def __init__(self, calls: Calls, stages: int = 1, *, encoder: bool = False) -> None:
        self.calls = calls
        super().__init__(CAPACITIES, SLOTS + 2, stages, encoder=encoder)

    def _fault(self, name: str) -> None:
        if self.calls.get(name):
            raise self.calls[name].pop()

    def run(self, batches: Sequence[Batch]) -> list[Logits]:
        self._fault("run")
        return [self._lazy(logits) for logits in super().run(batches)]

    def _lazy(self, logits: Logits) -> Any:
        def fetch(rows: Sequence[int]) -> Logits:
            self._fault("fetch")
            return logits[list(rows)]

        top = np.stack([logits.max(axis=1), logits.argmax(axis=1).astype(np.float32)], axis=1)
        return DeviceLogits(top, VOCABULARY, fetch)

    def copy(self, copies: Sequence[Copy]) -> None:
        super().copy(copies)
        self._fault("copy")

    def encode(self, row: Row, source: Tokens) -> None:
        self._fault("encode")
        super().encode(row, source)

    def reset(self) -> None:
        self._fault("reset")
        super().reset()


class Letters:
    """A decoder with one letter a token, that cannot show some tokens."""

    unknown = -1

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        if self.unknown in list(ids):
            raise ValueError(f"no text for {self.unknown}")
        return "".join(chr(65 + token) for token in ids)


class Run:
    """An engine over a faulty executor, and what came of each request."""

    def __init__(self, stages: int = 1, *, encoder: bool = False) -> None:
        self.calls: Calls = {}
        self.now, self.broken_sampling, self.letters = 0.0, set[int](), Letters()
        self.executor = Faulty(self.calls, stages, encoder=encoder)
        self.encoder = encoder
        base = engine_over(self.executor, CAPACITIES, SLOTS, start=START if encoder else None)
        self.engine = GenerationEngine(
            base.executor, base.scheduler, base.limits, self.letters, clock=lambda: self.now, sampler=self._sample
        )
        self.asked: dict[int, tuple[list[int], SamplingParams]] = {}
        self.updates: dict[int, list[Update]] = {}

    def _sample(self, logits: Logits, sequences: Any) -> tuple[list[int], list[float]]:
        result = sample(logits, sequences)
        if any(sequence.request.id in self.broken_sampling for sequence in sequences):
            raise IndexError("a fault in sampling")
        return result

    def ask(self, prompt: list[int], count: int = 6, **params: Any) -> int:
        wanted = SamplingParams(max_tokens=count, **params)
        number = self.engine.submit(np.array(prompt, np.int64), wanted)
        self.asked[number], self.updates[number] = (prompt, wanted), []
        return number

    def step(self) -> bool:
        self.now += 1.0
        try:
            return self.engine.step()
        finally:
            for update in self.engine.take_updates():
                assert not self.ended(update.request), "an update after the last"
                self.updates[update.request].append(update)
            self.engine.scheduler.check_integrity()
            assert not self.executor.misused

    def finish(self) -> None:
        for _ in range(2000):
            if len([number for number in self.asked if self.ended(number)]) == len(self.asked):
                return
            self.step()
        raise AssertionError("some requests never end")

    def ended(self, number: int) -> bool:
        return any(update.finish for update in self.updates[number])

    def error(self, number: int) -> Exception | None:
        return self.updates[number][-1].error

    def tokens(self, number: int) -> list[int]:
        return [token for update in self.updates[number] for token in update.tokens]

    def require_right(self, number: int) -> None:
        """All tokens and their text where nothing failed, else no wrong ones."""
        prompt, params = self.asked[number]
        assert params.max_tokens is not None
        alone = continuation([START], params.max_tokens, prompt) if self.encoder else None
        alone = continuation(prompt, params.max_tokens) if alone is None else alone
        got = self.tokens(number)
        assert got == alone[: len(got)]
        if self.error(number) is None:
            assert got == alone
            assert "".join(u.text for u in self.updates[number]) == Letters().decode(got)


def test_a_fault_in_sampling_ends_that_request_alone() -> None:
    """The others draw the numbers that they would have drawn."""
    hot = {"temperature": 3.0, "top_k": 5}
    plain = Run()
    alone = [plain.ask([9, number], 8, seed=number, **hot) for number in range(SLOTS)]
    plain.finish()
    run = Run()
    numbers = [run.ask([9, number], 8, seed=number, **hot) for number in range(SLOTS)]
    for _ in range(3):
        run.step()
    run.broken_sampling.add(numbers[1])
    run.finish()
    assert type(run.error(numbers[1])) is ServerFault
    assert "the server log has the cause" in str(run.error(numbers[1]))
    rest = [at for at in range(SLOTS) if at != 1]
    assert [run.tokens(numbers[at]) for at in rest] == [plain.tokens(alone[at]) for at in rest]
    assert all(run.error(numbers[at]) is None for at in rest)


def test_text_that_cannot_be_made_ends_that_request_alone() -> None:
    run = Run()
    numbers = [run.ask([3 + number, 7]) for number in range(SLOTS)]
    shown = [continuation([3 + number, 7], 6) for number in range(SLOTS)]
    only = next(token for token in shown[2] if not any(token in other for at, other in enumerate(shown) if at != 2))
    run.letters.unknown = only
    run.finish()
    for at, number in enumerate(numbers):
        assert type(run.error(number)) is (ServerFault if at == 2 else type(None))
        run.require_right(number)


@pytest.mark.parametrize("fault", [KeyError("gone"), ServerFault("the device is lost")])
def test_lazy_logits_that_do_not_come(fault: Exception) -> None:
    """A ServerFault is the executor's; any other the request's that looked. Greedy ones look at none."""
    run = Run()
    greedy, looking = run.ask([4, 5], 12), run.ask([6, 7], 12, logprobs=True)
    run.step()
    run.calls["fetch"] = [fault] * 2
    run.step()
    lost = isinstance(fault, ServerFault)
    run.calls.clear()
    run.finish()
    assert type(run.error(looking)) is (Unavailable if lost else ServerFault)
    assert type(run.error(greedy)) is (Unavailable if lost else type(None))
    again = run.ask([6, 7], 3, logprobs=True)
    run.finish()
    assert run.error(again) is None


def test_requests_are_refused_until_a_reset_works() -> None:
    run = Run()
    run.ask([1, 2], 20)
    run.step()
    waiting = [run.ask([number], 2) for number in range(8)]
    run.calls.update(run=[RuntimeError("a fault")], reset=[OSError("no processes")] * 2)
    during, real = list[int](), run.executor.reset

    def reset() -> None:
        during.append(run.engine.gauges().recovering)
        real()

    run.executor.reset = reset  # type: ignore[method-assign]
    run.step()
    assert (during, run.engine.gauges().recovering) == ([1], 1)  # for whoever watches
    assert all(isinstance(run.error(number), Unavailable) for number in waiting)
    refused = run.ask([5], 2)
    run.now -= 0.9  # before the pause is over
    run.step()
    assert "send the request again in 0.5 s" in str(run.error(refused))
    run.calls.pop("run", None)
    for _ in range(4):
        run.step()
    assert run.engine.gauges().recovering == 0
    served = run.ask([5], 2)
    run.finish()
    assert run.error(served) is None
    run.require_right(served)


def test_faults_without_end_end_the_loop_and_no_request_is_left_waiting() -> None:
    run = Run()
    stopped, failed = threading.Event(), []
    for number in range(2 * SLOTS):
        run.ask([number], 20)
    run.calls.update(run=[RuntimeError("a fault")], reset=[OSError("no processes")] * 100)

    def loop() -> None:
        try:
            while True:
                run.step()
        except ServerFault as error:
            failed.append(error)

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join(60)
    assert [str(error) for error in failed] == [
        f"the executor failed {MOST_FAULTS + 1} times, and no step between them worked"
    ]
    late = run.ask([5], 2)  # whoever comes between the end of the loop and that of the process
    for update in run.engine.take_updates():
        run.updates[update.request].append(update)
    assert run.ended(late)
    assert all(isinstance(run.error(number), Unavailable) for number in run.asked)
    assert not stopped.is_set()


@pytest.mark.parametrize("fault", [DeviceLost("the GPU failed"), RuntimeError("a mistake of ours")])
def test_whatever_ends_the_loop_ends_every_request(fault: Exception) -> None:
    run = Run()
    for number in range(2 * SLOTS):
        run.ask([number], 20)
    run.step()
    if isinstance(fault, DeviceLost):
        run.calls.update(run=[RuntimeError("CUDA error")], reset=[fault])
    else:
        run.engine.scheduler.plan = _raising(fault)  # type: ignore[method-assign]
    run.ask([3], 2)
    with pytest.raises(type(fault)):
        run.engine.run(threading.Event())
    ends = [update.request for update in run.engine.take_updates() if update.finish]
    assert sorted(ends) == sorted(number for number in run.asked if not run.ended(number))


def _raising(fault: Exception) -> Callable[..., Any]:
    def call(*arguments: object) -> Any:
        raise fault

    return call


def test_an_executor_that_cannot_say_whether_it_is_lost_is_reset() -> None:
    run = Run()
    resets: list[int] = []
    stopped = threading.Event()

    def reset() -> None:
        resets.append(1)
        stopped.set()

    run.executor.lost = _raising(OSError("too many open files"))  # type: ignore[method-assign]
    run.executor.reset = reset  # type: ignore[method-assign]
    run.engine.run(stopped)
    assert resets == [1]


def test_a_cancellation_that_comes_right_after_its_request_cancels_it() -> None:
    """Whatever the idle loop does at that moment, messages keep their order."""
    run = Run()
    stopped = threading.Event()
    thread = threading.Thread(target=run.engine.run, args=(stopped,))
    thread.start()
    try:
        for _ in range(50):
            number = run.engine.submit(np.array([1]), SamplingParams(max_tokens=32))
            run.engine.cancel(number)
            ends: list[Update] = []
            while not ends:
                ends = [update for update in run.engine.take_updates(wait_s=1.0) if update.finish]
            assert ends[0].finish == "cancelled"
    finally:
        stopped.set()
        thread.join(30)


KINDS = ("", "run", "copy", "encode", "reset", "fetch", "sample", "text")


@pytest.mark.parametrize("seed", range(40))
def test_any_faults_at_any_step(seed: int) -> None:
    random = np.random.default_rng(seed)
    run = Run(stages=1 + seed % 2, encoder=seed % 3 == 0)
    own: set[int] = set()  # requests with a fault of their own
    shared: set[int] = set()  # requests that an executor's fault may have ended
    for kind in random.choice(KINDS, 20).tolist():
        for _ in range(random.integers(0, 4)):
            prompt = random.integers(0, 4, random.integers(1, 13)).tolist()
            run.ask(prompt, int(random.integers(1, 13)), logprobs=bool(random.integers(0, 2)))
        fault = FAULTS[random.integers(0, len(FAULTS))]
        waiting = [number for number in run.asked if not run.ended(number)]
        if kind == "sample" and waiting:
            run.broken_sampling.add(int(random.choice(waiting)))
            own |= run.broken_sampling
        elif kind == "text":
            run.letters.unknown = int(random.integers(0, VOCABULARY))
        elif kind == "reset":
            run.calls.update(run=[fault], reset=[OSError("no processes")] * int(random.integers(1, MOST_FAULTS - 1)))
        elif kind:
            run.calls[kind] = [fault]
        unknown = run.letters.unknown
        run.step()
        if kind in ("run", "copy", "encode", "reset", "fetch"):
            shared |= set(waiting)
        ended = {number for number in waiting if run.ended(number) and run.error(number) is not None}
        own |= {n for n in ended if isinstance(run.error(n), ServerFault) and (unknown >= 0 or kind == "fetch")}
        assert ended <= own | shared, "a request ended with no fault of its own"
        run.calls.clear()
        run.letters.unknown = -1
        for _ in range(2):  # whatever was broken is whole again, and a step works
            run.now += 10.0
            run.step()
            run.ask([1], 1)
    run.broken_sampling.clear()
    run.finish()
    for number in run.asked:
        run.require_right(number)
    after = [run.ask([2, 3, number % 5], 4) for number in range(2 * SLOTS)]
    run.finish()
    assert all(run.error(number) is None for number in after)
    assert run.engine.gauges().running == 0
    assert run.engine.scheduler.cache.running == 0


def test_end_ids_that_the_model_cannot_make() -> None:
    """They end nothing, and bar no other token: -1 is not the last of the vocabulary."""
    engine = engine_over(Ledger((32,), 4), (32,), 2, end_ids=(VOCABULARY, 10**6, -1))
    held = SamplingParams(max_tokens=20, min_tokens=20)
    assert generate(engine, [np.array([1, 2])], held) == [continuation([1, 2], 20)]
    last = next(n for n in range(VOCABULARY) if VOCABULARY - 1 in continuation([n], 20))
    assert generate(engine, [np.array([last])], held) == [continuation([last], 20)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"end_ids": (50, -1)}, r"outputs end with token 50, -1, and token ids of this model are 0 to 49"),
        ({"decoder_start_id": 50}, r"outputs start with token 50; token ids of this model are 0 to 49"),
    ],
)
def test_a_model_without_the_ids_of_its_settings_is_not_opened(changes: dict[str, Any], said: str) -> None:
    fields = {"executor": "onnxruntime", "files": {"decoder": "graph.onnx"}, "threads": 1, "capacities": (64,)}
    fields |= {"slots": 8, "chunk_tokens": 32, "max_length": 64, "end_ids": (2, -1), "served": SERVED}
    stored = GeneratorModelSettings.model_validate(fields)
    assert _limits(stored, VOCABULARY).possible_end_ids == (2,)
    with pytest.raises(BadEnvironment, match=said):
        _limits(GeneratorModelSettings.model_validate(fields | changes), VOCABULARY)


def test_lazy_logits_in_parts_are_as_lazy() -> None:
    whole: NDArray[np.float32] = np.random.default_rng(0).random((4, 6), np.float32)
    fetched: list[int] = []

    def fetch(rows: Sequence[int]) -> Logits:
        fetched.extend(rows)
        return whole[list(rows)]

    top = np.stack([whole.max(axis=1), whole.argmax(axis=1).astype(np.float32)], axis=1)
    part = DeviceLogits(top, 6, fetch)[2:4]
    assert part.argmax(axis=1).tolist() == whole[2:4].argmax(axis=1).tolist()
    assert not fetched
    np.testing.assert_array_equal(part[[1]], whole[[3]])
    assert fetched == [3]
