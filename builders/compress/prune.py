"""Heads, neurons and layers taken out of the matrices: what remains is a smaller dense model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from builders.checkpoint.widths import Widths, layers_of, parts_of, reshape, widths_of_model
from builders.compress.kept import Indices

if TYPE_CHECKING:
    import torch

State = dict[str, "torch.Tensor"]


def keep(model: Any, heads: Sequence[Indices], ffn: Sequence[Indices]) -> None:
    """Each layer keeps these of its heads and neurons, in place. The model computes what the whole one would with the
    others' outputs set to zero. Heads that share keys and values count as one."""
    import numpy as np

    widths, state = widths_of_model(model), model.state_dict()
    size, layers = widths.head_size, []
    for number, layer in enumerate(widths.layers):
        shared = (np.asarray(heads[number])[:, None] * size + np.arange(size)).ravel()
        rows = (np.asarray(heads[number])[:, None] * size * widths.group + np.arange(size * widths.group)).ravel()
        for part in parts_of(widths.model_type):
            chosen = {"query": rows, "attention_output": rows, "key": shared, "value": shared}.get(part, ffn[number])
            dim = 1 if part in ("attention_output", "ffn_out") else 0
            _select(state, stem_of(model, number, part), chosen, dim, part in layer.ranks)
        left = {"heads": len(heads[number]) * widths.group, "ffn": len(ffn[number])}
        layers.append(layer.model_copy(update=left))
    become(model, widths.model_copy(update={"layers": tuple(layers)}), state)


def keep_layers(model: Any, numbers: Sequence[int]) -> None:
    """The model of these layers alone, in place."""
    widths, state = widths_of_model(model), model.state_dict()
    start = _start(model)
    left = {name: value for name, value in state.items() if not name.startswith(start)}
    for new, old in enumerate(numbers):
        own = f"{start}{old}."
        moved = {name: value for name, value in state.items() if name.startswith(own)}
        left |= {f"{start}{new}.{name.removeprefix(own)}": value for name, value in moved.items()}
    become(model, widths.model_copy(update={"layers": tuple(widths.layers[old] for old in numbers)}), left)


def become(model: Any, widths: Widths, state: State) -> None:
    """The widths with the state that belongs to them. Raises RuntimeError where these do not fit."""
    reshape(model, widths)
    model.load_state_dict({name: value.contiguous() for name, value in state.items()})
    model.eval()


def _start(model: Any) -> str:
    layers = layers_of(model)
    found: str = next(name for name, module in model.named_modules() if module is layers)
    return f"{found}."


def stem_of(model: Any, layer: int, part: str) -> str:
    return f"{_start(model)}{layer}.{parts_of(model.config.model_type)[part]}"


def _select(state: State, stem: str, indices: Indices, dim: int, thin: bool) -> None:
    """Rows (outputs, with their bias) or columns (inputs) of a matrix, or of the factor of a product that has them."""
    import torch

    chosen = torch.as_tensor(indices)
    factor = f"{stem}.{1 - dim}" if thin else stem
    state[f"{factor}.weight"] = state[f"{factor}.weight"].index_select(dim, chosen)
    if dim == 0 and f"{factor}.bias" in state:
        state[f"{factor}.bias"] = state[f"{factor}.bias"].index_select(0, chosen)
