"""Runs a version's proof through the model's own gRPC port, before the version counts as served.

Nothing is believed from the build alone: CPUs differ in their arithmetic, GPUs in their engines, libraries in their
faults. What is asked is what a client asks, so the tokenizer, the batching, the executor, the ranks and the way of
tensors through Triton are all in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.errors import UNPROVEN, BadEnvironment, NotProven, ProofOverdue
from runtime.proof.judging import Figure, figures_text, within
from runtime.proof.proven import Proven
from runtime.proof.record import EncoderProof, GeneratorProof, Proof, ProofRow, load_proof
from runtime.settings import ServerSettings

LIMIT_S = 180.0  # of a whole proof; below the time after which a launcher that does nothing else counts as dead
REPORT_EVERY_S = 10.0


class ModelPort(Protocol):
    """One version of one model, as its clients reach it. Both raise what the port's client raises, and NotProven for
    answers of a shape that no sound model gives."""

    def vectors(self, proof: EncoderProof, rows: Sequence[int], timeout_s: float) -> NDArray[np.float32]:
        """[rows, width] for these of the proof's texts, in one request."""

    def logprobs(self, rows: Sequence[ProofRow], timeout_s: float) -> Iterator[tuple[int, list[float]] | None]:
        """Place in `rows` and log-probabilities of its output, teacher-forced, as they come; all under way at once.

        None now and then while none has come, so that the proof can be given up.
        """


@dataclass(frozen=True)
class Watch:
    """How far a proof may go. `report` hears of a proof that takes long; `stopped` says that nobody waits any more."""

    limit_s: float = LIMIT_S
    clock: Callable[[], float] = time.monotonic
    report: Callable[[str], None] = lambda message: None
    stopped: Callable[[], bool] = lambda: False


def measure(proof: Proof, port: ModelPort, watch: Watch) -> tuple[Figure, ...]:
    """The figures of the served model. Raises ProofOverdue, and what the port raises."""
    progress = _Progress(watch, len(proof.texts) if isinstance(proof, EncoderProof) else len(proof.rows))
    if isinstance(proof, EncoderProof):
        return proof.judge(_vectors(proof, port, progress))
    return proof.judge(_logprobs(proof, port, progress))


def _vectors(proof: EncoderProof, port: ModelPort, progress: _Progress) -> NDArray[np.float32]:
    """One request after the other: a server that has just started may have a short queue."""
    found = []
    for start in range(0, len(proof.texts), proof.rows_per_request):
        rows = range(start, min(start + proof.rows_per_request, len(proof.texts)))
        found.append(port.vectors(proof, rows, progress.left_s()))
        progress.done(len(rows))
    if len({vectors.shape[1:] for vectors in found}) > 1:
        return np.empty(0, np.float32)  # of no shape that a reference has
    return np.concatenate(found)


def _logprobs(proof: GeneratorProof, port: ModelPort, progress: _Progress) -> list[list[float]]:
    found: list[list[float]] = [[] for _ in proof.rows]
    for start in range(0, len(proof.rows), proof.at_once):
        rows = proof.rows[start : start + proof.at_once]
        for came in port.logprobs(rows, progress.left_s()):
            if came is not None:
                found[start + came[0]] = came[1]
            progress.done(came is not None)
            progress.left_s()
    return found


class _Progress:
    """The clock of one proof."""

    def __init__(self, watch: Watch, count: int) -> None:
        self._watch, self._count, self._done = watch, count, 0
        self._begun = self._said = watch.clock()

    def left_s(self) -> float:
        """Raises ProofOverdue when the time is over, or when nobody waits for the proof any more."""
        seconds = self._watch.clock() - self._begun
        if seconds >= self._watch.limit_s or self._watch.stopped():
            raise ProofOverdue(f"the proof has {self._done} of {self._count} rows after {seconds:.0f} s")
        return self._watch.limit_s - seconds

    def done(self, rows: int) -> None:
        self._done += rows
        now = self._watch.clock()
        if now - self._said >= REPORT_EVERY_S:
            self._said = now
            self._watch.report(f"proof: {self._done} of {self._count} rows after {now - self._begun:.0f} s")


@dataclass
class Prover:
    """Knows which version is proven. `port` opens the way to one; `settings_of(version)` are what it was published
    with, None where nobody published it."""

    repository: Path
    port: Callable[[ServerSettings], ModelPort]
    settings_of: Callable[[int], ServerSettings | None]
    watch: Watch
    proven: Proven | None = None

    def forget(self) -> None:
        """The models were loaded again, so what was proven of them is of the past."""
        self.proven = None

    def prove(self, version: int) -> ServerSettings | None:
        """Returns when the version is proven: its settings, or None where it was before.

        Raises NotProven with the figures, ProofOverdue, and what the port raises.
        """
        if self.proven is not None and self.proven.version == version:
            return None
        try:
            settings = self.settings_of(version)
            if settings is None:
                raise NotProven(f"version {version} answers, which nobody published in {self.repository}")
            proof = load_proof(self.repository, settings)
        except BadEnvironment as error:
            raise NotProven(str(error)) from error
        begun = self.watch.clock()
        figures = measure(proof, self.port(settings), self.watch)
        seconds = self.watch.clock() - begun
        what, count = ("texts", len(proof.texts)) if isinstance(proof, EncoderProof) else ("prompts", len(proof.rows))
        if not within(figures):
            raise NotProven(
                f"{settings.ensemble} version {version} {UNPROVEN}: {figures_text(figures)}, on "
                f"{count} {what} through its own port, against the fp32 reference of the build"
            )
        self.proven = Proven.of(settings, figures, f"{count} {what}", seconds)
        return settings
