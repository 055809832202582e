"""Federated rounds that others drive, such as Flower: the offer, a client's lesson and what came of it, as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from builders.judging.corpus import Document
from builders.spec import DeploymentSpec
from builders.training.recipe import LossPoint
from online.federated.checks import opened_weights
from online.federated.coordinator import Offer
from online.federated.local import Lesson
from online.federated.tensors import Shapes, TensorFile, parted, shapes_of, write_tensors
from online.files import replace_file
from online.gate.architecture import fingerprint
from online.learner.update import REPORT, UpdateReport
from online.loop.federating import Joined, RoundsStart
from online.loop.first import adopt
from online.loop.joining import own_learner
from online.loop.journal import LoopFiles, LoopJournal
from online.loop.learning import JudgedAtTheGate
from online.loop.records import LoopState, UpdateRecord
from online.loop.settings import online_of
from online.tasks.task import LearningTask, Rows
from runtime.errors import InputError
from runtime.record import Record

OFFER, WEIGHTS = "offer.json", "weights.safetensors"


class JoinedFacts(Record):
    """What stands in the metadata of the file with the last weights, under `trireme`. `key`: of the offer; `rows`: of
    all clients; `losses`: the clients' mean of each round."""

    key: str
    rows: int = Field(ge=1)
    losses: tuple[float, ...] = Field(min_length=1)


class LessonLearnt(Record):
    """`loss`: of the lesson's steps; `held_out`: of own rows that only judge, on the weights that came."""

    rows: int
    loss: float
    held_out: float | None


def write_offer(spec: DeploymentSpec, journal: LoopJournal, out: Path) -> Offer:
    """Two files in the folder `out`: what is trained, and what the first round begins with."""
    state = journal.load()
    update = waiting(state)
    assert state is not None
    _, task = adopt(spec, journal.checkpoint(0))
    champion, held_out = journal.checkpoint(state.champion.update), journal.rows(update.number)[1]
    start = RoundsStart.of(task, champion, update, held_out)
    out.mkdir(parents=True, exist_ok=True)
    write_tensors(start.first, out / WEIGHTS)
    replace_file(out / OFFER, (start.offer.model_dump_json(indent=2) + "\n").encode())
    return start.offer


def waiting(state: LoopState | None) -> UpdateRecord:
    """The update whose rounds are awaited, or were made. Raises InputError."""
    update = None if state is None else state.update
    if update is None or update.federated is None:
        raise InputError(
            "update", got="none that waits for rounds", expected="one", fix="begin it: `trireme online federate offer`"
        )
    return update


def read_offer(file: Path) -> Offer:
    """Raises InputError."""
    try:
        return Offer.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        why = error.strerror if isinstance(error, OSError) else error.errors(include_url=False)[0]["msg"]
        raise InputError(
            f"offer {file}", got=why, expected=f"{OFFER} of `trireme online federate offer`",
            fix="name the file as it was written",
        ) from error  # fmt: skip


def learn_lesson(
    spec: DeploymentSpec, files: LoopFiles, documents: Sequence[Document], offer: Offer, number: int,
    weights: Path, out: Path,
) -> LessonLearnt:  # fmt: skip
    """Round `number`, from 0: own steps from those weights, and where they lead to `out`. The optimiser goes on from
    the lesson before unless its moments are shared. Raises InputError, and DivergedError."""
    if not 0 <= number < offer.plan.rounds:
        raise InputError(
            "round", got=number + 1, expected=f"1 to {offer.plan.rounds}, as the offer has it",
            fix="let whoever drives the rounds make as many as online.federated.rounds",
        )  # fmt: skip
    with own_learner(spec, files, documents) as learner:
        _require_same(spec, files, offer)
        plan = offer.plan
        lesson = Lesson(
            offer.key, number, plan.rounds, plan.local_steps, offer.recipe, plan.prox, plan.share_moments
        )  # fmt: skip
        start = _opened(weights, learner.shapes(lesson))
        found = learner.learn(lesson, start)
        moved, moments = parted(found.update)
        write_tensors({**{name: start[name] + step for name, step in moved.items()}, **moments}, out)
        if number + 1 == plan.rounds:
            learner.forget()
        return LessonLearnt(rows=len(learner.rows), loss=found.loss, held_out=found.held_out)


def _require_same(spec: DeploymentSpec, files: LoopFiles, offer: Offer) -> None:
    window = online_of(spec).learner.window
    if window != offer.window:
        raise InputError(
            "online.learner.window", got=window, expected=f"{offer.window}, as the offer has it", fix="set it so"
        )
    if fingerprint(files.checkpoint(0)) != offer.architecture:
        raise InputError(
            f"model {spec.model.source}", got="another configuration, tokenizer or shape than the offer's",
            expected="a model of the same kind", fix="name the checkpoint that the offer was made for",
        )  # fmt: skip


def _opened(file: Path, shapes: Shapes) -> TensorFile:
    return opened_weights(
        file, shapes, f"weights {file}", "those that the offer begins with, after some rounds",
        "name a file that the rounds have made",
    )  # fmt: skip


@dataclass(frozen=True)
class BroughtLearning(JudgedAtTheGate):
    """An update whose rounds others drove; `weights`: the file that they ended with."""

    weights: Path

    def train(
        self, task: LearningTask, champion: Path, update: UpdateRecord, rows: tuple[Rows, Rows], out: Path
    ) -> UpdateReport:
        """Raises InputError for weights of another offer."""
        if out.is_dir():
            return UpdateReport.model_validate_json((out / REPORT).read_bytes())
        start = RoundsStart.of(task, champion, update, rows[1])
        brought = _opened(self.weights, shapes_of(start.first))
        facts = _facts(self.weights, brought, start.offer)
        curve = tuple(
            LossPoint(step=(number + 1) * start.offer.plan.local_steps, tokens=0, train=loss, held_out=None)
            for number, loss in enumerate(facts.losses)
        )
        return start.candidate(Joined(parted(brought)[0], facts.rows, curve), out)


def _facts(file: Path, brought: TensorFile, offer: Offer) -> JoinedFacts:
    try:
        facts = JoinedFacts.model_validate(json.loads(brought.metadata().get("trireme", "null")))
    except ValueError as error:  # ValidationError and JSONDecodeError are such
        raise InputError(
            f"weights {file}", got="no word of what they were made from",
            expected="metadata `trireme` with key, rows and losses", fix="give the file that the rounds ended with",
        ) from error  # fmt: skip
    if facts.key != offer.key:
        raise InputError(
            f"weights {file}", got="those of another offer", expected="of the update that waits for its rounds",
            fix="make the rounds from the offer that was written last",
        )  # fmt: skip
    return facts
