"""Self-distillation: a model's last layer teaches it to end after fewer layers.

Zhang et al. 2019, "Be Your Own Teacher". Exits learn the states and vectors of the model's own last layer as they are
at that step; no gradient goes that way. The last layer is held to the original, so that it does not come to meet them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from builders.artifacts import Checkpoint
from builders.checkpoint.widths import layers_of
from builders.compress import losses, prune
from builders.compress.distil import DistilLesson, Teaching, draw, lessons_of, taught
from builders.compress.distil_plan import losses_of
from builders.compress.importance import Forward
from builders.compress.judged import by_text
from builders.compress.teacher import TeacherStates
from builders.compress.texts import WATCHED, CalibrationText
from builders.spec import DistilSlice

if TYPE_CHECKING:
    import torch

Vectors = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]  # of states and their mask
_PROBE = 64  # watched texts behind each point of the curve


def distil_exits(
    asked: DistilSlice,
    model: Any,
    ways: tuple[Callable[[Any], Forward], Vectors],
    checkpoint: Checkpoint,
    texts: CalibrationText,
    teaching: Teaching,
) -> list[str]:
    """Trains `model` in place, and leaves of it the first layers, up to `asked.exit`. `ways`: from inputs to vectors,
    and from states after a layer to vectors. The notes tell of each exit.

    Raises InputError for texts that do not suffice, DivergedError for exits that training made no better.
    """
    import torch

    if teaching.numbers == "bfloat16":  # as distil does
        model.set_attn_implementation("eager")
    lessons, watched = lessons_of(asked, checkpoint, texts)
    measure = Exits(asked, model, ways, teaching)
    probe = Exits(asked, model, ways, teaching, "probe")
    shown = watched[: max(1, len(watched) * _PROBE // WATCHED)]
    with torch.no_grad():
        wanted = torch.cat([teaching.forward(**lesson.batch) for lesson in watched]).numpy()

    def judged() -> float:
        with torch.no_grad():
            return float(np.mean([probe.loss(lesson).item() for lesson in shown]))

    def cosines() -> dict[int, Any]:
        return {exit: by_text(wanted, found) for exit, found in measure.outputs(watched).items()}

    before = cosines()
    found, rate = taught(asked, model, measure.loss, lessons, judged, teaching)
    after = cosines()
    notes = [
        f"{found.tokens:,} tokens in {found.steps:,} steps, of a text of {sum(each.tokens for each in lessons):,}; "
        f"{found.cpu_s:.0f} CPU-seconds; {teaching.numbers}; loss {found.curve[0].train:.4g} -> "
        f"{found.curve[-1].train:.4g}; cosines to the original of {len(wanted)} texts that it did not see",
        *(
            f"{'the last layer' if exit == measure.last else f'exit {exit}'}: mean {before[exit].mean():.4f} -> "
            f"{after[exit].mean():.4f}, worst {before[exit].min():.4f} -> {after[exit].min():.4f}"
            for exit in after
        ),
        rate,
    ]
    draw(teaching, checkpoint, notes, found)
    assert asked.exit is not None
    prune.keep_layers(model, range(asked.exit))
    return notes


class Exits:
    """The loss of a batch, and the vectors at each exit. An exit's number is that of the layers before it."""

    def __init__(
        self, asked: DistilSlice, model: Any, ways: tuple[Callable[[Any], Forward], Vectors], teaching: Teaching,
        side: str = "learnt",
    ) -> None:  # fmt: skip
        as_forward, self._vectors = ways
        self._model, self._forward = model, as_forward(model)
        self._weights = losses_of(asked, "embedding").given
        self._exits, self.last = asked.exits or (), len(layers_of(model))
        its = len(layers_of(teaching.model)) - 1
        states = [its] if "token_mse" in self._weights else []
        self._its = its
        self._teacher = TeacherStates(
            teaching.model, teaching.forward, losses.Wanted(states), teaching.numbers, teaching.states / side
        )

    def loss(self, lesson: DistilLesson) -> torch.Tensor:
        """That of the last layer to the original, and the mean of the exits' to the last layer."""
        original = self._teacher.of(lesson.number, lesson.batch)
        seen = self._look(lesson)
        states, vectors = seen[self.last]
        whole = self._far(states, vectors, original.states.get(self._its), original.output)
        each = [self._far(*seen[exit], states.detach(), vectors.detach()) for exit in self._exits]
        return whole + sum(each[1:], each[0]) / len(each)

    def outputs(self, lessons: Sequence[DistilLesson]) -> dict[int, Any]:
        """[texts, width] at each exit, and after the last layer."""
        import torch

        with torch.no_grad():
            found = [{exit: vectors for exit, (_, vectors) in self._look(lesson).items()} for lesson in lessons]
        return {exit: torch.cat([each[exit] for each in found]).numpy() for exit in found[0]}

    def _look(self, lesson: DistilLesson) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """States of real tokens, and vectors."""
        numbers = (*self._exits, self.last)
        seen = losses.look(self._model, self._forward, lesson.batch, losses.Wanted([exit - 1 for exit in numbers]))
        mask = lesson.batch["attention_mask"]
        found = {exit: (seen.states[exit - 1], self._of(seen.states[exit - 1], mask)) for exit in self._exits}
        return found | {self.last: (seen.states[self.last - 1], seen.output)}

    def _of(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Vectors of packed states."""
        padded = states.new_zeros(*mask.shape, states.shape[1])
        return self._vectors(padded.masked_scatter(mask.bool()[..., None], states), mask)

    def _far(
        self, states: torch.Tensor, vectors: torch.Tensor, wanted: torch.Tensor | None, output: torch.Tensor
    ) -> torch.Tensor:
        def one(name: str) -> torch.Tensor:
            if name == "token_mse":
                assert wanted is not None
                return losses.squared_error(states, wanted)
            return {"embedding_cosine": losses.embedding_cosine, "similarity": losses.similarity}[name](vectors, output)

        parts = [weight * one(name) for name, weight in self._weights.items()]
        return sum(parts[1:], parts[0])
