"""An update that clients train in federated rounds: begun from texts that judge it, and then one as every other."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from builders.digests import file_digest
from builders.judging import corpus
from builders.judging.corpus import Document
from builders.spec import DeploymentSpec
from builders.store.atomic import atomic_directory
from builders.training.recipe import LossPoint
from online.federated.coordinator import Coordinator, Offer
from online.federated.door import listening
from online.federated.keeping import RoundFiles, RoundRecord
from online.federated.moments import no_moments
from online.federated.plan import FederatedPlan
from online.federated.tensors import Floats, Tensors, put_weights, weights_of
from online.federated.tls import TlsIdentity
from online.gate.architecture import fingerprint
from online.learner.memory import Memory, Reservoir, load_memory
from online.learner.recipe import UpdateRecipe
from online.learner.update import REPORT, UpdateReport, step_back, write_version
from online.learner.weights import WEIGHTS
from online.loop.due import require_window
from online.loop.first import adopt
from online.loop.gathered import FEWEST_HELD_OUT, MOST_HELD_OUT, thinned
from online.loop.journal import LoopJournal
from online.loop.learning import JudgedAtTheGate
from online.loop.records import LoopState, UpdateRecord
from online.loop.settings import budget_of, learnt_task, online_of, plan_of, policy_of, recipe_of
from online.tasks.task import LearningTask, Rows
from runtime.errors import InputError

FOLDER = "federated"  # of an update, and of a client


def require_language_model(spec: DeploymentSpec) -> None:
    """Raises InputError."""
    if spec.model.task != "generation":
        raise InputError(
            "model.task", got=spec.model.task, expected="generation: federated rounds are for language models",
            fix="let such a model learn where its feedback is, with `trireme online run`",
        )  # fmt: skip


def begin_federated(spec: DeploymentSpec, journal: LoopJournal, held_out: Path, wall: float | None = None) -> str:
    """Sets an update down whose candidate will be judged by the texts in `held_out`, a line each; says so. Feedback at
    this place is not read, and waits for an update of its own. Raises InputError."""
    require_language_model(spec)
    online, state = online_of(spec), journal.load()
    assert state is not None
    plan = plan_of(online.federated, online.learner)
    rows = _judging_rows(spec, journal, state, held_out)
    update = UpdateRecord(
        number=state.updates + 1,
        champion=state.champion.version,
        began=datetime.fromtimestamp(wall or time.time(), UTC).isoformat(timespec="seconds"),
        trigger=f"federated, {plan.rounds} rounds",
        task=learnt_task(spec),
        samples=0,
        rows=0,
        held_out_rows=len(rows),
        fed_to=state.fed_to,
        recipe=recipe_of(spec),
        budget=budget_of(online.gate),
        policy=policy_of(online.canary),
        federated=plan,
    )
    journal.set_aside(update.number, np.zeros((0, rows.shape[1]), np.int64), rows)
    journal.save(state.model_copy(update={"update": update, "updates": update.number}))
    return f"update {update.number} begins: {update.trigger} of {plan.local_steps} steps; {len(rows)} rows judge it"


def _judging_rows(spec: DeploymentSpec, journal: LoopJournal, state: LoopState, file: Path) -> Rows:
    champion, window = journal.checkpoint(state.champion.update), online_of(spec).learner.window
    _, task = adopt(spec, journal.checkpoint(0))
    require_window(load_memory(champion), task, window)
    documents = [Document(line, (line,)) for line in corpus.texts(file, None)]
    rows = thinned(task.rows(documents), MOST_HELD_OUT)
    if len(rows) < FEWEST_HELD_OUT:
        raise InputError(
            f"--held-out {file}", got=f"{len(rows)} rows of {window} tokens",
            expected=f"{FEWEST_HELD_OUT}: fewer bound nothing", fix="give more text of what the clients will bring",
        )  # fmt: skip
    return rows


@dataclass(frozen=True)
class FederatedLearning(JudgedAtTheGate):
    """`address`: host:port where clients come; it is heard at while rounds go on, and no longer."""

    address: str
    identity: TlsIdentity
    say: Callable[[str], None] = lambda said: None

    def train(
        self, task: LearningTask, champion: Path, update: UpdateRecord, rows: tuple[Rows, Rows], out: Path
    ) -> UpdateReport:
        """Raises TooFewClients; called again, it goes on from the last complete round."""
        if out.is_dir():
            return UpdateReport.model_validate_json((out / REPORT).read_bytes())
        start = RoundsStart.of(task, champion, update, rows[1])
        files = RoundFiles(out.parent / FOLDER)
        coordinator = Coordinator(start.offer, files, start.first, self.say)
        with listening(coordinator, self.address, self.identity) as port:
            self.say(f"clients may join at port {port}, from round {coordinator.state.complete + 1} on")
            weights = coordinator.run()
        history = coordinator.state.history
        joined = Joined(
            weights,
            rows=sum({one.client: one.samples for record in history for one in record.accepted}.values()),
            curve=curve_of(history, start.offer.plan, update.recipe, start.offer.window),
        )
        found = start.candidate(joined, out)
        files.drop()
        return found


@dataclass(frozen=True)
class Joined:
    """What the rounds made of the champion's weights, from how many rows of all clients."""

    weights: Tensors
    rows: int
    curve: tuple[LossPoint, ...]


@dataclass(frozen=True)
class RoundsStart:
    """What the rounds of an update begin with: `first`, which are the champion's weights, as `model` has them, and
    moments where they are shared. `began`: by the process's time."""

    task: LearningTask
    champion: Path
    update: UpdateRecord
    model: Any
    digest: str
    memory: Memory
    after: Memory
    offer: Offer
    first: dict[str, Floats]
    began: float

    @staticmethod
    def of(task: LearningTask, champion: Path, update: UpdateRecord, held_out: Rows) -> RoundsStart:
        assert update.federated is not None
        began, memory = time.process_time(), load_memory(champion)
        after = memory.with_domain(update.domain, held_out)  # refused before anything is trained
        if not update.recipe.keep_old:
            after = replace(after, reservoir=Reservoir.empty(task.width))
        model, digest = task.load(champion), file_digest(champion / WEIGHTS)
        offer = Offer(
            key=_key(digest, update.domain, update.recipe, update.federated), architecture=fingerprint(champion),
            window=held_out.shape[1] - 1, recipe=update.recipe, plan=update.federated,
        )  # fmt: skip
        moments = no_moments(model, update.recipe) if update.federated.share_moments else {}
        first = {**weights_of(model), **moments}
        return RoundsStart(task, champion, update, model, digest, memory, after, offer, first, began)

    def candidate(self, joined: Joined, out: Path) -> UpdateReport:
        """As much of the way from the champion as the budget allows. Once: `model` moves."""
        update, previous = self.update, copy.deepcopy(self.model).eval()
        put_weights(self.model, joined.weights)
        found = UpdateReport(
            recipe=update.recipe,
            max_forgetting=update.budget.max_forgetting,
            max_fall=update.budget.max_fall,
            domain=update.domain,
            new_rows=joined.rows,
            replayed_rows=update.recipe.replayed(len(self.memory.reservoir.rows)),
            previous_sha256=self.digest,
            curve=joined.curve,
            step=step_back(self.task, self.model, previous, self.memory, update.budget),
            cpu_s=round(time.process_time() - self.began, 1),
        )
        with atomic_directory(out) as work:
            write_version(self.model.eval(), self.champion, work, self.after)
            (work / REPORT).write_text(found.model_dump_json(indent=2) + "\n")
        return found


def curve_of(
    history: Sequence[RoundRecord], plan: FederatedPlan, recipe: UpdateRecipe, window: int
) -> tuple[LossPoint, ...]:
    """A point a round, of what clients say. On held-out rows they judge the weights that a round began with: so those
    of the round before."""
    points, tokens = [], 0
    for record, later in zip(history, [*history[1:], None], strict=True):
        tokens += len(record.accepted) * plan.local_steps * recipe.rows * window
        judged = [] if later is None else [one.held_out for one in later.accepted if one.held_out is not None]
        points.append(
            LossPoint(
                step=(record.number + 1) * plan.local_steps,
                tokens=tokens,
                train=sum(one.share * one.loss for one in record.accepted),
                held_out=sum(judged) / len(judged) if judged else None,
            )
        )
    return tuple(points)


def _key(previous: str, domain: str, recipe: UpdateRecipe, plan: FederatedPlan) -> str:
    parts = [previous, domain, recipe.model_dump_json(), plan.model_dump_json()]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()
