"""How far a student is from its teacher: a number for each loss of the spec, and what of a model it is computed from.

States are of real tokens alone, packed: [tokens, hidden]. Attention is [texts, heads, length, length], outputs are
[texts, width].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from builders.checkpoint.widths import layers_of, part_of, widths_of_model
from builders.compress.texts import Batch

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Wanted:
    """What of a model is looked at beside its outputs: states after these layers, attention in these."""

    states: Sequence[int] = ()
    attention: Sequence[int] = ()


@dataclass
class Seen:
    """By layer, of one batch."""

    output: torch.Tensor
    states: dict[int, torch.Tensor] = field(default_factory=dict)
    attention: dict[int, torch.Tensor] = field(default_factory=dict)


def look(model: Any, forward: Callable[..., torch.Tensor], batch: Batch, wanted: Wanted) -> Seen:
    """One forward pass, in which gradients are kept if they are on."""
    projected: dict[tuple[int, str], torch.Tensor] = {}
    states: dict[int, torch.Tensor] = {}
    tokens = batch["attention_mask"].bool()
    with _hooks(model, wanted, states, projected):
        output = forward(**batch)
    head_size = widths_of_model(model).head_size
    return Seen(
        output,
        {number: state[tokens].float() for number, state in states.items()},
        {
            number: attention(projected[number, "query"], projected[number, "key"], tokens, head_size)
            for number in wanted.attention
        },
    )


@contextmanager
def _hooks(
    model: Any, wanted: Wanted, states: dict[int, torch.Tensor], projected: dict[tuple[int, str], torch.Tensor]
) -> Iterator[None]:
    layers = layers_of(model)

    def keep(found: dict[Any, Any], key: Any) -> Callable[..., None]:
        def hook(_: Any, given: Any, made: torch.Tensor) -> None:
            found[key] = made

        return hook

    handles = [layers[number].register_forward_hook(keep(states, number)) for number in wanted.states]
    for number in wanted.attention:
        for part in ("query", "key"):
            module = part_of(model, layers[number], part)
            handles.append(module.register_forward_hook(keep(projected, (number, part))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention(query: torch.Tensor, key: torch.Tensor, tokens: torch.Tensor, head_size: int) -> torch.Tensor:
    """Probabilities as the model has them, in fp32. `query` and `key`: [texts, length, heads * size]."""
    import torch

    def heads(projected: torch.Tensor) -> torch.Tensor:
        return projected.float().reshape(*projected.shape[:2], -1, head_size).transpose(1, 2)

    scores = heads(query) @ heads(key).transpose(-1, -2) / math.sqrt(head_size)
    return torch.softmax(scores.masked_fill(~tokens[:, None, None, :], -torch.inf), dim=-1)


def squared_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """token_mse and hidden: the mean over tokens and numbers."""
    return (student - teacher).square().mean()


def embedding_cosine(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    import torch

    return 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=1).mean()


def similarity(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The mean over pairs of two different texts; 0 for a batch of one."""
    import torch

    count = len(student)
    found, wanted = (torch.nn.functional.normalize(vectors, dim=1) for vectors in (student, teacher))
    error = (found @ found.T - wanted @ wanted.T).square()
    return (error.sum() - error.diagonal().sum()) / max(1, count * (count - 1))


def attention_divergence(student: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler, in nats, the mean over heads and real tokens."""
    import torch

    sure, guess = teacher.clamp(min=1e-9), student.clamp(min=1e-9)
    divergence = (torch.where(teacher > 0, teacher * (sure.log() - guess.log()), 0.0)).sum(-1)  # [texts, heads, length]
    return divergence.transpose(1, 2)[tokens].mean()


def soft_labels(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Times the temperature's square, so that gradients stay as large as without it (Hinton et al. 2015). A single
    score is a probability by the logistic function."""
    import torch

    found, wanted = (torch.log_softmax(_two(scores) / temperature, dim=1) for scores in (student, teacher))
    return temperature**2 * (wanted.exp() * (wanted - found)).sum(1).mean()


def hard_labels(student: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.nn.functional.cross_entropy(_two(student), labels)


def _two(scores: torch.Tensor) -> torch.Tensor:
    """A single score beside 0: the softmax of the two is the logistic function of the one."""
    import torch

    return torch.cat([torch.zeros_like(scores), scores], dim=1) if scores.shape[1] == 1 else scores
