"""What embeddings are for: finding. A docstring's first line looks for its body among those of all others.

And whether texts that were near each other before still are. Pairs come from the packages of the standard library,
whose texts calibrate nothing: those are of its top-level modules. Few candidates flatter every model.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builders.artifacts import Artifact
from builders.judging import corpus
from builders.judging.intervals import ConfidenceInterval, Indices, of_figure
from runtime.record import Record

PAIRS = 768
_LINE, _BODY = 20, 40  # characters at least
_SPEARMAN_DRAWS = 200  # each ranks thousands of similarities

Vectors = NDArray[np.float32]  # [texts, width]


class Retrieval(Record):
    """How well a docstring's first line finds its body among those of all pairs: the mean reciprocal rank, and the
    share that is found among the first. `ranks`: where each line's own body stands, from 1."""

    ranks: tuple[int, ...]

    @property
    def pairs(self) -> int:
        return len(self.ranks)

    @property
    def reciprocal(self) -> NDArray[np.float64]:
        return 1 / np.asarray(self.ranks, np.float64)

    def within(self, first: int) -> NDArray[np.float64]:
        """1 for each line whose body is among the first so many."""
        return (np.asarray(self.ranks) <= first).astype(np.float64)

    @property
    def mrr(self) -> float:
        return float(self.reciprocal.mean())

    @property
    def recall_at_1(self) -> float:
        return float(self.within(1).mean())

    @property
    def recall_at_10(self) -> float:
        return float(self.within(10).mean())


class RetrievalFigures(Artifact):
    """Of one graph. No files: the figures are the result."""

    retrieval: Retrieval


def pairs() -> list[tuple[str, str]]:
    """`PAIRS` first lines with their bodies, no line or body twice, in an order that is stable and mixed."""
    found: dict[str, str] = {}
    for document in corpus.documents():
        if "/" not in document.name:  # a top-level module, or a topic of help()
            continue
        for passage in document.passages:
            line, _, rest = passage.partition("\n")
            line, body = " ".join(line.split()), " ".join(rest.split())
            if len(line) >= _LINE and len(body) >= _BODY and body not in found:
                found[body] = line
    once = {line: body for body, line in found.items()}
    return sorted(once.items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())[:PAIRS]


def retrieval(lines: Vectors, bodies: Vectors) -> Retrieval:
    """`lines[i]` belongs to `bodies[i]`. Of equals, the right one comes last: vectors all alike find nothing, and what
    is not a number is not found."""
    similarity = _unit(lines) @ _unit(bodies).T
    behind = similarity < np.diagonal(similarity)[:, None]
    return Retrieval(ranks=tuple((len(lines) - behind.sum(axis=1)).tolist()))


def spearman(reference: Vectors, candidate: Vectors) -> float:
    """Rank correlation of the similarities of all pairs of texts."""
    return _correlation(_similarities(reference), _similarities(candidate), np.arange(len(reference)))


def spearman_interval(reference: Vectors, candidate: Vectors) -> ConfidenceInterval:
    """Over the texts. A text that is drawn twice makes no pair with itself."""
    first, second = _similarities(reference), _similarities(candidate)
    return of_figure(len(reference), lambda chosen: _correlation(first, second, chosen), _SPEARMAN_DRAWS)


def _similarities(vectors: Vectors) -> NDArray[np.float64]:
    unit = _unit(vectors)
    return unit @ unit.T


def _correlation(first: NDArray[np.float64], second: NDArray[np.float64], chosen: Indices) -> float:
    left, right = np.triu_indices(len(chosen), k=1)
    left, right = chosen[left], chosen[right]
    pairs = left != right
    ranks = [_ranks(similarity[left[pairs], right[pairs]]) for similarity in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """From 0; equals share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[inverse]  # type: ignore[no-any-return]


def _unit(vectors: Vectors) -> NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-30)  # type: ignore[no-any-return]
