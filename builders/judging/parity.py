"""A graph with caches against the eager model: many steps, with rows at positions of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builders.errors import ParityError
from builders.judging.perplexity import Constants, DecoderSession, Ids

ROWS, LENGTH = 4, 48
_DECODE_STEPS = 12
_MAX_FP32_DIFFERENCE = 1e-4  # of the logits, relative to the largest
_MIN_FP16_COSINE = 0.999  # of the logits of one row


def require_parity(
    file: Path, rows: Ids, expected: NDArray[Any], precision: str, what: str,
    constants: Constants | None = None,
) -> float:  # fmt: skip
    """Largest difference of the logits to `expected` [rows, length, vocabulary], relative to the largest of these.

    Raises ParityError with the figures.
    """
    with _running(what):
        session = DecoderSession(file, len(rows), 2 * rows.shape[1], constants)
    everyone = np.arange(len(rows))
    difference, cosine = 0.0, 1.0
    for counts in plan_steps(*rows.shape):
        with _running(what):
            logits = session.step(_next_tokens(rows, session.positions, counts), counts)[0].astype(np.float64)
        wanted = expected[everyone, session.positions - 1].astype(np.float64)
        difference = max(difference, float(np.nan_to_num(np.abs(logits - wanted), nan=np.inf).max()))
        norms = np.linalg.norm(logits, axis=1) * np.linalg.norm(wanted, axis=1)
        cosine = min(cosine, float(np.nan_to_num((logits * wanted).sum(axis=1) / np.maximum(norms, 1e-30)).min()))
    difference /= float(np.abs(expected).max())
    good = difference <= _MAX_FP32_DIFFERENCE if precision == "fp32" else cosine >= _MIN_FP16_COSINE
    if not good:
        raise ParityError(
            f"{precision} graph of {what}: logits differ from eager fp32 by {difference:.2e} of the largest, worst "
            f"cosine {cosine:.6f}, over prefill, chunked prefill and decode of {len(rows)} rows; limit "
            f"{f'{_MAX_FP32_DIFFERENCE:.0e}' if precision == 'fp32' else f'cosine {_MIN_FP16_COSINE}'}. "
            + ("The graph is not used" if precision == "fp32" else "The model does not fit fp16; use fp32 or w8")
        )
    return difference


@contextmanager
def _running(what: str) -> Iterator[None]:
    """Raises ParityError for a graph that ONNX Runtime does not take at all."""
    try:
        yield
    except Exception as error:  # ONNX Runtime has an exception of its own for each status, all of them plain ones
        raise ParityError(
            f"graph of {what}: ONNX Runtime cannot run it ({' '.join(str(error).split())[:300]}); the graph is not used"
        ) from error


def plan_steps(rows: int, length: int) -> list[Ids]:
    """Tokens that each row takes in each run: two uneven chunks of prefill, then one token at a time.

    Rows come to stand at different positions. Each takes at least one token a run, and `length` at most in all; the
    first takes exactly that.
    """
    decode = min(_DECODE_STEPS, length - 2)
    prefill = length - decode
    totals = np.array([max(2, prefill - row * prefill // (rows + 1)) for row in range(rows)])
    first = np.maximum(1, totals * (1 + np.arange(rows) % 3) // 4)
    return [first, totals - first, *[np.ones(rows, np.int64)] * decode]


def _next_tokens(rows: Ids, positions: Ids, counts: Ids) -> Ids:
    """[rows, longest count], padded on the right with tokens that must not matter."""
    ids = np.full((len(rows), int(counts.max())), rows[0, 0])
    for row, (start, count) in enumerate(zip(positions, counts, strict=True)):
        ids[row, :count] = rows[row, start : start + count]
    return ids
