"""A checkpoint as a technique gets it: the model in fp32, and the whole way from its inputs to its outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from builders.artifacts import Checkpoint
from builders.compress.importance import Forward
from builders.export.encoder import graph_module
from builders.export.sentence import head_modules, pool
from builders.export.weights import load_encoder, load_weights

if TYPE_CHECKING:
    import torch


def opened(checkpoint: Checkpoint) -> tuple[Any, Callable[[Any], Forward]]:
    """The second takes a model of this kind: vectors or scores [texts, width], or logits [texts, length, vocabulary] of
    a language model, whose texts are rows of one length."""
    if checkpoint.generation is None:
        head = head_modules(checkpoint)
        return load_encoder(checkpoint), lambda found: graph_module(found, head, checkpoint)
    return load_weights(checkpoint), _logits


def pooled(checkpoint: Checkpoint) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Of an embedding's checkpoint: states [texts, length, hidden] and their mask become vectors [texts, width]."""
    import torch

    head = torch.nn.Sequential(*head_modules(checkpoint))

    def vectors(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        assert checkpoint.pooling is not None
        found: torch.Tensor = head(pool(states, mask, checkpoint.pooling))
        return found

    return vectors


def _logits(model: Any) -> Forward:
    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return found

    return forward
