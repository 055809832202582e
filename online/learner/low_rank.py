"""Learning by low-rank matrices beside the model's own, which stay as they are; merged into them when it ends.

Hu et al., 2021, "LoRA: low-rank adaptation of large language models". What comes out is a version like any other: it is
served as fast, goes through the same pipeline, and a part of the way to it is as well defined.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from runtime.errors import InputError

_SCALE = 2.0  # of the product: alpha is twice the rank


@contextmanager
def low_rank(model: Any, rank: int | None) -> Iterator[None]:
    """For a while, an update moves `rank` rows and columns for each matrix of the layers, and nothing else; None: it
    moves all as ever. Raises InputError for a model without matrices that can be adapted so."""
    if rank is None:
        yield
        return
    from torch.nn.utils import parametrize

    matrices = _matrices(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in matrices:
        parametrize.register_parametrization(module, "weight", _product(module.weight, rank))
    try:
        yield
    finally:
        for module in matrices:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def _matrices(model: Any) -> list[Any]:
    """All but the words' own: a head that is tied to them would move them too."""
    import torch

    head = model.get_output_embeddings()
    found = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    if not found:
        raise InputError(
            "online.learner.lora_rank", got=f"{type(model).__name__}, which has no torch.nn.Linear in its layers",
            expected="a model of such matrices, as most are", fix="leave it out: all weights are moved then",
        )  # fmt: skip
    return found


def _product(weight: Any, rank: int) -> Any:
    import torch

    class Product(torch.nn.Module):
        """[rows, columns] of the matrix, to which it adds nothing at first."""

        def __init__(self) -> None:
            super().__init__()
            rows, columns = weight.shape
            self.down = torch.nn.Parameter(torch.randn(rank, columns) / columns**0.5)
            self.up = torch.nn.Parameter(torch.zeros(rows, rank))

        def forward(self, own: torch.Tensor) -> torch.Tensor:
            return own + _SCALE * (self.up @ self.down)

    return Product()
