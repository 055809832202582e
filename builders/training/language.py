"""The small language model: sizes from its recipe, windows of text, next-token loss; trained by the one loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from builders.training import loop
from builders.training.arithmetic import arithmetic
from builders.training.optimiser import Optimiser
from builders.training.recipe import LossPoint, TrainingProgress, TrainingRecipe
from builders.training.text import END_OF_TEXT_ID, TokenIds, batches

if TYPE_CHECKING:
    import torch

CURVE_WINDOWS = 8  # held-out windows behind each point
FP32_STEPS = 280
# One learning rate serves both: Muon for matrices, Adam for the embedding (which is the head too) and norms.
_OPTIMISER = Optimiser(kind="muon", weight_decay=0.1)


def recipe_here() -> TrainingRecipe:
    """The default sizes, for as many steps as this CPU makes in about six minutes on two cores. In fp32 a step takes
    three times as long, and the last third of the steps gives the least."""
    return TrainingRecipe() if arithmetic() == "bfloat16" else TrainingRecipe(steps=FP32_STEPS)


def new_model(recipe: TrainingRecipe) -> Any:
    """A transformers LlamaForCausalLM in fp32 with random weights; embedding and head are one matrix."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.ffn,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def loss_of(model: Any, tokens: TokenIds) -> torch.Tensor:
    """Mean cross-entropy, in nats, of each row's tokens given those before. `tokens`: [rows, window + 1]"""
    import torch

    ids = torch.from_numpy(tokens)
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # [rows, window, vocabulary]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def train(
    model: Any, stream: TokenIds, held_out: TokenIds, recipe: TrainingRecipe, report: Callable[[TrainingProgress], None]
) -> tuple[LossPoint, ...]:
    """Trains `model` in place, from `stream`, for exactly `recipe.steps` steps; returns its loss curve.

    The model ends in fp32. `held_out` only draws the curve. Call under `reproducible`.
    """
    probe = next(batches(held_out, recipe.context, CURVE_WINDOWS, np.random.default_rng(recipe.seed)))
    work = loop.TrainingWork(
        model,
        lambda batch: loss_of(model, batch),
        _schedule(stream, recipe),
        lambda batch: recipe.tokens_per_step,
        lambda: loss_of(model, probe).item(),
    )
    settings = loop.TrainingSettings(
        loop.Bounds(steps=recipe.steps),
        lambda step, _: recipe.rate(step),
        _OPTIMISER,
        arithmetic=arithmetic(),
    )
    return loop.train(work, settings, report).curve


def _schedule(stream: TokenIds, recipe: TrainingRecipe) -> Iterator[TokenIds]:
    """`recipe.steps` batches, first of short windows and then of whole ones."""
    random = np.random.default_rng(recipe.seed)
    sources = {
        window: batches(stream, window, recipe.tokens_per_step // window, random)
        for window in (recipe.context // 2, recipe.context)
    }
    for step in range(recipe.steps):
        yield next(sources[recipe.window(step)])
