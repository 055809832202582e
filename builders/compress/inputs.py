"""The matrices of a model's layers, and what they read over calibration text."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from builders.checkpoint.widths import layers_of
from builders.compress.texts import Batch

if TYPE_CHECKING:
    import torch

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Inputs:
    """Over all tokens: the mean of x x' [inputs, inputs], and that of x [inputs]."""

    moment: torch.Tensor
    mean: torch.Tensor

    @property
    def covariance(self) -> torch.Tensor:
        return self.moment - self.mean[:, None] * self.mean


def matrices_of(model: Any) -> dict[str, Any]:
    """The products of all layers by name, factors of a thin one by themselves."""
    import torch

    layers = layers_of(model)
    start = next(name for name, module in model.named_modules() if module is layers)
    return {f"{start}.{name}": module for name, module in layers.named_modules() if isinstance(module, torch.nn.Linear)}


def observed(modules: Mapping[K, Any], forward: Any, batches: Sequence[Batch]) -> dict[K, Inputs]:
    """What each of `modules` reads, of real tokens alone. Computes no gradients only where the caller says so."""
    sums: dict[K, tuple[Any, Any]] = {}
    current: list[torch.Tensor] = []

    def hook_of(place: K) -> Any:
        def hook(_: Any, given: tuple[torch.Tensor, ...]) -> None:
            x = given[0][current[-1]]
            squares, total = sums.get(place, (0, 0))
            sums[place] = squares + (x.T @ x).double(), total + x.sum(0).double()

        return hook

    hooks = [module.register_forward_pre_hook(hook_of(place)) for place, module in modules.items()]
    try:
        for batch in batches:
            current.append(batch["attention_mask"].bool())
            forward(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    tokens = sum(int(mask.sum()) for mask in current)
    return {place: Inputs(squares / tokens, total / tokens) for place, (squares, total) in sums.items()}
