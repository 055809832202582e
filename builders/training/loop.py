"""The loop: forward and backward in bf16 where the CPU has it, master weights and optimisers in fp32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from builders.store.processor import this_processor
from builders.training.recipe import LossPoint, TrainingProgress, TrainingRecipe
from builders.training.text import END_OF_TEXT_ID, TokenIds, batches

if TYPE_CHECKING:
    import torch

POINTS = 20  # of the loss curve
CURVE_WINDOWS = 8  # held-out windows behind each point
FP32_STEPS = 280


def arithmetic() -> str:
    """bf16 is about three times as fast as fp32 where the processor multiplies it, and emulated where it does not."""
    flags = this_processor().flags
    return "bfloat16" if {"avx512_bf16", "amx_bf16"} & set(flags) else "float32"


def recipe_here() -> TrainingRecipe:
    """The default sizes, for as many steps as this CPU makes in about six minutes on two cores. In fp32 a step takes
    three times as long, and the last third of the steps gives the least."""
    return TrainingRecipe() if arithmetic() == "bfloat16" else TrainingRecipe(steps=FP32_STEPS)


@contextlib.contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """torch's global generator seeded and its algorithms deterministic for a while, then as they were."""
    import torch

    options: Any = torch.utils.deterministic  # its properties are on the module's class, where type checkers look past
    strict, filling = torch.are_deterministic_algorithms_enabled(), options.fill_uninitialized_memory
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        options.fill_uninitialized_memory = False  # a debugging aid that writes every tensor twice
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(strict)
            options.fill_uninitialized_memory = filling


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
    import torch

    masters = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    optimisers = _optimisers(model, masters)
    _cast(model, getattr(torch, arithmetic()))
    probe = next(batches(held_out, recipe.context, CURVE_WINDOWS, np.random.default_rng(recipe.seed)))
    every = max(1, recipe.steps // POINTS)
    losses: list[float] = []
    curve: list[LossPoint] = []
    for step, batch in enumerate(_schedule(stream, recipe)):
        loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        _update(model, masters, optimisers, recipe.rate(step))
        losses.append(loss.item())
        done = step + 1
        if done % every == 0 or done == recipe.steps:
            with torch.no_grad():
                judged = loss_of(model, probe).item()
            tokens = done * recipe.tokens_per_step
            curve.append(LossPoint(step=done, tokens=tokens, train=float(np.mean(losses)), held_out=judged))
            losses.clear()
        report(TrainingProgress(done, recipe.steps, loss.item(), curve[-1].held_out if curve else None))
    _cast(model, torch.float32)
    _write(model, masters)
    return tuple(curve)


def _schedule(stream: TokenIds, recipe: TrainingRecipe) -> Iterator[TokenIds]:
    """`recipe.steps` batches, first of short windows and then of whole ones."""
    random = np.random.default_rng(recipe.seed)
    sources = {
        window: batches(stream, window, recipe.tokens_per_step // window, random)
        for window in (recipe.context // 2, recipe.context)
    }
    for step in range(recipe.steps):
        yield next(sources[recipe.window(step)])


def _optimisers(model: Any, masters: list[torch.Tensor]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between embedding and head, Adam for embedding and norms.

    One learning rate serves both.
    """
    import torch

    from builders.training.muon import Muon

    names = [name for name, _ in model.named_parameters()]
    matrices = [m for name, m in zip(names, masters, strict=True) if m.ndim == 2 and "embed_tokens" not in name]
    others = [m for name, m in zip(names, masters, strict=True) if m.ndim != 2 or "embed_tokens" in name]
    return [
        Muon(matrices, weight_decay=0.1),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _update(model: Any, masters: list[torch.Tensor], optimisers: list[torch.optim.Optimizer], rate: float) -> None:
    """One step of the masters along the model's gradients, copied back into the model."""
    import torch

    for master, parameter in zip(masters, model.parameters(), strict=True):
        master.grad, parameter.grad = parameter.grad.float(), None
    torch.nn.utils.clip_grad_norm_(masters, 1.0)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
    _write(model, masters)


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Parameters alone: `model.to` would round the rotary frequencies too, which a loaded model has in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _write(model: Any, masters: list[torch.Tensor]) -> None:
    import torch

    with torch.no_grad():
        for master, parameter in zip(masters, model.parameters(), strict=True):
            parameter.copy_(master)
