"""What a client learns in a round: steps of the update's own training, from the weights that it was given."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builders.training import loop
from builders.training.arithmetic import arithmetic, reproducible
from builders.training.optimiser import rise_and_fall
from builders.training.resume import Resume
from online.federated.moments import moments_of, no_moments, states_of
from online.federated.tensors import Floats, Shapes, Tensors, parted, put_weights, shapes_of, weights_of
from online.learner.batches import update_batches
from online.learner.memory import load_memory
from online.learner.recipe import UpdateRecipe
from online.tasks.task import LearningTask, Rows, Training

if TYPE_CHECKING:
    import torch

_JUDGED_ROWS = 64
_MOMENTS = "moments"


@dataclass(frozen=True)
class Lesson:
    """Round `number`, from 0, of `rounds`: `local_steps` steps of the recipe, which counts those of all rounds. `key`:
    of the update."""

    key: str
    number: int
    rounds: int
    local_steps: int
    recipe: UpdateRecipe
    prox: float = 0.0
    shared: bool = False  # moments: they come with the weights, and go with the update


@dataclass(frozen=True)
class Learnt:
    """`update`: by how much the weights moved, and the moments where they are shared."""

    update: dict[str, Floats]
    loss: float
    held_out: float | None


class LocalLearner:
    """`base`: a version of the same architecture with a memory, whose reservoir is replayed. No row leaves it.

    The optimiser's state goes on from round to round. Where it is not shared, it lies in `folder`, for another process.
    """

    def __init__(self, task: LearningTask, base: Path, rows: Rows, held_out: Rows, folder: Path) -> None:
        self.rows, self._task = rows, task
        self._held_out = held_out[:_JUDGED_ROWS]
        self._folder = folder
        self._model = task.load(base)
        self._replay = load_memory(base).reservoir.rows
        self._digest = hashlib.sha256(rows.tobytes() + self._replay.tobytes()).hexdigest()

    def shapes(self, lesson: Lesson) -> Shapes:
        moments = no_moments(self._model, lesson.recipe) if lesson.shared else {}
        return shapes_of({**weights_of(self._model), **moments})

    def learn(self, lesson: Lesson, weights: Tensors) -> Learnt:
        """Raises DivergedError. The same lesson again, as its round is tried again, gives the same."""
        start, moments = parted(weights)
        put_weights(self._model, start)
        judged = float(self._task.scores(self._model, self._held_out).losses.mean()) if len(self._held_out) else None
        with reproducible(lesson.recipe.seed + lesson.number):
            if lesson.shared:
                carried = loop.CarriedOptimisers(states_of(moments, lesson.number * lesson.local_steps))
                trained = self._train(lesson, carried)
                moments = moments_of(carried.states or [])
            else:
                trained = self._train_with_own(lesson)
        update = {name: value - start[name] for name, value in weights_of(self._model).items()}
        return Learnt({**update, **moments}, trained.curve[-1].train, judged)

    def forget(self) -> None:
        """Optimiser states of updates that are over."""
        for file in self._folder.glob(f"{_MOMENTS}.*"):
            file.unlink(missing_ok=True)

    def _train_with_own(self, lesson: Lesson) -> loop.Trained:
        moments = _Moments(self._folder, f"{lesson.key}|{self._digest}")
        carried = loop.CarriedOptimisers(moments.before(lesson.number))
        trained = self._train(lesson, carried)
        moments.keep(lesson.number, carried.states)
        return trained

    def _train(self, lesson: Lesson, carried: loop.CarriedOptimisers) -> loop.Trained:
        recipe, replay = lesson.recipe, self._replay
        first = lesson.number * lesson.local_steps
        rate = rise_and_fall(recipe.learning_rate, recipe.rise)
        work = loop.TrainingWork(
            self._model,
            self._loss(recipe, lesson.prox),
            islice(update_batches(self.rows, replay, recipe), first, first + lesson.local_steps),
            self._task.tokens,
        )
        settings = loop.TrainingSettings(
            loop.Bounds(steps=lesson.local_steps),
            lambda step, share: rate(first + step, (lesson.number + share) / lesson.rounds),
            recipe.optimiser,
            # A distance is no number in bf16: what a few steps move is below its last bit.
            arithmetic="float32" if lesson.prox else arithmetic(),
            clip=recipe.clip,
        )
        try:
            return loop.train(work, settings, carried=carried)
        finally:
            self._model.eval()

    def _loss(self, recipe: UpdateRecipe, prox: float) -> Callable[[Rows], torch.Tensor]:
        """The task's own, and FedProx: half of `prox` times the squared distance from the weights that the round began
        with. Li et al., 2020."""
        import torch

        model = self._model
        plain = self._task.loss(Training(model, model, recipe.replayed(len(self._replay)), 0.0, recipe.temperature))
        if not prox:
            return plain
        pairs = [(one, one.detach().clone()) for one in model.parameters() if one.requires_grad]

        def loss(batch: Rows) -> torch.Tensor:
            return plain(batch) + 0.5 * prox * torch.stack([((one - start) ** 2).sum() for one, start in pairs]).sum()

        return loss


class _Moments:
    """States of the optimisers before a round, by its number: that of a round that may be tried again stays until the
    next one has been learnt."""

    def __init__(self, folder: Path, key: str) -> None:
        name = f"{_MOMENTS}.{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        for file in folder.glob(f"{_MOMENTS}.*"):
            if not file.name.startswith(name):
                file.unlink(missing_ok=True)  # of another update, or other rows
        self._file = Resume(folder / name, key)
        self._known: dict[str, Any] = self._file.load() or {}

    def before(self, number: int) -> list[dict[str, Any]] | None:
        """The newest that is no newer than this round; a client may have missed some."""
        at = max((int(key) for key in self._known if int(key) <= number), default=None)
        return None if at is None else copy.deepcopy(self._known[str(at)])

    def keep(self, number: int, states: list[dict[str, Any]] | None) -> None:
        """After round `number`."""
        before = max((int(key) for key in self._known if int(key) <= number), default=None)
        kept = {} if before is None else {str(before): self._known[str(before)]}
        self._known = {**kept, str(number + 1): states}
        self._file.save(self._known)
