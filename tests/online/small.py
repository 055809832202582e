"""A tiny language model that learnt one made-up language, with a memory of it, and rows of other languages."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from builders.training import language
from builders.training.arithmetic import reproducible
from builders.training.recipe import TrainingRecipe
from online.learner.memory import Memory, Reservoir, save_memory
from online.tasks.language import LanguageTask
from online.tasks.task import Rows

WINDOW = 16
RECIPE = TrainingRecipe(
    vocabulary=257, hidden=32, layers=2, heads=4, kv_heads=2, ffn=64, context=WINDOW, steps=120, tokens_per_step=256,
    learning_rate=0.02,
)  # fmt: skip
LANGUAGE = LanguageTask(WINDOW, RECIPE.vocabulary, Path("no tokenizer is read"), 0)


def speech(language_seed: int, rows: int, seed: int) -> Rows:
    """[rows, WINDOW + 1]: after each of 40 words come three others, by a table of the language's own."""
    table = np.random.default_rng(language_seed).integers(1, 41, (41, 3))
    random = np.random.default_rng(seed)
    found = np.zeros((rows, WINDOW + 1), np.int64)
    found[:, 0] = random.integers(1, 41, rows)
    for place in range(WINDOW):
        found[:, place + 1] = table[found[:, place], random.choice(3, rows, p=[0.7, 0.2, 0.1])]
    return found


def save_small(folder: Path, replayed: int = 300) -> Path:
    """Version 1: it speaks language 1, and its memory holds rows of it."""
    from tokenizers import Tokenizer, models

    with reproducible(0):
        model = language.new_model(RECIPE)
        stream = speech(1, 1500, 0).reshape(-1)
        language.train(model, stream, speech(1, 40, 1).reshape(-1), RECIPE, lambda progress: None)
        model.save_pretrained(folder)
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))
    kept = Reservoir.empty(WINDOW + 1).offered(speech(1, replayed, 2), np.random.default_rng(0))
    save_memory(Memory(kept).with_domain("one", speech(1, 160, 3)), folder)
    return folder
