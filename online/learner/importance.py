"""How much each weight matters to what a version learnt: a guard for where old rows may not be kept.

Kirkpatrick et al., 2017, "Overcoming catastrophic forgetting" (elastic weight consolidation); Schwarz et al., 2018
(one sum for all that was learnt, around the newest weights). The Fisher matrix is the empirical one: of the rows' own
words or labels, not of words that the model draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from builders.training.optimiser import trained
from online.learner.memory import FOLDER
from online.learner.recipe import UpdateRecipe
from online.tasks.task import LearningTask, Rows, Training
from runtime.errors import InputError

if TYPE_CHECKING:
    import torch

FILE = f"{FOLDER}/importance.safetensors"
MOST_ROWS = 128  # of a domain: each takes a step of its own, backwards too

Importance = Mapping[str, "torch.Tensor"]  # by the parameter's name, in its shape, fp32


def importance_of(task: LearningTask, model: Any, rows: Rows, recipe: UpdateRecipe) -> dict[str, torch.Tensor]:
    """The diagonal of the empirical Fisher matrix of rows, in the scale of the task's loss: half of it times a squared
    distance is by how many nats the mean loss rises, where that is a parabola. `model` stays as it is.

    A loss is a mean over what is predicted; its squared gradient is smaller by their number than that of one of them.
    """
    import torch

    chosen = np.random.default_rng([recipe.seed, 3]).permutation(len(rows))[:MOST_ROWS]
    together = min(task.together, len(chosen))
    batches = [chosen[first : first + together] for first in range(0, len(chosen) - together + 1, together)]
    loss = task.loss(Training(model, model, 0, 0.0, recipe.temperature))
    model.eval()
    found = {name: torch.zeros_like(one, dtype=torch.float32) for name, one in _moved(model)}
    for places in batches:
        loss(rows[places]).backward()  # type: ignore[no-untyped-call]
        for name, one in _moved(model):
            if one.grad is not None:
                found[name] += one.grad.float().square()
                one.grad = None
    scale = task.predictions * together / len(batches)
    return {name: value * scale for name, value in found.items()}


def _moved(model: Any) -> list[tuple[str, Any]]:
    moved = {id(one) for one in trained(model)}
    return [(name, one) for name, one in model.named_parameters() if id(one) in moved]


def added(first: Importance, second: Importance) -> dict[str, torch.Tensor]:
    return {name: value + second[name] for name, value in first.items()}


def save_importance(found: Importance, folder: Path) -> None:
    """Beside the memory of a version's folder that is being written."""
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in found.items()}, folder / FILE)


def known_importance(
    task: LearningTask, version: Path, model: Any, replayable: Rows, recipe: UpdateRecipe
) -> dict[str, torch.Tensor]:
    """Of all that the version learnt: as it was kept, or by the rows that it keeps. Raises InputError where there is
    neither, or where the file is of another model."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = version / FILE
    if not file.is_file():
        if len(replayable):
            return importance_of(task, model, replayable, recipe)
        raise InputError(
            "online.learner.ewc", got=f"{version}, which has neither {FILE} nor rows of its past",
            expected="what its weights matter to", fix="leave ewc out, or begin anew with it: remove the loop's folder",
        )  # fmt: skip
    try:
        found: dict[str, torch.Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise _refused(file, f"{type(error).__name__}: {error}") from error
    shapes = {name: one.shape for name, one in _moved(model)}
    if {name: value.shape for name, value in found.items()} != shapes:
        raise _refused(file, "other weights, or other shapes, than those that an update moves")
    return found


def _refused(file: Path, got: str) -> InputError:
    return InputError(
        f"importance of weights {file}", got=got, expected="one tensor for each weight that an update moves",
        fix="remove the file: it is made anew from rows that the version keeps, where it keeps some",
    )  # fmt: skip


def held(
    loss: Callable[[Rows], torch.Tensor], model: Any, importance: Importance, strength: float
) -> Callable[[Rows], torch.Tensor]:
    """And half of `strength` times the squared distance from the weights as they are now, each as it matters."""
    pairs = [(one, one.detach().clone(), importance[name]) for name, one in _moved(model)]

    def of(batch: Rows) -> torch.Tensor:
        import torch

        distance = torch.stack([(matters * (one - start) ** 2).sum() for one, start, matters in pairs]).sum()
        return loss(batch) + 0.5 * strength * distance

    return of
