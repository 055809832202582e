"""A Llama of known size with random weights: speed does not ask what the weights say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from builders.judging import corpus
from builders.store.atomic import atomic_directory
from builders.training.arithmetic import reproducible
from builders.training.language import new_model
from builders.training.recipe import TrainingRecipe
from builders.training.text import train_tokenizer
from measure.small_model.folder import save_folder

# 12 layers of 768, 12 query and 4 key-value heads, 32k entries: 100 M parameters.
LLAMA_100M = TrainingRecipe(
    vocabulary=32_000, hidden=768, layers=12, heads=12, kv_heads=4, ffn=2048, context=2048, tokens_per_step=2048
)


def random_llama(out: Path, sizes: TrainingRecipe = LLAMA_100M) -> Path:
    """Writes the Hugging Face folder `out` if it is not there; returns it.

    The tokenizer is trained on Python's own text, which holds fewer merges than a vocabulary of 32k wants: the rest
    are added tokens that no text contains.
    """
    if out.is_dir():
        return out
    tokenizer = train_tokenizer(corpus.documents(), sizes.vocabulary)
    tokenizer.add_tokens([f"<|unused{number}|>" for number in range(sizes.vocabulary - tokenizer.get_vocab_size())])
    with atomic_directory(out) as work, reproducible(sizes.seed):
        save_folder(new_model(sizes), tokenizer, sizes.context, work)
    return out


def random_prompts(rows: int, length: int, vocabulary: int, seed: int = 0) -> NDArray[np.int64]:
    """Token ids [rows, length], none of them the end of a text; the first rows are the same for any `rows`."""
    return np.random.default_rng(seed).integers(1, vocabulary, (rows, length), dtype=np.int64)
