"""Updates of clients -> one step of the weights, tensor by tensor.

McMahan et al., 2017 (mean by samples); Yin et al., 2018 (trimmed mean); Douillard et al., 2023 (Nesterov momentum of
the rounds' steps).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from online.federated.tensors import Floats, Tensors

_FIRST, _SQUARES = "/exp_avg", "/exp_avg_sq"


def shares(samples: Mapping[str, int], most: float) -> dict[str, float]:
    """By samples, none above `most`: what is over goes to the others, by their samples. They sum to 1. `most` times the
    number of clients is 1 at least."""
    found: dict[str, float] = {}
    left = dict(samples)
    while left:
        free = 1.0 - most * len(found)
        total = sum(left.values())
        over = [client for client, count in left.items() if count * free > most * total * (1 + 1e-12)]
        if not over:
            return {**found, **{client: free * count / total for client, count in left.items()}}
        for client in over:
            found[client] = most
            del left[client]
    return found


def weighted_mean(updates: Mapping[str, Tensors], weights: Mapping[str, float]) -> dict[str, Floats]:
    """Weights by client; they sum to 1."""
    found: dict[str, Floats] = {}
    for name in next(iter(updates.values())):
        parts = [weights[client] * update[name].astype(np.float64) for client, update in updates.items()]
        found[name] = np.sum(parts, axis=0).astype(np.float32)
    return found


def trimmed_mean(updates: Mapping[str, Tensors], trim: float) -> dict[str, Floats]:
    """Of each number, the mean over clients without the lowest and the highest `trim` of them. All count alike:
    whoever could weigh more could not be trimmed."""
    cut = int(trim * len(updates) + 1e-9)
    first = next(iter(updates.values()))
    found = {}
    for name in first:
        stacked = np.sort(np.stack([update[name] for update in updates.values()]), axis=0)
        found[name] = stacked[cut : len(stacked) - cut].mean(0, dtype=np.float64).astype(np.float32)
    return found


def outer_step(
    weights: Tensors, step: Tensors, momentum: Tensors | None, rate: float, decay: float
) -> tuple[dict[str, Floats], dict[str, Floats] | None]:
    """The weights after a round, and the momentum for the next; without `decay` there is none, and at `rate` 1 the
    weights are the mean of the clients' weights."""
    if not decay:
        return {name: (weights[name] + rate * step[name]).astype(np.float32) for name in weights}, None
    kept = {
        name: step[name] if momentum is None else (decay * momentum[name] + step[name]).astype(np.float32)
        for name in weights
    }
    moved = {name: (weights[name] + rate * (step[name] + decay * kept[name])).astype(np.float32) for name in weights}
    return moved, kept


def pooled_moments(
    before: Tensors, mean: Tensors, weights: Mapping[str, float], steps: int, betas: tuple[float, float]
) -> dict[str, Floats]:
    """Adam's moments after a round of so many steps, as one training on all clients' rows would have them. `before`:
    those that the round began with; `mean`: of those that it ended with. `weights` of the clients sum to 1.

    A mean of squared gradients is larger than the square of a mean gradient: by as much the clients' steps would be
    too short, most where their rows or texts differ. What a client's squares and the mean gradient are is known from
    how the moments moved; the rest is the variance of a mean.
    """
    own = sum(weight * weight for weight in weights.values())
    found: dict[str, Floats] = {}
    for name in mean:
        if not name.endswith(_SQUARES):
            found[name] = mean[name]
            continue
        first = name.removesuffix(_SQUARES) + _FIRST
        kept = [beta**steps for beta in betas]
        gradient = (mean[first] - kept[0] * before[first]) / (1 - kept[0])
        squares = np.maximum(mean[name] - kept[1] * before[name], 0) / (1 - kept[1])
        pooled = np.minimum(own * squares + (1 - own) * gradient**2, squares)
        found[name] = (kept[1] * before[name] + (1 - kept[1]) * pooled).astype(np.float32)
    return found
