"""Codebooks of k-means: each weight becomes one of a few values, of its row, its block or its matrix.

Lloyd's algorithm in one dimension, many groups at once, from evenly spaced quantiles. An error may count as the mean
square of the input that it is multiplied with: the diagonal of the layer's Hessian (Choi et al. 2017, "Towards the
Limit of Network Quantization"). A group of no more values than codes keeps them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from builders.checkpoint.codebooks import CodedMatrix
from builders.compress.inputs import matrices_of, observed
from builders.compress.texts import Batch
from builders.spec import ClusterSlice

if TYPE_CHECKING:
    import torch

_ROUNDS = 20


def cluster(model: Any, forward: Any, batches: Sequence[Batch], asked: ClusterSlice) -> None:
    """Sets the weights of `model` to values of codebooks, in place; `batches` are empty where none are weighted."""
    import torch

    with torch.no_grad():
        modules = _chosen(model, asked)
        read = {name: module for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
        inputs = observed(read, forward, batches) if asked.weighted == "hessian" else {}
        for name, module in modules.items():
            group = group_of(module.weight.shape, asked)
            groups = module.weight.reshape(-1, group)
            found = inputs.get(name)
            weights = None if found is None else _spread(found.moment.diagonal().float(), module.weight, group)
            codes = codebooks(groups, weights, 2**asked.bits)
            module.weight.copy_(_nearest(codes, groups).reshape(module.weight.shape))


def coded(model: Any, asked: ClusterSlice) -> dict[str, CodedMatrix]:
    """The weights that are to be stored as indices, by their names in the model's state."""
    return {
        f"{name}.weight": CodedMatrix(
            shape=tuple(module.weight.shape), bits=asked.bits, group=group_of(module.weight.shape, asked)
        )
        for name, module in _chosen(model, asked).items()
    }


def group_of(shape: Sequence[int], asked: ClusterSlice) -> int:
    rows, columns = shape
    return {"row": columns, "tensor": rows * columns}.get(asked.per) or asked.block or columns


def _chosen(model: Any, asked: ClusterSlice) -> dict[str, Any]:
    words = model.get_input_embeddings()
    table = {name: module for name, module in model.named_modules() if module is words}
    return {**(matrices_of(model) if "matrices" in asked.what else {}), **(table if "words" in asked.what else {})}


def _spread(weights: torch.Tensor, matrix: torch.Tensor, group: int) -> torch.Tensor:
    """Of the columns, for each weight of each group."""
    return weights.expand_as(matrix).reshape(-1, group)


def codebooks(groups: torch.Tensor, weights: torch.Tensor | None, count: int) -> torch.Tensor:
    """[groups, count], rising; what two bytes can hold is rounded to that. `groups` and `weights` [groups, size]."""
    import torch

    ordered = groups.sort(dim=1).values
    places = ((torch.arange(count) + 0.5) * groups.shape[1] / count).long()
    codes = ordered[:, places]
    counted = torch.ones_like(groups) if weights is None else weights
    for _ in range(_ROUNDS):
        chosen = _indices(codes, groups)
        total = torch.zeros_like(codes).scatter_add_(1, chosen, groups * counted)
        share = torch.zeros_like(codes).scatter_add_(1, chosen, counted)
        codes = torch.where(share > 0, total / share.clamp(min=1e-30), codes).sort(dim=1).values
    ranks = _ranks(ordered)
    few = ranks[:, -1] < count
    codes[few] = _distinct(ordered[few], ranks[few], count)
    largest = torch.finfo(torch.float16).max
    return codes.half().float() if codes.abs().max() <= largest else codes


def _ranks(ordered: torch.Tensor) -> torch.Tensor:
    """Of each value among the distinct ones of its group, from 0. `ordered` [groups, size], rising."""
    import torch

    return torch.nn.functional.pad((ordered.diff(dim=1) != 0).long().cumsum(1), (1, 0))


def _distinct(ordered: torch.Tensor, ranks: torch.Tensor, count: int) -> torch.Tensor:
    """[groups, count]: the distinct values, rising; the largest fills what is left."""
    return ordered[:, -1:].repeat(1, count).scatter(1, ranks, ordered)


def _indices(codes: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.searchsorted(((codes[:, 1:] + codes[:, :-1]) / 2).contiguous(), groups.contiguous())


def _nearest(codes: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    return codes.gather(1, _indices(codes, groups))


def encode(weight: torch.Tensor, matrix: CodedMatrix) -> tuple[NDArray[np.uint8], torch.Tensor]:
    """Indices [size] and codes [groups, 2^bits] that give back `weight` as it is. Raises ValueError for a group with
    more values than codes: that is no matrix of codebooks."""
    import torch

    groups, count = weight.reshape(-1, matrix.group), 2**matrix.bits
    ordered = groups.sort(dim=1).values
    ranks = _ranks(ordered)
    if int(ranks.max()) >= count:
        raise ValueError(f"{int(ranks.max()) + 1} values in a group, and {count} codes")
    codes = _distinct(ordered, ranks, count)
    indices = torch.searchsorted(codes.contiguous(), groups.contiguous())
    return indices.reshape(-1).to(torch.uint8).numpy(), codes
