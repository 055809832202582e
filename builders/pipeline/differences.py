"""One judged model beside another: figure by figure, with the word that its interval allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from builders.judging import intervals
from builders.judging.intervals import ConfidenceInterval, Verdict
from builders.pipeline.judged import StepFigures

Size = Literal["smaller", "larger", "equal"]


@dataclass(frozen=True)
class Difference:
    """`interval`: of the candidate's figure less the reference's on the same texts, or of a ratio of speeds, where 1
    is neutral; None for what is counted and not measured."""

    figure: str
    reference: float | None
    candidate: float
    interval: ConfidenceInterval | None
    verdict: Verdict | Size

    def __str__(self) -> str:
        was = "" if self.reference is None else f"{_number(self.reference)} -> "
        over = "" if self.interval is None else f" ({'' if self.reference is None else 'by '}{self.interval})"
        return f"{self.figure} {was}{_number(self.candidate)}: {self.verdict}{over}"


def differences(reference: StepFigures, candidate: StepFigures) -> tuple[Difference, ...]:
    """Both judged against the same original, on the same texts."""
    return (*_found(reference, candidate), *_near(reference, candidate), *sizes(reference, candidate))


def faster(candidate: StepFigures) -> tuple[Difference, ...]:
    """Against the model that it was judged against, by the interval over rounds."""
    return tuple(
        Difference(f"x {name}", None, speed, candidate.intervals[f"x {name}"], _over_one(candidate, name))
        for name, speed in candidate.speeds.items()
    )


def _over_one(candidate: StepFigures, executor: str) -> Verdict:
    return candidate.intervals[f"x {executor}"].against(1.0)


def _found(reference: StepFigures, candidate: StepFigures) -> Iterator[Difference]:
    before, after = reference.retrieval, candidate.retrieval
    if before is None or after is None:
        return
    for name, old, new in (
        ("MRR", before.reciprocal, after.reciprocal),
        ("recall@1", before.within(1), after.within(1)),
        ("recall@10", before.within(10), after.within(10)),
    ):
        over = intervals.of_difference(old, new)
        yield Difference(name, float(old.mean()), float(new.mean()), over, over.against(0.0))


def _near(reference: StepFigures, candidate: StepFigures) -> Iterator[Difference]:
    """Which is nearer to the original that both were judged against."""
    if reference.cosines and candidate.cosines:
        over = intervals.of_difference(reference.cosines, candidate.cosines)
        old, new = (sum(item.cosines) / len(item.cosines) for item in (reference, candidate))
        yield Difference("cosine", old, new, over, over.against(0.0))


class Sized(Protocol):
    """What is counted of any judged model."""

    @property
    def parameters(self) -> int: ...
    @property
    def stored_bytes(self) -> int: ...
    @property
    def graph_bytes(self) -> int: ...
    @property
    def flops_per_token(self) -> float: ...


def sizes(reference: Sized, candidate: Sized) -> Iterator[Difference]:
    for name, key in (
        ("weights", "parameters"), ("bytes stored", "stored_bytes"), ("bytes of the graph", "graph_bytes"),
        ("FLOPs a token", "flops_per_token"),
    ):  # fmt: skip
        old, new = float(getattr(reference, key)), float(getattr(candidate, key))
        yield Difference(name, old, new, None, "equal" if old == new else "smaller" if new < old else "larger")


def _number(value: float) -> str:
    return f"{value / 1e6:.2f} M" if abs(value) >= 1e5 else f"{value:.3f}"
