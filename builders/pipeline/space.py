"""What a search may choose, and the steps that a choice stands for: arithmetic on widths alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from builders.checkpoint.widths import Widths
from builders.compress.plan import FFN_MULTIPLE, break_even, multiples
from builders.errors import SpecError
from builders.spec import DistilSlice, LowRankSlice, PruneSlice, StepSlice

TOKENS = 8_000  # of calibration text for a step: a third of what a recipe takes unless told
_WIDTHS = 12  # how many widths of the feed-forward part, and ranks, there are to choose from at most


@dataclass(frozen=True)
class Choices:
    """Each from `step` to `most` in steps of `step`; a rank may be 0 as well, which leaves matrices whole."""

    layers: int
    heads: tuple[int, int]  # step, most
    ffn: tuple[int, int]
    rank: tuple[int, int]
    hidden: int

    @staticmethod
    def of(widths: Widths, tensor: int) -> Choices:
        """Of layers that are not all alike, what all of them have. Raises SpecError for fewer than ranks can share."""
        heads, ffn = min(layer.heads for layer in widths.layers), min(layer.ffn for layer in widths.layers)
        step = _coarse(ffn, multiples(tensor)["ffn"])
        even = break_even(widths.hidden, ffn)
        rank = _coarse(even, FFN_MULTIPLE * tensor)
        head_step = multiples(tensor)["heads"]
        if heads < head_step or ffn < step:
            raise SpecError(
                "search: parallel.tensor", got=f"{tensor} for {heads} heads and {ffn} neurons in a layer",
                expected=f"at most {heads} ranks, and {FFN_MULTIPLE} neurons for each", fix="lower parallel.tensor",
            )  # fmt: skip
        return Choices(
            layers=len(widths.layers),
            heads=(head_step, heads // head_step * head_step),
            ffn=(step, ffn // step * step),
            rank=(rank, even // rank * rank),
            hidden=widths.hidden,
        )

    def starts(self) -> list[dict[str, int]]:
        """Where a search begins: the whole model, half of its layers, and two thirds of its widths."""
        whole = {"layers": self.layers, "heads": self.heads[1], "ffn": self.ffn[1], "rank": 0}
        return [
            whole,
            {**whole, "layers": max(1, self.layers // 2)},
            {**whole, "heads": _share(self.heads), "ffn": _share(self.ffn)},
            {**whole, "rank": _share(self.rank)},
        ]

    def steps(self, chosen: Mapping[str, int]) -> tuple[StepSlice, ...]:
        """Layers first, then what is in them, then the products. None for the whole model. A rank that would save
        nothing at the chosen width is none."""
        found = []
        if chosen["layers"] < self.layers:
            kept = spread(self.layers, chosen["layers"])
            found.append(StepSlice(prune=PruneSlice(what=("layers",), keep_layers=kept, importance="magnitude")))
        what = [name for name, most in (("heads", self.heads[1]), ("ffn", self.ffn[1])) if chosen[name] < most]
        if what:
            exact = {name: chosen[name] for name in what}
            found.append(StepSlice.model_validate({"prune": {"what": what, **exact, "tokens": TOKENS}}))
        if 0 < chosen["rank"] < break_even(self.hidden, chosen["ffn"]):
            found.append(StepSlice(low_rank=LowRankSlice(rank=chosen["rank"], tokens=TOKENS)))
        return tuple(found)


def spread(layers: int, count: int) -> tuple[int, ...]:
    """`count` numbers of layers, evenly from the first to the last; each of them where there are no more."""
    if count >= layers:
        return tuple(range(layers))
    return tuple(round(number * (layers - 1) / max(count - 1, 1)) for number in range(count))


def _coarse(most: int, multiple: int) -> int:
    """The least multiple by which at most `_WIDTHS` steps lead to `most`."""
    return multiple * max(1, -(-most // (multiple * _WIDTHS)))


def _share(steps: tuple[int, int]) -> int:
    step, most = steps
    return min(most, max(step, most * 2 // 3 // step * step))


@dataclass(frozen=True)
class Tried:
    """One trial. `cosine` and `worst` on texts that neither calibrate nor judge; `speed`: of the original's, by CPU
    time, on the executor that serves. `missed`: keys of the budget that it misses, of those that a trial measures."""

    number: int
    steps: tuple[StepSlice, ...]
    cosine: float
    worst: float
    speed: float
    parameters: int
    missed: tuple[str, ...] = ()

    @property
    def told(self) -> str:
        return "; ".join(_told(step) for step in self.steps) or "the original"


def _told(step: StepSlice) -> str:
    if step.low_rank is not None:
        return f"{step.low_rank.parts} rank {step.low_rank.rank}"
    if step.distil is not None and step.distil.minutes is not None:
        return f"distil {step.distil.minutes:g} min"
    prune = step.prune
    if prune is None:
        return step.name
    if prune.keep_layers is not None:
        return f"layers {', '.join(map(str, prune.keep_layers))}"
    parts = [f"{name} {value}" for name, value in (("heads", prune.heads), ("ffn", prune.ffn)) if value is not None]
    return ", ".join(parts) or f"prune {prune.amount}"


LEFT_TO_TRAINING = frozenset({"min_mean_cosine", "min_worst_cosine"})  # keys of the budget that training may mend


def front(trials: Sequence[Tried], trained: bool = False) -> list[Tried]:
    """Those within the budget that no other of these beats in both speed and cosine, the fastest first. `trained`: they
    are to be, so that their cosines are not held against the budget yet."""
    mended = LEFT_TO_TRAINING if trained else frozenset()
    within = [one for one in trials if mended.issuperset(one.missed)]
    found: list[Tried] = []
    for each in sorted(within, key=lambda one: (-one.speed, -one.cosine)):
        if not found or each.cosine > found[-1].cosine:
            found.append(each)
    return found


def finalists(trials: Sequence[Tried], count: int, training: DistilSlice | None) -> list[Tried]:
    """Of the front: the fastest, as they are. With `training`, from end to end of it, since that mends the fastest by
    most: each with the step that trains it, but for the whole model, which has nothing to mend."""
    best = front(trials, trained=training is not None)
    if training is None:
        return best[:count]
    changed = [each for each in best if each.steps]
    step = StepSlice(distil=training)
    chosen = [changed[place] for place in spread(len(changed), count)]
    return [replace(each, steps=(*each.steps, step)) for each in chosen] or best
