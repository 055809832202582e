"""What each head, neuron and layer is worth to the output.

gauss_newton: the expected squared change of the outputs when it is taken out, to first order. One backward pass of
(output . r) for a random r gives the gradient of each text's projection in a mask of ones; its square, over many texts
and r, is the diagonal of the Gauss-Newton matrix of the squared error, which is that of Fisher too.
taylor: the same with a classifier's loss on labels instead of projections (Molchanov et al. 2017, Michel et al. 2019).
magnitude: of the weights alone, the baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from builders.checkpoint.widths import Widths, first_linear, last_linear, layers_of, part_of, widths_of_model
from builders.compress.kept import Scores
from builders.compress.losses import hard_labels
from builders.compress.texts import Batch

if TYPE_CHECKING:
    import torch

Forward = Callable[..., "torch.Tensor"]  # takes a batch by names, gives [texts, width]
PROJECTIONS = 2  # random directions for each batch; more texts tell as much


@dataclass(frozen=True)
class Worth:
    """Scores by layer; of layers, one number each."""

    heads: list[Scores]
    ffn: list[Scores]
    layers: Scores


@dataclass(frozen=True)
class _Masks:
    """Ones, one for each text: [texts, 1, heads], [texts, 1, neurons] and [texts, 1, 1], by layer."""

    heads: list[torch.Tensor]
    ffn: list[torch.Tensor]
    layers: list[torch.Tensor]


def gauss_newton(model: Any, forward: Forward, batches: Sequence[Batch], seed: int) -> Worth:
    import torch

    source = torch.Generator().manual_seed(seed)

    def projected(outputs: torch.Tensor, _: int) -> Iterator[torch.Tensor]:
        for _ in range(PROJECTIONS):
            yield (outputs * torch.randn(outputs.shape, generator=source)).sum()

    return _measured(model, forward, batches, projected, lambda gradient: gradient.square())


def fisher(model: Any, forward: Forward, batches: Sequence[Batch], seed: int) -> Worth:
    """Of a language model: `forward` gives logits [texts, length, vocabulary], and what moves is the likelihood of next
    tokens, drawn from the model itself. The expected square of its slope is the diagonal of Fisher's matrix, and so of
    the Gauss-Newton matrix of the divergence."""
    import torch

    source = torch.Generator().manual_seed(seed)

    def drawn(logits: torch.Tensor, _: int) -> Iterator[torch.Tensor]:
        every = torch.log_softmax(logits.float(), dim=-1)
        for _ in range(PROJECTIONS):
            tokens = torch.multinomial(every.detach().flatten(0, 1).exp(), 1, generator=source)
            yield every.flatten(0, 1).gather(1, tokens).sum()

    return _measured(model, forward, batches, drawn, lambda gradient: gradient.square())


def taylor(model: Any, forward: Forward, batches: Sequence[Batch], labels: Sequence[torch.Tensor]) -> Worth:
    def loss(outputs: torch.Tensor, number: int) -> Iterator[torch.Tensor]:
        yield hard_labels(outputs, labels[number]) * len(outputs)

    return _measured(model, forward, batches, loss, lambda gradient: gradient.abs())


def _measured(
    model: Any,
    forward: Forward,
    batches: Sequence[Batch],
    values: Callable[[torch.Tensor, int], Iterator[torch.Tensor]],
    size: Callable[[torch.Tensor], torch.Tensor],
) -> Worth:
    """The sum over texts of the `size` of each value's gradient in the masks. Texts do not meet, so that the gradient
    of a sum over texts has a row for each."""
    import torch

    sums: list[torch.Tensor] = []
    for number, batch in enumerate(batches):
        with _masked(model, len(batch["input_ids"])) as masks:
            every = [*masks.heads, *masks.ffn, *masks.layers]
            outputs = forward(**batch)
            for value in values(outputs, number):
                gradients = torch.autograd.grad(value, every, retain_graph=True)
                found = [size(gradient).sum((0, 1)).double() for gradient in gradients]
                sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
    count = len(layers_of(model))
    arrays = [total.numpy() for total in sums]
    return Worth(arrays[:count], arrays[count : 2 * count], np.array([float(a[0]) for a in arrays[2 * count :]]))


@contextmanager
def _masked(model: Any, texts: int) -> Iterator[_Masks]:
    """The model with masks on what its heads and neurons give, and on what each layer adds."""
    import torch

    widths = widths_of_model(model)

    def ones(count: int) -> torch.Tensor:
        return torch.ones(texts, 1, count, requires_grad=True)

    masks = _Masks(
        [ones(layer.heads) for layer in widths.layers],
        [ones(layer.ffn) for layer in widths.layers],
        [ones(1) for _ in widths.layers],
    )
    hooks = []
    for number, layer in enumerate(layers_of(model)):
        heads = masks.heads[number].repeat_interleave(widths.head_size, dim=-1)
        for part, mask in (("attention_output", heads), ("ffn_out", masks.ffn[number])):
            module = part_of(model, layer, part)
            hooks.append(module.register_forward_pre_hook(lambda _, given, mask=mask: (given[0] * mask,)))
        hooks.append(
            layer.register_forward_hook(
                lambda _, given, made, mask=masks.layers[number]: given[0] + mask * (made - given[0])
            )
        )
    try:
        yield masks
    finally:
        for hook in hooks:
            hook.remove()


def magnitude(model: Any) -> Worth:
    """Norms of the weights that go with each, over the mean of their layer: layers' scales differ and mean nothing."""
    import torch

    widths = widths_of_model(model)
    heads, ffn, layers = [], [], []
    with torch.no_grad():
        for layer in layers_of(model):
            rows = [last_linear(part_of(model, layer, part)).weight for part in ("query", "key", "value")]
            out = first_linear(part_of(model, layer, "attention_output")).weight
            shared = [_of_queries(row.square().sum(1), widths) for row in rows[1:]]
            squares = torch.stack([rows[0].square().sum(1), *shared, out.square().sum(0)]).sum(0)
            heads.append(squares.reshape(-1, widths.head_size).sum(1).sqrt())
            up = last_linear(part_of(model, layer, "ffn_in")).weight
            down = first_linear(part_of(model, layer, "ffn_out")).weight
            ffn.append(up.square().sum(1).sqrt() * down.square().sum(0).sqrt())
            layers.append(float(heads[-1].square().sum() + ffn[-1].sum()))
    return Worth(
        [(found / found.mean()).double().numpy() for found in heads],
        [(found / found.mean()).double().numpy() for found in ffn],
        np.array(layers),
    )


def _of_queries(squares: torch.Tensor, widths: Widths) -> torch.Tensor:
    """Of rows of keys or values [kv_heads * size], for each head of queries that reads them."""
    if widths.group == 1:
        return squares
    return squares.reshape(-1, widths.head_size).repeat_interleave(widths.group, dim=0).reshape(-1) / widths.group
