"""The batches of an update: new and replayed rows alike."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from online.learner.recipe import UpdateRecipe
from online.tasks.task import Rows


def update_batches(new: Rows, replayed: Rows, recipe: UpdateRecipe) -> Iterator[Rows]:
    """[rows, width], the replayed rows last; the same for the same recipe. All rows are new where there is nothing to
    replay."""
    random = np.random.default_rng(recipe.seed)
    old = recipe.replayed(len(replayed))
    sources = [batches_of(new, recipe.rows - old, random)]
    if old:
        sources.append(batches_of(replayed, old, np.random.default_rng([recipe.seed, 1])))
    for _ in range(recipe.steps):
        yield np.concatenate([next(source) for source in sources])


def batches_of(rows: Rows, count: int, random: np.random.Generator) -> Iterator[Rows]:
    """Endless: all rows in a new order, again and again; a batch may cross from one round to the next."""
    waiting = np.zeros(0, np.int64)
    while True:
        while len(waiting) < count:
            waiting = np.concatenate([waiting, random.permutation(len(rows))])
        batch: Rows = rows[waiting[:count]]
        yield batch
        waiting = waiting[count:]
