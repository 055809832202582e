"""Matrices as products of two thin ones.

whitened: the product with the least squared error of the outputs, over calibration text: the singular vectors of
S (W - mean) where S'S is the covariance of the inputs (Wang et al. 2024, SVD-LLM; the bias takes up the mean).
plain: the least error of the weights themselves, which is the baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from builders.checkpoint.widths import layers_of, part_of, widths_of_model
from builders.compress.importance import Forward
from builders.compress.inputs import Inputs, observed
from builders.compress.plan import FFN_MULTIPLE, asked_parts, break_even
from builders.compress.prune import become, stem_of
from builders.compress.texts import Batch
from builders.errors import SpecError
from builders.spec import LowRankSlice

if TYPE_CHECKING:
    import torch

_DAMPING = 1e-4  # of the mean variance of the inputs, so that directions that no text has can be divided by

Place = tuple[int, str]  # layer and part


@dataclass(frozen=True)
class _Factored:
    """`first` [inputs, k] and `second` [k, outputs], columns by falling singular value; `mean` of the inputs."""

    first: torch.Tensor
    second: torch.Tensor
    singular: torch.Tensor
    mean: torch.Tensor


def low_rank(model: Any, forward: Forward, batches: Sequence[Batch], asked: LowRankSlice, multiple: int) -> None:
    """Factors the matrices of `asked.parts` in place. Raises SpecError when no rank of `auto` takes out `amount`."""
    import torch

    widths = widths_of_model(model)
    places = [(number, part) for number in range(len(widths.layers)) for part in asked_parts(asked, widths.model_type)]
    with torch.no_grad():
        inputs = (
            observed({place: _matrix(model, place) for place in places}, forward, batches)
            if asked.method == "whitened"
            else {}
        )
        factored = {place: _factor(_matrix(model, place), inputs.get(place)) for place in places}
        if asked.rank == "auto":
            assert asked.amount is not None
            sizes = {place: _sizes(factored[place]) for place in places}
            energy = {place: factored[place].singular.square().double().numpy() for place in places}
            ranks = share_out(energy, sizes, asked.amount, multiple)
        else:
            ranks = dict.fromkeys(places, asked.rank)
        _replace(model, factored, ranks)


def share_out(
    energy: dict[Place, NDArray[np.float64]], sizes: dict[Place, tuple[int, int]], amount: float, multiple: int
) -> dict[Place, int]:
    """Ranks of the matrices that are to be factored, so that `amount` of all weights goes.

    Each weight that stays keeps about as much of its matrix's squared output: `energy` are squared singular values by
    falling size. A matrix whose rank would reach break-even stays whole, and is left out. Raises SpecError.
    """
    gains = {place: values / values.sum() / sum(sizes[place]) for place, values in energy.items()}
    limit = (1 - amount) * sum(k * n for k, n in sizes.values())

    def ranks(threshold: float) -> dict[Place, int]:
        wanted = {place: int((found >= threshold).sum()) for place, found in gains.items()}
        rounded = {place: max(multiple, -(-rank // multiple) * multiple) for place, rank in wanted.items()}
        return {place: rank for place, rank in rounded.items() if rank < break_even(*sizes[place])}

    def weights(found: dict[Place, int]) -> int:
        return sum(found[place] * (k + n) if place in found else k * n for place, (k, n) in sizes.items())

    steps = np.unique(np.concatenate(list(gains.values())))
    low, high = 0, len(steps)
    while low < high:  # the lowest threshold, and so the highest ranks, within the limit
        middle = (low + high) // 2
        low, high = (low, middle) if weights(ranks(float(steps[middle]))) <= limit else (middle + 1, high)
    found = ranks(float(steps[low])) if low < len(steps) else {}
    if not found:
        least = weights(ranks(float("inf"))) / sum(k * n for k, n in sizes.values())
        raise SpecError(
            "low_rank.amount", got=amount, expected=f"at most {1 - least:.3f}: ranks come in multiples of {multiple}",
            fix="take out less, or prune first",
        )  # fmt: skip
    return found


def _matrix(model: Any, place: Place) -> Any:
    return part_of(model, layers_of(model)[place[0]], place[1])


def _sizes(found: _Factored) -> tuple[int, int]:
    return found.first.shape[0], found.second.shape[1]


def _factor(linear: Any, inputs: Inputs | None) -> _Factored:
    """Both factors take half of each singular value, so that neither has far larger numbers than the other."""
    import torch

    weight = linear.weight.T.double()  # [inputs, outputs]
    if inputs is None:
        left, singular, right = torch.linalg.svd(weight, full_matrices=False)
        mean = torch.zeros(len(weight), dtype=torch.float64)
    else:
        # Without a bias, nothing can take up the mean.
        covariance = inputs.moment if linear.bias is None else inputs.covariance
        damping = _DAMPING * covariance.diagonal().mean()
        root = torch.linalg.cholesky(covariance + damping * torch.eye(len(weight), dtype=torch.float64)).T
        left, singular, right = torch.linalg.svd(root @ weight, full_matrices=False)
        left, mean = torch.linalg.solve_triangular(root, left, upper=True), inputs.mean
    half = singular.sqrt()
    return _Factored(left * half, half[:, None] * right, singular, mean)


def _replace(model: Any, factored: dict[Place, _Factored], ranks: dict[Place, int]) -> None:
    widths, state = widths_of_model(model), model.state_dict()
    layers = list(widths.layers)
    for place, rank in ranks.items():
        number, part = place
        found, stem = factored[place], stem_of(model, number, part)
        first, second = found.first[:, :rank], found.second[:rank]
        lost = state[f"{stem}.weight"].T.double() - first @ second
        bias = state.pop(f"{stem}.bias", None)
        del state[f"{stem}.weight"]
        state[f"{stem}.0.weight"], state[f"{stem}.1.weight"] = first.T.float(), second.T.float()
        if bias is not None:
            state[f"{stem}.1.bias"] = (bias.double() + found.mean @ lost).float()
        layers[number] = layers[number].model_copy(update={"ranks": {**layers[number].ranks, part: rank}})
    become(model, widths.model_copy(update={"layers": tuple(layers)}), state)


def rank_multiple(tensor: int) -> int:
    """Ranks come in what `parallel.tensor` ranks share out, as neurons do."""
    return FFN_MULTIPLE * tensor
