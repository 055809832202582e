"""The loop of every training: any torch module, any loss, in bf16 where the CPU has it, with fp32 master weights.

It is bounded, stops at once when a number is none, and can be killed at any moment: from its last checkpoint it comes
to the very weights that it would have come to.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from builders.errors import DivergedError
from builders.training.arithmetic import Arithmetic
from builders.training.optimiser import Optimiser, Rate, optimisers, trained
from builders.training.recipe import LossPoint, TrainingProgress
from builders.training.resume import Resume

if TYPE_CHECKING:
    import torch

POINTS = 20  # of the loss curve
_EMA_START = 10  # an average over the last tenth of the steps so far, until that is longer than asked for

B = TypeVar("B")
Weights = list["torch.Tensor"]


@dataclass(frozen=True)
class Bounds:
    """One at least. `cpu_s` are seconds of all threads together, so that a busy machine trains longer, not less; with
    them alone, how many steps there will be is not known before."""

    steps: int | None = None
    cpu_s: float | None = None

    def share(self, steps: int, cpu_s: float) -> float:
        """How much is done, 1 when all is."""
        by_steps = steps / self.steps if self.steps is not None else 0.0
        by_time = cpu_s / self.cpu_s if self.cpu_s is not None else 0.0
        return min(1.0, max(by_steps, by_time))


@dataclass(frozen=True)
class TrainingSettings:
    """`clip`: the longest gradient. `ema`: decay of the average of weights that is the result, in place of the last
    weights. A loss above `ceiling` counts as diverged."""

    bounds: Bounds
    rate: Rate
    optimiser: Optimiser = field(default_factory=Optimiser)
    arithmetic: Arithmetic = "float32"
    clip: float | None = 1.0
    ema: float | None = None
    ceiling: float = math.inf


@dataclass(frozen=True)
class TrainingWork(Generic[B]):
    """What is trained: `loss` of a batch, a tensor that depends on the model's parameters; `size` of a batch in tokens;
    `judge`, the loss on what is held out, draws the curve.

    `batches` must be the same, and in the same order, whenever the training is resumed: those that were seen are
    passed over. They may end: so does the training.
    """

    model: Any
    loss: Callable[[B], torch.Tensor]
    batches: Iterable[B]
    size: Callable[[B], int]
    judge: Callable[[], float] | None = None


@dataclass(frozen=True)
class Trained:
    """`cpu_s` of all threads, over all resumed parts."""

    curve: tuple[LossPoint, ...]
    steps: int
    tokens: int
    cpu_s: float


@dataclass
class CarriedOptimisers:
    """States of the optimisers, from one training of the same parameters to the next: `train` begins with them, where
    there are some, and leaves its own."""

    states: list[dict[str, Any]] | None = None


def train(
    work: TrainingWork[B],
    settings: TrainingSettings,
    report: Callable[[TrainingProgress], None] = lambda progress: None,
    resume: Resume | None = None,
    carried: CarriedOptimisers | None = None,
) -> Trained:
    """Trains the parameters of `work.model` that require gradients, in place; it ends in fp32, in the mode it had.

    Raises DivergedError when a loss or a gradient is not a number, or too large; the model then has the last good
    weights. Call under `reproducible`. With a bound in steps alone the same weights come out each time.
    """
    run = _Run(work.model, settings)
    if carried is not None and carried.states is not None:
        run.take_up(carried.states)
    if resume is not None:
        run.restore(resume.load())
    for batch in itertools.islice(work.batches, run.steps, None):
        if run.share() >= 1:
            break
        loss = run.step(work.loss, batch, work.size(batch))
        if run.point_due():
            run.add_point(work.judge)
        held_out = run.curve[-1].held_out if run.curve else None
        report(TrainingProgress(run.steps, settings.bounds.steps, loss, held_out, run.share()))
        if resume is not None and resume.due() and run.finite():
            resume.save(run.state())
    found = run.end(work.judge)
    if carried is not None:
        carried.states = run.optimiser_states()
    return found


class _Run:
    """The state of a training between two steps."""

    def __init__(self, model: Any, settings: TrainingSettings) -> None:
        import torch

        self.steps, self.tokens = 0, 0
        self.curve: list[LossPoint] = []
        self._model, self._settings = model, settings
        self._losses: list[float] = []
        self._started, self._spent = time.process_time(), 0.0
        self._parameters = trained(model)
        self._masters = [parameter.detach().clone().requires_grad_() for parameter in self._parameters]
        self._optimisers = optimisers(model, self._masters, settings.optimiser, settings.arithmetic)
        self._average = None if settings.ema is None else [master.detach().clone() for master in self._masters]
        self._good: tuple[int, Weights] | None = None  # weights that gave a number
        self._good_due = True
        self._own = [
            (parameter, parameter.data) for parameter in model.parameters()
        ]  # those not trained end as they are
        # Parameters alone: `model.to` would round the rotary frequencies too, which a loaded model has in fp32.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, settings.arithmetic))

    def cpu_s(self) -> float:
        return self._spent + time.process_time() - self._started

    def share(self) -> float:
        return self._settings.bounds.share(self.steps, self.cpu_s())

    def step(self, loss_of: Callable[[B], torch.Tensor], batch: B, size: int) -> float:
        """One step of the masters along the model's gradients, copied back into the model."""
        import torch

        rate = self._settings.rate(self.steps, self.share())
        loss = loss_of(batch)
        value = loss.item()
        if not value <= self._settings.ceiling or math.isinf(value):
            raise self._diverged(f"loss {value:.4g}")
        loss.backward()  # type: ignore[no-untyped-call]
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            master.grad, parameter.grad = None if parameter.grad is None else parameter.grad.float(), None
        longest = math.inf if self._settings.clip is None else self._settings.clip
        length = torch.nn.utils.clip_grad_norm_(self._masters, longest).item()
        if not math.isfinite(length):
            raise self._diverged(f"loss {value:.4g} with a gradient of length {length}")
        if self._good_due:
            self._good, self._good_due = (self.steps, [master.detach().clone() for master in self._masters]), False
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
        self._write(self._masters)
        self.steps, self.tokens = self.steps + 1, self.tokens + size
        self._losses.append(value)
        self._follow()
        return value

    def _follow(self) -> None:
        import torch

        if self._average is None or self._settings.ema is None:
            return
        decay = min(self._settings.ema, (1 + self.steps) / (_EMA_START + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(self._average, self._masters, 1 - decay)

    def point_due(self) -> bool:
        """At each twentieth, and at the end."""
        return math.floor(self.share() * POINTS + 1e-9) > len(self.curve)

    def add_point(self, judge: Callable[[], float] | None) -> None:
        import torch

        with torch.no_grad():
            held_out = None if judge is None else judge()
        mean = sum(self._losses) / len(self._losses)
        self.curve.append(LossPoint(step=self.steps, tokens=self.tokens, train=mean, held_out=held_out))
        self._losses.clear()
        self._good_due = True  # once the next loss shows that these weights are sound

    def finite(self) -> bool:
        import torch

        return all(bool(torch.isfinite(master).all()) for master in self._masters)

    def end(self, judge: Callable[[], float] | None) -> Trained:
        if self._losses:  # batches ran out between two points
            self.add_point(judge)
        if not self.finite():
            raise self._diverged("weights that are not numbers")
        self._finish(self._masters if self._average is None else self._average)
        return Trained(tuple(self.curve), self.steps, self.tokens, self.cpu_s())

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, but for the batches."""
        import torch

        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "cpu_s": self.cpu_s(),
            "curve": [point.model_dump() for point in self.curve],
            "losses": list(self._losses),
            "masters": [master.detach() for master in self._masters],
            "average": self._average,
            "buffers": list(self._model.buffers()),
            "optimisers": self.optimiser_states(),
            "random": torch.get_rng_state(),
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        import torch

        if state is None:
            return
        self.steps, self.tokens, self._spent = state["steps"], state["tokens"], state["cpu_s"]
        self.curve = [LossPoint(**point) for point in state["curve"]]
        self._losses = state["losses"]
        with torch.no_grad():
            kept = [(self._masters, state["masters"]), (list(self._model.buffers()), state["buffers"])]
            if self._average is not None:
                kept.append((self._average, state["average"]))
            for own, saved in kept:
                for target, value in zip(own, saved, strict=True):
                    target.copy_(value)
        self.take_up(state["optimisers"])
        torch.set_rng_state(state["random"])
        self._write(self._masters)

    def optimiser_states(self) -> list[dict[str, Any]]:
        return [optimiser.state_dict() for optimiser in self._optimisers]

    def take_up(self, states: list[dict[str, Any]]) -> None:
        """The tensors of `states` are moved on, not copied. How fast they move is this training's word."""
        for optimiser, saved in zip(self._optimisers, states, strict=True):
            optimiser.load_state_dict({**optimiser.state_dict(), "state": saved["state"]})

    def _diverged(self, got: str) -> DivergedError:
        step, weights = self._good or (self.steps, [master.detach() for master in self._masters])
        self._finish(weights)
        return DivergedError(
            f"training diverged at step {self.steps + 1}: {got}. The last good weights are those of step {step}; "
            "lower the learning rate"
        )

    def _finish(self, weights: Weights) -> None:
        for parameter, own in self._own:
            parameter.data = own
        self._write(weights)

    def _write(self, weights: Weights) -> None:
        import torch

        with torch.no_grad():
            for weight, parameter in zip(weights, self._parameters, strict=True):
                parameter.copy_(weight)
