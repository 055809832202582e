"""The rounds, driven: clients answer on threads of their own, one thread joins what they say and writes it down."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path

from online.federated import aggregate, checks, wire
from online.federated.errors import TooFewClients, UpdateRejected
from online.federated.keeping import AcceptedUpdate, RoundFiles, RoundRecord, RoundsState
from online.federated.plan import FederatedPlan
from online.federated.rounds import RoundPhase, Rounds, UpdateAnswer
from online.federated.tensors import TensorFile, Tensors, length_of, parted, shapes_of
from online.learner.recipe import UpdateRecipe
from runtime.record import Record

_LONGEST_WHY = 500
_LOOK_S = 0.5  # between two looks at the clock


class Offer(Record):
    """What is trained. A client fits when its own model has this `architecture` and cuts its text by this `window`."""

    key: str
    architecture: str
    window: int
    recipe: UpdateRecipe
    plan: FederatedPlan


@dataclass
class _Client:
    session: str
    samples: int


@dataclass
class _Upload:
    """An update that was accepted, on the disk until its round has ended."""

    file: Path
    samples: int
    length: float
    loss: float
    held_out: float | None


class _Over(Exception):  # the round, while an update was on its way
    pass


class ClientRefused(Exception):  # it says what happens to the client
    """`anew`: it is unknown here, as this coordinator has started since, and may join again."""

    def __init__(self, why: str, anew: bool = False) -> None:
        super().__init__(why)
        self.anew = anew


@dataclass
class Coordinator:
    """`say` hears of each round. Raises from its start what `RoundFiles.open` does."""

    offer: Offer
    files: RoundFiles
    first: Tensors  # the champion's weights, and moments where clients share theirs
    say: Callable[[str], None] = lambda said: None
    clock: Callable[[], float] = time.monotonic
    farewell_s: float = 15.0  # for clients to hear that all rounds are done
    state: RoundsState = field(init=False)
    rounds: Rounds = field(init=False)

    def __post_init__(self) -> None:
        self.state = self.files.open(self.offer.key, self.first)
        self.rounds = Rounds(self.offer.plan, self.state.complete, self.clock())
        self._changed = threading.Condition()
        self._clients: dict[str, _Client] = {}
        self._uploads: dict[str, _Upload] = {}
        self._told: set[str] = set()  # that all is done
        weights = TensorFile(self.files.weights_file(self.state))
        self._shapes = shapes_of(weights)
        self._longest = self.offer.plan.max_norm * length_of(weights)
        self._largest = 4 * sum(value.size for value in weights.values()) + wire.HEADER_ROOM

    # By clients, on any thread.

    def join(self, client: str, hello: wire.JoinHello) -> wire.Welcome:
        """A second process with the same certificate takes the first one's place. Raises ClientRefused."""
        offer, plan = self.offer, self.offer.plan
        if hello.protocol != wire.PROTOCOL:
            raise ClientRefused(f"protocol {hello.protocol}; {wire.PROTOCOL} is spoken here")
        if hello.architecture != offer.architecture:
            raise ClientRefused("its model has another configuration, tokenizer or shape than the coordinator's")
        if hello.window != offer.window:
            raise ClientRefused(f"online.learner.window is {hello.window} there, {offer.window} here")
        try:
            checks.require_count(hello.samples, hello.samples, plan.max_samples)
        except UpdateRejected as error:
            raise ClientRefused(str(error)) from error
        with self._changed:
            if client not in self._clients and len(self._clients) >= plan.most_clients:
                raise ClientRefused(f"{plan.most_clients} clients have joined, and no more may")
            if client not in self._clients:
                self.say(f"{client} joins with {hello.samples} rows")
            self._clients[client] = _Client(secrets.token_hex(16), hello.samples)
            self.rounds.seen(client, self.clock())
            self._changed.notify_all()
            return wire.Welcome(
                client=client, session=self._clients[client].session, key=offer.key, recipe=offer.recipe,
                rounds=plan.rounds, local_steps=plan.local_steps, prox=plan.prox,
                shared=plan.share_moments,
            )  # fmt: skip

    def pull(self, client: str, ask: wire.Ask, wait_s: float = wire.POLL_S) -> tuple[wire.Task, Path | None]:
        """The round that is open and the file of its weights; waits for one as long as that. Raises ClientRefused."""
        end = self.clock() + wait_s
        with self._changed:
            self._require_session(client, ask.session)
            self.rounds.seen(client, self.clock())
            self._changed.notify_all()  # once: those who wait would else wake each other for ever
            while True:
                self._require_session(client, ask.session)
                if self.rounds.phase is RoundPhase.DONE:
                    self._told.add(client)
                    self._changed.notify_all()
                    return wire.Task(kind="done"), None
                if self.rounds.take(client, self.clock()):
                    file = self.files.weights_file(self.state)
                    number, attempt = self.rounds.number, self.rounds.attempt
                    return wire.Task(kind="round", number=number, attempt=attempt, size=file.stat().st_size), file
                if (left := end - self.clock()) <= 0:
                    return wire.Task(kind="wait"), None
                self._changed.wait(left)

    def push(self, client: str, pushed: wire.Pushed, parts: Iterable[bytes]) -> wire.PushTaken:
        """Raises ClientRefused, and OSError where the disk is full."""
        with self._changed:
            joined = self._require_session(client, pushed.session)
            if not self.rounds.is_open(pushed.number, pushed.attempt):
                return self._answered(client, pushed, None)
        file = self.files.pushed / f"{client}.{secrets.token_hex(8)}"
        upload, why = None, pushed.failed and f"its training failed: {pushed.failed}"
        try:
            if why is None:
                upload = self._checked(pushed, joined.samples, self._while_open(pushed, parts), file)
        except (UpdateRejected, wire.NotOurs) as error:
            why = str(error)
        except _Over:
            pass  # the answer says so
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        with self._changed:
            self._require_session(client, pushed.session)
            taken = self._answered(client, pushed, why)
            if taken.answer is UpdateAnswer.ACCEPTED and upload is not None:
                self._uploads[client] = upload
            else:
                file.unlink(missing_ok=True)
            self._changed.notify_all()
            return taken

    def _checked(self, pushed: wire.Pushed, joined: int, parts: Iterable[bytes], file: Path) -> _Upload:
        checks.require_count(pushed.samples, joined, self.offer.plan.max_samples)
        if pushed.loss is None or not isfinite(pushed.loss):
            raise UpdateRejected(f"its loss is {pushed.loss}")
        wire.receive(parts, file, self._largest)
        length = checks.require_update(file, self._shapes, self._longest, self.offer.recipe.clip)
        judged = pushed.held_out is not None and isfinite(pushed.held_out)
        return _Upload(file, pushed.samples, length, pushed.loss, pushed.held_out if judged else None)

    def _while_open(self, pushed: wire.Pushed, parts: Iterable[bytes]) -> Iterator[bytes]:
        """Who sends a byte now and then does so no longer than the round lasts."""
        for part in parts:
            if not self.rounds.is_open(pushed.number, pushed.attempt):
                raise _Over
            yield part

    def _answered(self, client: str, pushed: wire.Pushed, why: str | None) -> wire.PushTaken:
        if why is not None:  # a client's own words may be in it, and it goes to a terminal
            why = "".join(char if char.isprintable() else "?" for char in why[:_LONGEST_WHY])
        answer = self.rounds.answer(client, pushed.number, pushed.attempt, why, self.clock())
        if answer is UpdateAnswer.REJECTED:
            self.say(f"round {pushed.number + 1}: the update of {client} is rejected: {why}")
        return wire.PushTaken(answer=answer, why=why or "" if answer is UpdateAnswer.REJECTED else "")

    def _require_session(self, client: str, session: str) -> _Client:
        known = self._clients.get(client)
        if known is None:
            raise ClientRefused(f"{client} has not joined", anew=True)
        if not secrets.compare_digest(known.session, session):
            raise ClientRefused(f"another process has joined as {client}")
        return known

    # By the one thread that drives them.

    def run(self) -> Tensors:
        """The weights after the last round. Raises TooFewClients; the same again, later, goes on from the last round
        that is complete. Raises MachineError when the disk is full."""
        while True:
            with self._changed:
                self.tick()
                phase = self.rounds.phase
                if phase in (RoundPhase.GATHERING, RoundPhase.OPEN):
                    self._changed.wait(max(min(self.rounds.deadline - self.clock(), _LOOK_S), 0.0))
                    continue
            if phase is RoundPhase.COMPLETE:
                self._join_updates()
            elif phase is RoundPhase.STOPPED:
                raise TooFewClients(
                    f"round {self.rounds.number + 1}: fewer than online.federated.min_clients="
                    f"{self.offer.plan.min_clients} answered in {self.offer.plan.attempts} tries of at most "
                    f"{self.offer.plan.deadline_s:g} s; {self.rounds.number} rounds are complete and stay: run the "
                    "same command when clients are back"
                )
            else:
                self._farewell()
                return TensorFile(self.files.weights_file(self.state))

    def tick(self) -> None:
        """Opens and ends rounds as time and answers have it."""
        with self._changed:
            before, missing = (self.rounds.phase, self.rounds.attempt), self.rounds.missing
            self.rounds.tick(self.clock())
            if (self.rounds.phase, self.rounds.attempt) == before:
                return
            if self.rounds.phase is RoundPhase.OPEN:
                self._changed.notify_all()
            elif self.rounds.phase is not RoundPhase.COMPLETE:
                self._drop_uploads()
                lost = f"; nothing came from {', '.join(sorted(missing))}" if missing else ""
                self.say(f"round {self.rounds.number + 1}: too few answered by the deadline{lost}")

    def _join_updates(self) -> None:
        """Of a COMPLETE round: nobody's answer counts any more while it is written."""
        plan, rounds = self.offer.plan, self.rounds
        for client, why in checks.outliers(self._lengths(), plan.outlier).items():
            self.say(f"round {rounds.number + 1}: the update of {client} is rejected: {why}")
            rounds.reject(client, why)
        if len(rounds.accepted) >= plan.min_clients:
            self._step()
        with self._changed:
            rounds.joined(self.clock())
            self._drop_uploads()
            self._changed.notify_all()

    def _step(self) -> None:
        plan, rounds = self.offer.plan, self.rounds
        chosen = {client: self._uploads[client] for client in sorted(rounds.accepted)}
        weights = TensorFile(self.files.weights_file(self.state))
        updates = {client: TensorFile(upload.file) for client, upload in chosen.items()}
        if plan.trim:
            share = dict.fromkeys(chosen, 1 / len(chosen))
            step = aggregate.trimmed_mean(updates, plan.trim)
        else:
            share = aggregate.shares({client: upload.samples for client, upload in chosen.items()}, plan.max_share)
            step = aggregate.weighted_mean(updates, share)
        first, moments = parted(weights)
        betas = self.offer.recipe.optimiser.betas
        moments = aggregate.pooled_moments(moments, parted(step)[1], share, plan.local_steps, betas)
        moved, momentum = aggregate.outer_step(
            first, step, self.files.momentum(self.state), plan.outer_rate, plan.outer_momentum
        )
        record = RoundRecord(
            number=rounds.number,
            attempt=rounds.attempt,
            accepted=tuple(
                AcceptedUpdate(client=client, samples=one.samples, share=share[client], length=one.length,
                               loss=one.loss, held_out=one.held_out)
                for client, one in chosen.items()
            ),
            rejected=dict(rounds.rejected),
            missing=tuple(sorted(rounds.missing)),
            length=length_of(step),
        )  # fmt: skip
        after = self.state.model_copy(update={"complete": rounds.number + 1, "history": (*self.state.history, record)})
        self.state = self.files.save(after, {**moved, **moments}, momentum)
        self.say(told(record, plan.rounds))

    def _lengths(self) -> dict[str, float]:
        return {client: upload.length for client, upload in self._uploads.items()}

    def _drop_uploads(self) -> None:
        for upload in self._uploads.values():
            upload.file.unlink(missing_ok=True)
        self._uploads.clear()

    def _farewell(self) -> None:
        """Clients that are there hear that all is done; one that is not is not waited for long."""
        end = self.clock() + self.farewell_s
        with self._changed:
            self._changed.notify_all()
            present = {client for client in self.rounds.present if client in self._clients}
            while not present <= self._told and (left := end - self.clock()) > 0:
                self._changed.wait(min(left, _LOOK_S))


def told(record: RoundRecord, rounds: int) -> str:
    losses = [f"{one.client} {one.loss:.3f} ({one.share:.0%})" for one in record.accepted]
    left = [f"rejected {client}" for client in record.rejected] + [f"missing {client}" for client in record.missing]
    return f"round {record.number + 1} of {rounds}: loss {', '.join(losses)}{'; ' if left else ''}{', '.join(left)}"
