"""Tiny encoders that have learnt one domain of made-up pairs or labels, and rows of others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from builders.checkpoint import load_checkpoint
from builders.spec import ModelSlice
from online.gate.verdict import GateBudget
from online.learner.memory import FOLDER, Memory, Reservoir, save_memory
from online.learner.recipe import UpdateRecipe
from online.learner.update import update_version
from online.loop.gathered import gather
from online.tasks.opening import open_task
from online.tasks.task import LearningTask, Rows
from tests.conftest import save_tiny

WINDOW = 16
LOOSE = GateBudget(max_forgetting=1e6, max_fall=1.0)
RECIPE = UpdateRecipe(steps=40, rows=16, learning_rate=0.003)
NOUNS = (
    "file",
    "socket",
    "thread",
    "module",
    "class",
    "buffer",
    "stream",
    "queue",
    "cache",
    "token",
    "string",
    "number",
)


def model_slice(folder: Path, task: str) -> ModelSlice:
    pooling = {"pooling": "mean", "normalize": True} if task == "embedding" else {}
    return ModelSlice.model_validate({"source": str(folder), "task": task, "max_length": 64, **pooling})


def opened(folder: Path, task: str) -> LearningTask:
    found = model_slice(folder, task)
    return open_task(found, load_checkpoint(found), WINDOW)


def pairs(verbs: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Queries whose right text names the same things in another order."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        first, second, third = random.choice(NOUNS, 3, replace=False)
        found.append(
            {"request_id": f"{seed}-{number}", "kind": "pair", "query": f"{verbs} {first} {second} {number}",
             "positive": f"the {second} and {third} of a {first}", "negative": None}
        )  # fmt: skip
    return found


def labels(verbs: str, count: int, seed: int, wrong: bool = False) -> list[dict[str, Any]]:
    """The label is that of the first noun, or of another."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        place = int(random.integers(3))
        label = f"LABEL_{(place + wrong) % 3}"
        found.append(
            {"request_id": f"{seed}-{number}", "kind": "label", "label": label,
             "prompt": f"{verbs} {NOUNS[place]} {number}"}
        )  # fmt: skip
    return found


def rows_of(task: LearningTask, samples: list[dict[str, Any]]) -> Rows:
    found = gather(enumerate(samples, 1), 0, 0.8, task)
    assert not found.unread
    return task.rows(found.documents)


def save_first(folder: Path, kind: str) -> Path:
    """It has learnt one domain, which its memory holds."""
    task = opened(save_tiny(folder / "raw", "bert", kind), kind)
    made = pairs if kind == "embedding" else labels
    bare = Memory(Reservoir.empty(task.width)).with_domain("nothing", rows_of(task, made("when", 60, 9)))
    save_memory(bare, folder / "raw")
    old = rows_of(task, made("open", 200, 1))
    update_version(task, folder / "raw", "one", old, rows_of(task, made("open", 100, 2)), folder / "1",
                   RECIPE, budget=LOOSE)  # fmt: skip
    shutil.rmtree(folder / "1" / FOLDER)
    kept = Reservoir.empty(task.width).offered(old, np.random.default_rng(0))
    save_memory(Memory(kept).with_domain("one", rows_of(task, made("open", 100, 2))), folder / "1")
    return folder / "1"
