"""The loss of an update: new and replayed rows alike, and a pull to the previous version."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from builders.training.text import TokenIds
from online.learner.memory import batches_of
from online.learner.recipe import UpdateRecipe

if TYPE_CHECKING:
    import torch


def update_batches(new: TokenIds, replayed: TokenIds, recipe: UpdateRecipe) -> Iterator[TokenIds]:
    """[rows, window + 1], the replayed rows last; the same for the same recipe. All rows are new where there is nothing
    to replay."""
    random = np.random.default_rng(recipe.seed)
    old = recipe.replayed(len(replayed))
    sources = [batches_of(new, recipe.rows - old, random)]
    if old:
        sources.append(batches_of(replayed, old, np.random.default_rng([recipe.seed, 1])))
    for _ in range(recipe.steps):
        yield np.concatenate([next(source) for source in sources])


def update_loss(model: Any, previous: Any, replayed: int, recipe: UpdateRecipe) -> Callable[[TokenIds], torch.Tensor]:
    """Cross-entropy of all rows, in nats a token, and `kl` times the KL divergence of the previous version from this
    one on the replayed rows. `previous` is left as it is."""
    import torch

    def loss(batch: TokenIds) -> torch.Tensor:
        ids = torch.from_numpy(np.ascontiguousarray(batch))
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()  # [rows, window, vocabulary]
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        if recipe.kl and replayed:
            with torch.no_grad():
                known = previous(input_ids=ids[-replayed:, :-1], use_cache=False).logits.float().log_softmax(-1)
            here = logits[-replayed:].log_softmax(-1)
            total = total + recipe.kl * torch.nn.functional.kl_div(
                here.flatten(0, 1), known.flatten(0, 1), log_target=True, reduction="batchmean"
            )
        return total

    return loss
