"""Least squares behind what was pruned: the matrices that read heads and neurons are fitted to what stood there before.

Layer by layer, attention first: the sum that goes into each LayerNorm is brought as near as it gets to the whole
model's, on the inputs that the layers before, fitted already, really give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from builders.checkpoint.widths import last_linear, layers_of, part_of
from builders.compress.importance import Forward
from builders.compress.texts import Batch

if TYPE_CHECKING:
    import torch

# Of each input's own square: how firmly weights are held where they were. Many directions are little known from 20,000
# tokens, and without it single texts get far worse.
DAMPING = 1e-2
_LEAST = 1e-6  # for inputs that are 0 on every text
_FITTED = (("attention_output", "attention.output"), ("ffn_out", "output"))  # part, and the module with its LayerNorm

States = list["torch.Tensor"]  # [texts, length, hidden] for each batch


def least_squares(
    model: Any, forward: Forward, whole: Any, whole_forward: Forward, matched: Sequence[int], batches: Sequence[Batch]
) -> None:
    """Fits `model` in place. `matched[i]` is the layer of `whole` that layer i was."""
    import torch

    seen = [batch["attention_mask"].bool() for batch in batches]
    with torch.no_grad():
        states, masks = _entering(model, forward, batches)
        targets = _targets(whole, whole_forward, batches)
        done = -1
        for number, layer in enumerate(layers_of(model)):
            while done < matched[number]:
                done, wanted = next(targets)
            for part, block in _FITTED:
                _fit(model, layer, part, block, states, masks, seen, wanted[part])
            states = [layer(hidden, mask) for hidden, mask in zip(states, masks, strict=True)]


def _entering(model: Any, forward: Forward, batches: Sequence[Batch]) -> tuple[States, list[Any]]:
    """What the first layer is given: states, and masks as the model makes them."""
    states, masks = [], []

    def hook(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        states.append(given[0])
        masks.append(given[1] if len(given) > 1 else named.get("attention_mask"))

    with _hooked(layers_of(model)[0].register_forward_pre_hook, hook, with_kwargs=True):
        for batch in batches:
            forward(**batch)
    return states, masks


def _targets(whole: Any, forward: Forward, batches: Sequence[Batch]) -> Iterator[tuple[int, dict[str, States]]]:
    """Layer by layer, what goes into both LayerNorms."""
    states, masks = _entering(whole, forward, batches)
    for number, layer in enumerate(layers_of(whole)):
        found: dict[str, States] = {part: [] for part, _ in _FITTED}
        after = []
        for hidden, mask in zip(states, masks, strict=True):
            with (
                _inputs(layer.attention.output.LayerNorm, found["attention_output"]),
                _inputs(layer.output.LayerNorm, found["ffn_out"]),
            ):
                after.append(layer(hidden, mask))
        states = after
        yield number, found


def _fit(
    model: Any, layer: Any, part: str, block: str, states: States, masks: list[Any], seen: States, wanted: States
) -> None:  # fmt: skip
    """Solves (X'X + damping) D = X'(Y - X W) for the change D of one matrix and its bias, over real tokens.

    Each text counts as much as another, whatever its length: what comes out is a text's vector, and of one of six
    tokens each is a sixth.
    """
    import torch

    linear, norm = last_linear(part_of(model, layer, part)), layer.get_submodule(block).LayerNorm
    count = linear.in_features + 1
    gram, cross = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, linear.out_features).double()
    for hidden, mask, tokens, target in zip(states, masks, seen, wanted, strict=True):
        inputs: States = []
        sums: States = []
        with _inputs(linear, inputs), _inputs(norm, sums):
            layer(hidden, mask)
        x = torch.nn.functional.pad(inputs[0][tokens], (0, 1), value=1.0)
        weighted = x / tokens.sum(1, keepdim=True).expand_as(tokens)[tokens][:, None]
        gram += weighted.T @ x
        cross += weighted.T @ (target[tokens] - sums[0][tokens])  # the rest of the sum stays as it is
    damping = DAMPING * gram.diagonal() + _LEAST
    change = torch.linalg.solve(gram + torch.diag(damping), cross).float()
    linear.weight += change[:-1].T
    linear.bias += change[-1]


def _inputs(module: Any, found: States) -> Any:
    return _hooked(module.register_forward_pre_hook, lambda _, given: found.append(given[0]))


@contextmanager
def _hooked(register: Callable[..., Any], hook: Callable[..., Any], **options: bool) -> Iterator[None]:
    handle = register(hook, **options)
    try:
        yield
    finally:
        handle.remove()
