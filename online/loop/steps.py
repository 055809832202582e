"""One step of the loop at a time. What a step is to bring about is in the journal before or after it, never between: it
may be carried out again, whatever was done of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from builders.artifacts import Checkpoint
from builders.errors import CheckError
from builders.spec import DeploymentSpec
from online.gate.forgetting import Change
from online.loop.asked import going_back
from online.loop.building import Champion, Serving, VersionBuilds
from online.loop.due import Clock, LearningFrom, Samples, look
from online.loop.first import adopt
from online.loop.gathered import unread_text
from online.loop.journal import LoopJournal
from online.loop.learning import Learning, TaskLearning
from online.loop.records import DriftState, LoopState, PromotedVersion, UpdateRecord, UpdateStage
from online.loop.settings import budget_of, learnt_task, noun_of, online_of, policy_of, recipe_of
from online.rollout.drive import Journal, Rollout, begin
from online.rollout.state import Decision, Phase, RolloutState
from online.tasks.task import LearningTask
from runtime.errors import InputError

KEPT = 3  # promoted versions whose weights and files stay, for the way back
NOTHING_SERVED = "promoted on the gate's word and its proof: nothing was served, no canary was asked for"


@dataclass(frozen=True)
class Stepped:
    """`waits`: nothing can be done before something comes from outside; `looks`: a rollout goes on, to be looked at
    again in a moment. `ended`: the update that has ended by this step."""

    said: str
    waits: bool = False
    looks: bool = False
    ended: UpdateRecord | None = None


@dataclass
class Loop:
    """Owned by one thread. `serving` None: nothing is served that a version could be rolled out on; it then waits with
    what is built, or, where `without_canary`, promotes it."""

    spec: DeploymentSpec
    journal: LoopJournal
    builds: VersionBuilds
    store: Callable[[], Samples]
    serving: Serving | None = None
    without_canary: bool = False
    federates: bool = False  # its `learning` is that of clients
    clock: Clock = field(default_factory=Clock)
    learning: Learning = field(default_factory=TaskLearning)
    _rollout: Rollout | None = field(default=None, init=False)
    _rollout_journal: Journal | None = field(default=None, init=False)

    def step(self) -> Stepped:
        """Raises FeedbackUnavailable where the store is away, what the serving seams raise, and InputError for what a
        user must mend; the next call, or process, goes on."""
        state = self.journal.load()
        if state is None:
            return self._begin()
        self._require_same_model(state)
        if (asked := going_back(self.journal, state)) is not None:
            return self._go_back(state, asked)
        update = state.update
        if update is None:
            return self._gather(state)
        if update.stage is UpdateStage.GATHERED:
            if update.federated is not None and not self.federates:
                said = f"update {update.number} is one of clients: `trireme online federate serve` goes on with it"
                return Stepped(said, waits=True)
            return self._train(state, update)
        if update.stage is UpdateStage.TRAINED:
            return self._judge(state, update)
        if update.stage is UpdateStage.PASSED:
            return self._build(state, update)
        if update.stage is UpdateStage.BUILT:
            return self._roll(state, update)
        return self._look(state, update)

    def close(self) -> None:
        if self._rollout_journal is not None:
            self._rollout_journal.close()
        self._rollout = self._rollout_journal = None

    @cached_property
    def _adopted(self) -> tuple[Checkpoint, LearningTask]:
        return adopt(self.spec, self.journal.checkpoint(0))

    @property
    def _task(self) -> LearningTask:
        return self._adopted[1]

    def _begin(self) -> Stepped:
        checkpoint, _ = self._adopted
        built = self.builds.first()
        first = PromotedVersion(version=built.version, update=0, since=self._now(), settings=built.settings)
        state = LoopState(
            origin=checkpoint.digest, promoted=(first,), highest=built.version, learnt_at=self.clock.wall()
        )
        self.journal.save(state)
        return Stepped(f"version {built.version} is the first: the spec's own model, with a memory of what it can do")

    def _gather(self, state: LoopState) -> Stepped:
        self._tidy(state)
        online = online_of(self.spec)
        with contextlib.closing(self.store()) as store:
            known = LearningFrom(self._task, self._champion(state), noun_of(self.spec))
            due = look(state, online, store, known, self.clock)
        if due.state != state:
            self.journal.save(due.state)
        if due.rows is None:
            return Stepped(due.waits, waits=True)
        unread = due.gathered.unread
        update = UpdateRecord(
            number=state.updates + 1,
            champion=state.champion.version,
            began=self._now(),
            trigger=due.trigger,
            task=learnt_task(self.spec),
            samples=len(due.gathered.documents),
            unread=sum(unread.values()),
            unread_why=dict(unread),
            rows=len(due.rows[0]),
            held_out_rows=len(due.rows[1]),
            fed_to=due.gathered.fed_to,
            recipe=recipe_of(self.spec),
            budget=budget_of(online.gate),
            min_speed=online.gate.min_speed,
            policy=policy_of(online.canary),
        )
        self.journal.set_aside(update.number, *due.rows)
        self.journal.save(due.state.model_copy(update={"update": update, "updates": update.number}))
        return Stepped(
            f"update {update.number} begins: {update.trigger}; {update.rows} {known.noun} to learn from, "
            f"{update.held_out_rows} held out" + (f"; not read: {unread_text(unread)}" if unread else "")
        )

    def _train(self, state: LoopState, update: UpdateRecord) -> Stepped:
        rows, out = self.journal.rows(update.number), self.journal.checkpoint(update.number)
        try:
            report = self.learning.train(self._task, self._champion(state), update, rows, out)
        except CheckError as error:
            return self._end(state, update, UpdateStage.REFUSED, f"the training: {error}")
        self._save(state, update, stage=UpdateStage.TRAINED, report=report)
        return Stepped(f"update {update.number} is trained; {report.step.share:.0%} of it is taken")

    def _judge(self, state: LoopState, update: UpdateRecord) -> Stepped:
        held_out, candidate = self.journal.rows(update.number)[1], self.journal.checkpoint(update.number)
        verdict = self.learning.judge(self._task, self._champion(state), update, held_out, candidate)
        update = update.model_copy(update={"verdict": verdict})
        if not verdict.passed:
            why = "; ".join(item.why for item in verdict.objections)
            return self._end(state, update, UpdateStage.REFUSED, f"the gate: {why}")
        self._save(state, update, stage=UpdateStage.PASSED)
        assert verdict.new is not None
        kept = ", ".join(
            f"{item.domain} {item.change:+.1%} (up to {item.high:+.1%}){shares_text(item)}" for item in verdict.old
        )
        return Stepped(
            f"update {update.number} passes the gate: perplexity of what is new {verdict.new.change:+.1%}"
            f"{shares_text(verdict.new)}, {kept}"
        )

    def _build(self, state: LoopState, update: UpdateRecord) -> Stepped:
        try:
            state, update = self._built(state, update)
        except CheckError as error:
            return self._end(state, update, UpdateStage.REFUSED, f"the pipeline: {error}")
        speed = f"; it has {update.speed}" if update.speed else ""
        return Stepped(f"update {update.number} is built as version {update.version}, with its proof{speed}")

    def _built(self, state: LoopState, update: UpdateRecord) -> tuple[LoopState, UpdateRecord]:
        """Again where somebody has removed it since. Written down before the champion is put in front of it again: so
        a crash leaves no version that nobody knows."""
        if update.version is None or not self.builds.has(update.settings):
            keep = [item.version for item in state.promoted[-KEPT:]]
            least = update.version or state.highest + 1
            judged = update.stage is not UpdateStage.PASSED  # and built: this is the same again
            champion = None if judged else self._to_beat(state, update)
            built = self.builds.build(self.journal.checkpoint(update.number), keep, least, champion)
            stage = update.stage if judged else UpdateStage.BUILT
            update = update.model_copy(update={"speed": built.speed or update.speed})
            state = state.model_copy(update={"highest": max(state.highest, built.version)})
            state = self._save(state, update, stage=stage, version=built.version, settings=built.settings)
            assert state.update is not None
            update = state.update
        self.builds.hold_back(state.champion.settings)
        return state, update

    def _to_beat(self, state: LoopState, update: UpdateRecord) -> Champion | None:
        if not update.min_speed:
            return None
        folder = self.journal.checkpoint(state.champion.update) if state.champion.update else None
        return Champion(folder, update.min_speed)

    def _roll(self, state: LoopState, update: UpdateRecord) -> Stepped:
        state, update = self._built(state, update)
        if self.without_canary:
            return self._end(state, update, UpdateStage.PROMOTED, NOTHING_SERVED)
        if self.serving is None:
            return Stepped(
                f"version {update.version} is built and proven, and waits for a rollout: give the gateway that serves "
                f"version {state.champion.version}",
                waits=True,
            )
        assert update.version is not None
        with Journal(self.journal.rollout(update.number)) as rollout:
            found = rollout.load()
            if found is None or found.state.challenger != update.version:
                rollout.path.unlink(missing_ok=True)
                begin(rollout, update.policy, state.champion.version, update.version)
        self._save(state, update, stage=UpdateStage.ROLLING)
        return Stepped(f"the rollout of version {update.version} beside {state.champion.version} begins")

    def _look(self, state: LoopState, update: UpdateRecord) -> Stepped:
        if self.serving is None:
            return Stepped(f"the rollout of version {update.version} is under way: give its gateway", waits=True)
        if self._rollout is None:
            before, (state, update) = update.version, self._built(state, update)
            if update.version != before:  # somebody published another meanwhile
                self._save(state, update, stage=UpdateStage.BUILT)
                return Stepped(f"version {before} is now {update.version}: its rollout begins anew")
        rollout = self._rollout or self._open_rollout(update)
        known = len(rollout.state.decisions)
        found = rollout.step()
        if rollout.ended:
            return self._end_rollout(state, update, found)
        fresh = found.decisions[known:]
        return Stepped("; ".join(map(decision_text, fresh)), looks=not fresh)

    def _open_rollout(self, update: UpdateRecord) -> Rollout:
        assert self.serving is not None
        with contextlib.ExitStack() as unless_open:
            journal = unless_open.enter_context(contextlib.closing(Journal(self.journal.rollout(update.number))))
            self._rollout = Rollout(journal, self.serving.door, self.serving.versions, clock=self.clock.monotonic)
            unless_open.pop_all()
        self._rollout_journal = journal
        return self._rollout

    def _end_rollout(self, state: LoopState, update: UpdateRecord, found: RolloutState) -> Stepped:
        self.close()
        stage = UpdateStage.PROMOTED if found.phase is Phase.PROMOTED else UpdateStage.ROLLED_BACK
        update = update.model_copy(update={"decisions": found.decisions})
        return self._end(state, update, stage, found.decisions[-1].reason)

    def _go_back(self, state: LoopState, reason: str) -> Stepped:
        """By a person's word: the update under way, or the champion."""
        update = state.update
        if update is None:
            return self._leave_champion(state, reason)
        if update.stage is not UpdateStage.ROLLING:
            return self._end(state, update, UpdateStage.REFUSED, f"by hand: {reason}")
        if self.serving is None:
            return Stepped(f"version {update.version} is to go back: give the gateway of its rollout", waits=True)
        rollout = self._rollout or self._open_rollout(update)
        if rollout.ended:  # before the word came
            return self._end_rollout(state, update, rollout.step())
        return self._end_rollout(state, update, rollout.roll_back(f"by hand: {reason}"))

    def _leave_champion(self, state: LoopState, reason: str) -> Stepped:
        """The version before it takes its place, at once where something is served."""
        left, before = state.promoted[-1], state.promoted[-2]
        if self.serving is not None:
            self.serving.versions.load(before.version)
            self.serving.door.route({before.version: 1.0}, None)
            self.serving.versions.unload(left.version)
        self.builds.make_current(before.settings)
        record = next(item for item in self.journal.ended() if item.number == left.update)
        said = f"by hand, after its promotion: {reason}"
        ended = record.model_copy(update={"stage": UpdateStage.ROLLED_BACK, "reason": said, "ended": self._now()})
        self.journal.put_down(ended)
        self.journal.save(state.model_copy(update={"promoted": state.promoted[:-1], "drift": DriftState()}))
        return Stepped(f"version {before.version} is the champion again; {left.version} went: {reason}", ended=ended)

    def _end(self, state: LoopState, update: UpdateRecord, stage: UpdateStage, reason: str) -> Stepped:
        promoted = state.promoted
        if stage is UpdateStage.PROMOTED:
            assert update.version is not None
            version = PromotedVersion(
                version=update.version, update=update.number, since=self._now(), settings=update.settings
            )
            promoted = (*promoted, version)
        if update.version is not None:
            self.builds.make_current(promoted[-1].settings)
        ended = update.model_copy(update={"stage": stage, "reason": reason, "ended": self._now()})
        self.journal.put_down(ended)
        after = state.model_copy(
            update={
                "promoted": promoted,
                "update": None,
                "fed_to": update.fed_to,
                "learnt_at": self.clock.wall(),
                "drift": DriftState(scored_to=update.fed_to),
            }
        )
        self.journal.save(after)
        self.clock.reset()
        self._tidy(after)
        return Stepped(f"update {ended.number} {said_of(ended)}: {reason}", ended=ended)

    def _tidy(self, state: LoopState) -> None:
        """What no state needs any more: rows, and weights of updates that came to nothing or were promoted long ago."""
        self.journal.tidy({item.update for item in state.promoted[-KEPT:]} | {0})

    def _champion(self, state: LoopState) -> Path:
        return self.journal.checkpoint(state.champion.update)

    def _save(self, state: LoopState, update: UpdateRecord, **changes: object) -> LoopState:
        after = state.model_copy(update={"update": update.model_copy(update=changes)})
        self.journal.save(after)
        return after

    def _require_same_model(self, state: LoopState) -> None:
        if self._adopted[0].digest != state.origin:
            raise InputError(
                f"model {self.spec.model.source}",
                got="other weights or settings than those that the loop began with",
                expected="the same: its versions come from them",
                fix=f"name that model; or move {self.journal.folder} away, and the loop begins anew",
            )

    def _now(self) -> str:
        return datetime.fromtimestamp(self.clock.wall(), UTC).isoformat(timespec="seconds")


def shares_text(change: Change) -> str:
    """Behind its perplexity; empty for a language model."""
    told = [f"{one.name} {one.before:.3f} -> {one.after:.3f}" for one in change.shares]
    return f" ({', '.join(told)})" if told else ""


def said_of(update: UpdateRecord) -> str:
    if update.stage is UpdateStage.PROMOTED:
        return f"is promoted as version {update.version}"
    return "is refused" if update.stage is UpdateStage.REFUSED else f"is rolled back (version {update.version})"


def decision_text(decision: Decision) -> str:
    share = f", {decision.share:.0%} of the traffic" if decision.enters is Phase.CANARY else ""
    return f"{decision.leaves} -> {decision.enters}{share}: {decision.reason}"
