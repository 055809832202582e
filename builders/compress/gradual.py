"""Zeros that grow in number while a model is trained, and stay where they are for the rest of the training.

The share rises as a cubic, fast while there is much to choose from (Zhu and Gupta 2017, "To prune, or not to prune").
Of each row, the smallest weights are zero. What they were stays with the training, which goes on to move it by the
gradients of the model with its zeros (Lin et al. 2020, "Dynamic Model Pruning with Feedback"): a weight may come back
until the last choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from builders.compress.inputs import matrices_of
from builders.compress.sparsify import keep
from builders.spec import GradualSlice, SparsifySlice
from builders.training.loop import TrainingWork
from builders.training.recipe import TrainingProgress

if TYPE_CHECKING:
    import torch

B = TypeVar("B")
Report = Callable[[TrainingProgress], None]
_STAYS, _STATE = "weights_that_stay", "state_of_zeros"  # buffers, so that a checkpoint of the training has them
_SHARE, _STEPS, _HELD = range(3)  # of _STATE: how much of the training is done; steps; whether the choice is the last


def zeros_at(asked: GradualSlice, share: float) -> float:
    """The share of weights that is zero when `share` of the training is done."""
    done = min(1.0, share / asked.until)
    return asked.amount * (1 - (1 - done) ** 3)


def largest(weight: torch.Tensor, zeros: float) -> torch.Tensor:
    """True for the weights [rows, columns] that stay; all where a row has less than half a weight to lose."""
    import torch

    if not zeros:
        return torch.ones_like(weight, dtype=torch.bool)
    return keep(weight.detach().float().abs(), SparsifySlice(pattern="unstructured", amount=zeros, method="magnitude"))


@contextmanager
def at_once(model: Any, asked: GradualSlice | None) -> Iterator[None]:
    """All of the zeros for a while, by the weights as they are: what a training has to better."""
    if asked is None:
        yield
        return
    modules = list(matrices_of(model).values())
    with _without([(module.weight, largest(module.weight, asked.amount)) for module in modules]):
        yield


@contextmanager
def rising(
    model: Any, asked: GradualSlice | None, work: TrainingWork[B], report: Report
) -> Iterator[tuple[TrainingWork[B], Report]]:
    """The work and the report to train with; behind it, the model has its zeros. Nothing changes where none are asked
    for."""
    if asked is None:
        yield work, report
        return
    zeros = _Rising(model, asked)
    try:
        yield replace(work, loss=zeros.before(work.loss), judge=zeros.around(work.judge)), zeros.followed_by(report)
        zeros.settle()
    finally:
        zeros.forget()


def zeros_note(model: Any, asked: GradualSlice | None) -> list[str]:
    if asked is None:
        return []
    weights = [module.weight for module in matrices_of(model).values()]
    share = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    return [
        f"{share:.1%} of the layers' weights are 0, chosen for the last time after {asked.until:.0%} of the training; "
        "the figures before it are of as many zeros at once. No file is smaller and no answer faster here"
    ]


class _Rising:
    """Before each forward pass the model's copies of small weights become zero; the loop writes them anew from what
    it trains."""

    def __init__(self, model: Any, asked: GradualSlice) -> None:
        import torch

        self._model, self._asked = model, asked
        self._modules = list(matrices_of(model).values())
        for module in self._modules:
            module.register_buffer(_STAYS, torch.ones_like(module.weight, dtype=torch.bool), persistent=False)
        model.register_buffer(_STATE, torch.zeros(3, dtype=torch.float64), persistent=False)
        self._state = getattr(model, _STATE)
        self._hooks = [module.weight.register_hook(self._gradient_of(module)) for module in self._modules]

    def before(self, loss: Callable[[B], torch.Tensor]) -> Callable[[B], torch.Tensor]:
        def of_batch(batch: B) -> torch.Tensor:
            self._renew()
            self._apply()
            return loss(batch)

        return of_batch

    def around(self, judge: Callable[[], float] | None) -> Callable[[], float] | None:
        """Weights come back behind it: the next choice is among all of them."""
        if judge is None:
            return None
        asked = judge

        def judged() -> float:
            with _without([(module.weight, getattr(module, _STAYS)) for module in self._modules]):
                return asked()

        return judged

    def followed_by(self, report: Report) -> Report:
        def told(progress: TrainingProgress) -> None:
            self._state[_SHARE], self._state[_STEPS] = progress.share, progress.step
            report(progress)

        return told

    def settle(self) -> None:
        """The result's zeros: an average of weights has values where zeros once were not."""
        if not self._state[_HELD]:  # a training of a few steps
            self._choose(self._asked.amount)
        self._apply()

    def forget(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for module, name in (*((module, _STAYS) for module in self._modules), (self._model, _STATE)):
            delattr(module, name)

    def _renew(self) -> None:
        share, steps, held = self._state.tolist()
        if held:
            return
        if share >= self._asked.until:
            self._choose(self._asked.amount)
            self._state[_HELD] = 1
        elif steps % self._asked.every == 0:
            self._choose(zeros_at(self._asked, share))

    def _choose(self, zeros: float) -> None:
        for module in self._modules:
            getattr(module, _STAYS).copy_(largest(module.weight, zeros))

    def _apply(self) -> None:
        import torch

        with torch.no_grad():
            for module in self._modules:
                module.weight.mul_(getattr(module, _STAYS))

    def _gradient_of(self, module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        """Where zeros stay for good, none is learnt."""
        return lambda gradient: gradient * getattr(module, _STAYS) if self._state[_HELD] else gradient


@contextmanager
def _without(weights: list[tuple[Any, torch.Tensor]]) -> Iterator[None]:
    """Zeros where a weight does not stay, for a while."""
    import torch

    before = [weight.detach().clone() for weight, _ in weights]
    with torch.no_grad():
        for weight, stays in weights:
            weight.mul_(stays)
    try:
        yield
    finally:
        with torch.no_grad():
            for (weight, _), value in zip(weights, before, strict=True):
                weight.copy_(value)
