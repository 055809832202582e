"""Logits to tokens, over all rows at once.

Greedy rows cost one argmax and no copy. The others are copied, [rows, vocabulary], and go through, in this order:
biases; penalties; end tokens barred while the output is too short; what a grammar does not allow barred; temperature;
top-k; top-p over what is left; min-p; one draw. A draw uses one random number of the sequence's own generator (Philox),
so it does not depend on its neighbours. A token that the caller has fixed takes the place of what came out.
Log-probabilities are of the logits as the model gave them, before all that.

The filters keep every token whose probability is at least a threshold, so tokens of equal probability stay together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.generation.request import ScoredToken, Tokens, Top
from runtime.generation.sequence import TokenSequence

Logits = NDArray[np.float32]

_COLDEST = 1e-5  # a temperature below it is greedy anyway
_BLOCK = 128  # of the two-level search through a cumulative sum
_NEVER = -9999.0  # told of a token whose probability is 0: JSON has no infinity
_NO_TOP: Top = ()


def sample(logits: Logits, sequences: Sequence[TokenSequence]) -> tuple[list[int], list[float], list[Top]]:
    """One token for each row of [rows, vocabulary], its log-probability (0.0 where nobody asked), and the likeliest
    tokens, where somebody asked.

    A row with a logit that is not a number gives token -1: nothing can be chosen from it. `logits` stays as it is.
    """
    special = [row for row, sequence in enumerate(sequences) if not sequence.plain]
    every = len(special) == len(sequences)
    tokens = np.empty(len(sequences), np.int64) if every else logits.argmax(axis=1)  # the place of a NaN, if any
    if special:
        tokens[special] = _choose(logits[special], [sequences[row] for row in special])
    broken = ~np.isfinite(logits[np.arange(len(tokens)), tokens])
    logprobs, tops = [0.0] * len(tokens), [_NO_TOP] * len(tokens)
    asked = [row for row in special if sequences[row].request.params.logprobs]
    if asked:
        counts = [sequences[row].request.params.top_logprobs for row in asked]
        for row, value, top in zip(asked, *score(logits[asked], tokens[asked], counts), strict=True):
            logprobs[row], tops[row] = value, top
    tokens[broken] = -1
    return tokens.tolist(), logprobs, tops


def _choose(logits: Logits, sequences: Sequence[TokenSequence]) -> NDArray[np.int64]:
    for row, sequence in enumerate(sequences):
        for token, bias in sequence.request.params.logit_bias:
            logits[row, token] += bias
    _penalise(logits, sequences)
    for row, sequence in enumerate(sequences):
        if sequence.held:
            logits[row, list(sequence.end_ids)] = -np.inf
        if sequence.guide is not None:
            sequence.guide.bar(logits[row])
    tokens: NDArray[np.int64] = logits.argmax(axis=1)
    drawn = [
        row
        for row, sequence in enumerate(sequences)
        if sequence.request.params.temperature > 0 and np.isfinite(logits[row, tokens[row]])
    ]
    if drawn:
        rows = logits if len(drawn) == len(sequences) else logits[drawn]
        tokens[drawn] = _draw(rows, rows[np.arange(len(drawn)), tokens[drawn]], [sequences[row] for row in drawn])
    for row, sequence in enumerate(sequences):
        if sequence.forced is not None:
            tokens[row] = sequence.forced
    return tokens


def _penalise(logits: Logits, sequences: Sequence[TokenSequence]) -> None:
    """In place. One fancy index over the tokens of all rows; a token that occurs twice is written twice, alike."""
    rows, ids, factors = _occurrences(sequences, "repetition_penalty", 1.0, whole=True)
    if len(rows):
        values = logits[rows, ids]
        logits[rows, ids] = np.where(values > 0, values / factors, values * factors)
    rows, ids, amounts = _occurrences(sequences, "presence_penalty", 0.0, whole=False)
    if len(rows):
        logits[rows, ids] = logits[rows, ids] - amounts
    rows, ids, amounts = _occurrences(sequences, "frequency_penalty", 0.0, whole=False)
    if len(rows):
        np.subtract.at(logits, (rows, ids), amounts)


def _occurrences(
    sequences: Sequence[TokenSequence], name: str, off: float, *, whole: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Row, token and penalty of each token so far: of prompt and output, or of the output alone."""
    rows, ids, amounts = [], [], []
    for row, sequence in enumerate(sequences):
        amount = getattr(sequence.request.params, name)
        if amount != off:
            tokens = sequence.buffer[0 if whole else sequence.prompt_length : sequence.length]
            ids.append(tokens)
            rows.append(np.full(len(tokens), row))
            amounts.append(np.full(len(tokens), amount, np.float32))
    if not ids:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    return np.concatenate(rows), np.concatenate(ids), np.concatenate(amounts)


def _draw(logits: Logits, largest: Logits, sequences: Sequence[TokenSequence]) -> NDArray[np.int64]:
    """`largest` is the largest of each row. `logits` is used up."""
    params = [sequence.request.params for sequence in sequences]
    temperatures = np.array([max(item.temperature, _COLDEST) for item in params], np.float32)
    # The largest is subtracted first: a small temperature must not overflow.
    weights = np.subtract(logits, largest[:, None], out=logits)
    np.exp(np.divide(weights, temperatures[:, None], out=weights), out=weights)
    for row, item in enumerate(params):
        threshold = max(_threshold(weights[row], item.top_k, item.top_p), item.min_p)  # the largest weight is 1
        if threshold > 0:
            weights[row] *= weights[row] >= threshold
    return _pick(weights, np.array([sequence.random.random() for sequence in sequences]))


def _threshold(weights: Logits, top_k: int, top_p: float) -> float:
    """The smallest weight that top-k and then top-p keep; 0 when all stay. `weights` need not sum to 1."""
    limited = 0 < top_k < len(weights)
    if not limited and top_p == 1.0:
        return 0.0
    candidates = _largest(weights, top_k) if limited else weights
    total = candidates.sum(dtype=np.float64)
    if top_p == 1.0:
        return float(candidates.min())
    # Tokens below this have less than 1 - top_p together, so the nucleus is complete without them.
    candidates = candidates[candidates >= (1.0 - top_p) * total / len(candidates)]
    candidates = np.sort(candidates)[::-1]
    reached = int(np.searchsorted(np.cumsum(candidates, dtype=np.float64), top_p * total))
    return float(candidates[min(reached, len(candidates) - 1)])


def _largest(weights: Logits, count: int) -> Logits:
    """The `count` largest and what equals the last of them, in any order."""
    blocks = weights[: len(weights) // _BLOCK * _BLOCK].reshape(-1, _BLOCK).max(axis=1)
    if count <= len(blocks):  # that many blocks hold a weight this large, so the smaller ones are out
        weights = weights[weights >= np.partition(blocks, len(blocks) - count)[len(blocks) - count]]
    least = np.partition(weights, len(weights) - count)[len(weights) - count]
    largest: Logits = weights[weights >= least]
    return largest


def _pick(weights: Logits, uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    """The token at which the cumulative weight passes `uniform` of the total: first its block, then its place there."""
    rows, vocabulary = weights.shape
    blocks = -(-vocabulary // _BLOCK)
    parts = np.pad(weights, ((0, 0), (0, -vocabulary % _BLOCK))).reshape(rows, blocks, _BLOCK)
    sums = np.cumsum(parts.sum(axis=2, dtype=np.float64), axis=1)
    wanted = uniform * sums[:, -1]
    block = np.minimum((sums <= wanted[:, None]).sum(axis=1), blocks - 1)
    every = np.arange(rows)
    before = np.where(block > 0, sums[every, block - 1], 0.0)
    inside = np.cumsum(parts[every, block], axis=1, dtype=np.float64)
    place = (inside <= (wanted - before)[:, None]).sum(axis=1)
    # Rounding may carry the search past the last weight of its block: back to the last token that has any.
    last = _BLOCK - 1 - (parts[every, block][:, ::-1] > 0).argmax(axis=1)
    result: NDArray[np.int64] = block * _BLOCK + np.minimum(place, last)
    return result


def score(logits: Logits, tokens: NDArray[np.int64], counts: Sequence[int]) -> tuple[list[float], list[Top]]:
    """For each row of [rows, vocabulary] the log-probability of its token, and its `counts` likeliest tokens.

    The float of a token is the same in both, so that whoever asks whether it was the likeliest can compare. Of equal
    ones the smaller id goes first, as in `argmax`.
    """
    largest = logits.max(axis=1, keepdims=True)
    shifted = np.subtract(logits, largest, dtype=np.float32)
    sums = np.log(np.exp(shifted).sum(axis=1))
    chosen = shifted[np.arange(len(tokens)), tokens] - sums
    tops = [_likeliest(row, own, count) for row, own, count in zip(shifted, sums, counts, strict=True)]
    return np.maximum(chosen, _NEVER).tolist(), tops


def score_prompt(logits: Logits, tokens: Tokens, top: int) -> tuple[ScoredToken, ...]:
    """Of tokens that were given, each by the row of [rows, vocabulary] before it. There may be more rows than tokens.

    Raises ValueError for logits that are not numbers.
    """
    if not len(tokens):
        return ()
    logprobs, tops = score(np.asarray(logits)[: len(tokens)], tokens, [top] * len(tokens))
    if not np.isfinite(logprobs).all():
        raise ValueError("the model gave logits that are not numbers")
    return tuple(map(ScoredToken, tokens.tolist(), logprobs, tops))


def _likeliest(shifted: Logits, own: np.float32, count: int) -> Top:
    if not count or np.isnan(own):
        return _NO_TOP
    least = _largest(shifted, count).min() if count < len(shifted) else -np.inf
    ids = np.flatnonzero(shifted >= least)
    ids = ids[np.argsort(-shifted[ids], kind="stable")][:count]
    return tuple(zip(ids.tolist(), np.maximum(shifted[ids] - own, _NEVER).tolist(), strict=True))
