"""Single weights set to zero: by size, by size and input, or so that the rest of a row makes it good.

wanda: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models". sparsegpt: Frantar and
Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from builders.compress.inputs import matrices_of, observed
from builders.compress.texts import Batch
from builders.spec import SparsifySlice

if TYPE_CHECKING:
    import torch

_DAMPING = 0.01  # of the mean square of the inputs
_CHUNK = 128  # columns between two updates of all that stand behind them


def sparsify(model: Any, forward: Any, batches: Sequence[Batch], asked: SparsifySlice) -> float:
    """Zeros in the matrices of all layers, in place; the share of their weights that is zero now."""
    import torch

    zeros = total = 0
    with torch.no_grad():
        modules = matrices_of(model)
        inputs = {} if asked.method == "magnitude" else observed(modules, forward, batches)
        for name, module in modules.items():
            weight = module.weight.double()
            if asked.method == "sparsegpt":
                made = _compensated(weight, inputs[name].moment, asked)
            else:
                found = inputs[name].moment.diagonal().sqrt() if name in inputs else torch.ones(weight.shape[1])
                made = weight * keep(weight.abs() * found, asked)
            module.weight.copy_(made.float())
            zeros, total = zeros + int((module.weight == 0).sum()), total + weight.numel()
    return zeros / total


def keep(scores: torch.Tensor, asked: SparsifySlice) -> torch.Tensor:
    """True for the weights [rows, columns] that stay: the highest of each four, or of each row."""
    import torch

    rows, columns = scores.shape
    size, count = (4, 2) if asked.amount is None else (columns, max(1, round((1 - asked.amount) * columns)))
    parts = scores.reshape(rows, -1, size)
    best = parts.topk(count, dim=-1).indices
    return torch.zeros_like(parts, dtype=torch.bool).scatter(-1, best, True).reshape(rows, columns)


def _compensated(weight: torch.Tensor, moment: torch.Tensor, asked: SparsifySlice) -> torch.Tensor:
    """Column by column; what a row loses with a weight, its weights behind that make up for as well as they can."""
    import torch

    columns, left = weight.shape[1], weight.clone()
    damped = moment + _DAMPING * moment.diagonal().mean() * torch.eye(columns, dtype=moment.dtype)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    losses = inverse.diagonal().square()
    for start in range(0, columns, _CHUNK):
        stop = min(start + _CHUNK, columns)
        errors = torch.zeros(len(left), stop - start, dtype=left.dtype)
        stays = keep(left[:, start:stop].square() / losses[start:stop], asked)
        for column in range(start, stop):
            if asked.amount is None and column % 4 == 0:  # by now the weights before have had their effect on these
                four = slice(column, column + 4)
                stays[:, column - start : column - start + 4] = keep(left[:, four].square() / losses[four], asked)
            made = left[:, column] * stays[:, column - start]
            error = (left[:, column] - made) / inverse[column, column]
            left[:, column] = made
            left[:, column + 1 : stop] -= torch.outer(error, inverse[column, column + 1 : stop])
            errors[:, column - start] = error
        left[:, stop:] -= errors @ inverse[start:stop, stop:]
    return left
