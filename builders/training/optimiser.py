"""Which optimiser moves which weights, and how fast at each moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from builders.training.arithmetic import Arithmetic
from runtime.record import Record

if TYPE_CHECKING:
    import torch

Rate = Callable[[int, float], float]  # learning rate of a step, from 0, when this share of the training is done


class Optimiser(Record):
    """Matrices between embedding and head are moved by `kind` and decay; embeddings, norms and biases do not decay, and
    are moved by Adam where the kind is Muon, which is for matrices alone."""

    kind: Literal["adamw", "muon", "sgd"] = "adamw"
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)  # of Adam
    momentum: float = Field(default=0.9, ge=0, lt=1)  # of SGD


def rise_and_fall(peak: float, rise: float = 0.05, end: float = 0.0) -> Rate:
    """Linear over the first `rise` of the training, then linear down to `end` of the peak."""

    def rate(_: int, share: float) -> float:
        if share < rise:
            return peak * max(share / rise, 0.01)  # a first step of 0 would be none
        return peak * (end + (1 - end) * (1 - share) / (1 - rise))

    return rate


def optimisers(
    model: Any, weights: Sequence[torch.Tensor], asked: Optimiser, arithmetic: Arithmetic = "float32"
) -> list[torch.optim.Optimizer]:
    """`weights` belong to the model's parameters that require gradients, in their order. The learning rate is set
    before each step."""
    import torch

    from builders.training.muon import Muon

    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    matrices: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for parameter, weight in zip(trained(model), weights, strict=True):
        (matrices if weight.ndim == 2 and id(parameter) not in tables else others).append(weight)
    if asked.kind == "muon":
        adam = torch.optim.AdamW(others, betas=asked.betas, weight_decay=0.0) if others else None
        muon = Muon(matrices, weight_decay=asked.weight_decay, dtype=getattr(torch, arithmetic))
        return [muon, *([adam] if adam else [])]
    groups = [{"params": matrices, "weight_decay": asked.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if asked.kind == "sgd":
        return [torch.optim.SGD(groups, momentum=asked.momentum)]
    return [torch.optim.AdamW(groups, betas=asked.betas, fused=True)]


def trained(model: Any) -> list[torch.nn.Parameter]:
    """The parameters that a training moves."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
