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
from runtime.record import Record

PAIRS = 768
_LINE, _BODY = 20, 40  # characters at least

Vectors = NDArray[np.float32]  # [texts, width]


class Retrieval(Record):
    """How well a docstring's first line finds its body among those of `pairs`: the mean reciprocal rank, and the share
    that is found among the first."""

    pairs: int
    mrr: float
    recall_at_1: float
    recall_at_10: float


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
    """`lines[i]` belongs to `bodies[i]`. Of equals, the right one comes last: vectors all alike find nothing."""
    similarity = _unit(lines) @ _unit(bodies).T
    ranks = (similarity >= np.diagonal(similarity)[:, None]).sum(axis=1)
    return Retrieval(
        pairs=len(lines),
        mrr=float((1 / ranks).mean()),
        recall_at_1=float((ranks <= 1).mean()),
        recall_at_10=float((ranks <= 10).mean()),
    )


def spearman(reference: Vectors, candidate: Vectors) -> float:
    """Rank correlation of the similarities of all pairs of texts."""
    upper = np.triu_indices(len(reference), k=1)
    first, second = (_ranks((_unit(vectors) @ _unit(vectors).T)[upper]) for vectors in (reference, candidate))
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """From 0; equals share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[inverse]  # type: ignore[no-any-return]


def _unit(vectors: Vectors) -> NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-30)  # type: ignore[no-any-return]
