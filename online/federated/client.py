"""A client's side: it joins, and learns each round that it gets, until all are done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from builders.errors import DivergedError
from online.federated import wire
from online.federated.checks import opened_weights
from online.federated.local import Learnt, Lesson
from online.federated.rounds import UpdateAnswer
from online.federated.tensors import Shapes, TensorFile, Tensors
from online.federated.tls import TlsIdentity
from runtime.backoff import pause_s
from runtime.errors import InputError, Unavailable

_JOIN_S = 30.0
_TRANSFER_S = 600.0  # for weights, or an update, of whatever size
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0
_NO_LIMIT = float("inf")


class Learns(Protocol):
    def shapes(self, lesson: Lesson) -> Shapes:
        """Of what a lesson begins with."""

    def learn(self, lesson: Lesson, weights: Tensors) -> Learnt: ...


@dataclass(frozen=True)
class PartTaken:
    """`rounds` that the client's updates went into, and those that did not count, by number. `done`: all are."""

    done: bool
    rounds: tuple[int, ...]
    lost: dict[int, str]


@dataclass
class FederatedClient:
    """`address`: host:port of the coordinator. `patience_s`: how long it may be away."""

    address: str
    identity: TlsIdentity
    hello: wire.JoinHello
    learner: Learns
    say: Callable[[str], None] = lambda said: None
    patience_s: float = 600.0
    sleep: Callable[[float], None] = time.sleep
    monotonic: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._rounds: list[int] = []
        self._lost: dict[int, str] = {}
        self._session_at = self.monotonic()

    def run(self, most_s: float = _NO_LIMIT) -> PartTaken:
        """Until all rounds are done, or after this time between two of them.

        Raises InputError where the coordinator does not take this client, or its certificate; Unavailable when it is
        away for too long. A coordinator that comes back goes on, and so does this.
        """
        host, port = host_and_port(self.address)
        end, failures, done = self.monotonic() + most_s, 0, False
        self._session_at = self.monotonic()
        while not done and self.monotonic() < end:
            try:
                self.identity.require_trust(host, port)
                with closing(self.identity.channel(self.address)) as channel:
                    done = self._session(_Calls(channel), end)
                failures = 0
            except Unavailable as error:
                if self.monotonic() - self._session_at > self.patience_s:
                    raise
                failures += 1
                if failures == 1:
                    self.say(f"waits: {error}")
                self.sleep(pause_s(failures, _FIRST_PAUSE_S, _LONGEST_PAUSE_S))
        return PartTaken(done, tuple(self._rounds), dict(self._lost))

    def _session(self, calls: _Calls, end: float) -> bool:
        """Whether all is done."""
        welcome = calls.join(self.hello)
        self.say(f"joined {self.address} as {welcome.client}: {welcome.rounds} rounds of {welcome.local_steps} steps")
        with TemporaryDirectory(prefix="trireme-federated-") as folder:
            weights = Path(folder) / "weights"
            while self.monotonic() < end:
                task = calls.pull(welcome.session, weights)
                self._session_at = self.monotonic()
                if task.kind == "done":
                    return True
                if task.kind == "round":
                    self._round(calls, welcome, task, weights)
        return False

    def _round(self, calls: _Calls, welcome: wire.Welcome, task: wire.Task, weights: Path) -> None:
        lesson = Lesson(
            welcome.key, task.number, welcome.rounds, welcome.local_steps, welcome.recipe, welcome.prox, welcome.shared
        )
        pushed = wire.Pushed(
            session=welcome.session, number=task.number, attempt=task.attempt, samples=self.hello.samples
        )
        learnt = None
        try:
            learnt = self.learner.learn(lesson, self._opened(weights, lesson))
            pushed = pushed.model_copy(update={"loss": learnt.loss, "held_out": learnt.held_out})
        except DivergedError as error:
            pushed = pushed.model_copy(update={"failed": str(error)[:500]})
        taken = calls.push(pushed, None if learnt is None else learnt.update)
        number = task.number + 1
        if taken.answer is UpdateAnswer.ACCEPTED and learnt is not None:
            self._rounds.append(number)
            held_out = "" if learnt.held_out is None else f", {learnt.held_out:.3f} on held-out rows before it"
            self.say(f"round {number}: loss {learnt.loss:.3f}{held_out}")
        else:
            self._lost[number] = f"{taken.answer}{': ' if taken.why else ''}{taken.why}"
            self.say(f"round {number}: the update is {self._lost[number]}")

    def _opened(self, file: Path, lesson: Lesson) -> TensorFile:
        """Raises InputError for weights that are not of this client's model."""
        return opened_weights(
            file, self.learner.shapes(lesson), f"weights from {self.address}", "those of this client's model",
            "name the coordinator's model in the spec",
        )  # fmt: skip


class _Calls:
    """The three calls of one session."""

    def __init__(self, channel: Any) -> None:
        self._join = channel.unary_unary(f"/{wire.SERVICE}/Join")
        self._pull = channel.unary_stream(f"/{wire.SERVICE}/Pull")
        self._push = channel.stream_unary(f"/{wire.SERVICE}/Push")

    def join(self, hello: wire.JoinHello) -> wire.Welcome:
        return wire.read(wire.Welcome, _told(lambda: self._join(wire.said(hello), timeout=_JOIN_S)))

    def pull(self, session: str, file: Path) -> wire.Task:
        def pulled() -> wire.Task:
            parts = self._pull(wire.said(wire.Ask(session=session)), timeout=_TRANSFER_S)
            task = wire.read(wire.Task, next(parts, b""))
            if wire.receive(parts, file, task.size) != task.size:
                raise Unavailable("the coordinator's weights ended too early")
            return task

        task: wire.Task = _told(pulled)
        return task

    def push(self, pushed: wire.Pushed, update: Tensors | None) -> wire.PushTaken:
        def messages() -> Iterator[bytes]:
            from safetensors.numpy import save

            yield wire.said(pushed)
            if update is not None:
                content = save(dict(update))
                for start in range(0, len(content), wire.PIECE):
                    yield content[start : start + wire.PIECE]

        return wire.read(wire.PushTaken, _told(lambda: self._push(messages(), timeout=_TRANSFER_S)))


def _told(call: Callable[[], Any]) -> Any:
    """Raises Unavailable for what may pass, InputError for what does not."""
    import grpc

    away = (
        grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.ABORTED,
    )  # fmt: skip
    try:
        return call()
    except grpc.RpcError as error:
        if error.code() in away:
            raise Unavailable(f"the coordinator: {error.details() or error.code().name}") from error
        raise InputError(
            "the coordinator", got=f"{error.code().name}: {error.details()}", expected="that it takes this client",
            fix="mend what it says, and join again",
        ) from error  # fmt: skip


def host_and_port(address: str, option: str = "--coordinator") -> tuple[str, int]:
    """Raises InputError."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(
            option, got=repr(address), expected="host:port", fix="give the address that the coordinator listens at"
        )
    return host, int(port)
