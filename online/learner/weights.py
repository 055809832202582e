"""A model's weights in the file of the version before: the same tensors, in its names and types."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runtime.errors import InputError

WEIGHTS = "model.safetensors"
_SHOWN = 4


def require_writable(model: Any, version: Path) -> None:
    """Raises InputError where the file has no place for a weight that an update moves: it would be lost."""
    from safetensors import safe_open

    with safe_open(version / WEIGHTS, "pt") as before:
        places = _places(model, before.keys())
    state = model.state_dict()
    written = {state[name].data_ptr() for name in places.values()}  # matrices that are one stand there once
    moved = [
        name for name, weight in model.named_parameters() if weight.requires_grad and weight.data_ptr() not in written
    ]
    if moved:
        raise InputError(
            f"weights of {version / WEIGHTS}", got=f"other names than {type(model).__name__} has ({moved[0]}, ...)",
            expected=f"all that an update moves; {', '.join(moved[:_SHOWN])} would be lost",
            fix="load the model with transformers, save it with save_pretrained, and begin from that",
        )  # fmt: skip


def save_weights(model: Any, version: Path, out: Path) -> None:
    """The tensors that the previous file has, in its types; those of a head that the model does not use stay as they
    are, and matrices that are one stay one."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    state, tensors = model.state_dict(), {}
    with safe_open(version / WEIGHTS, "pt") as before:
        places = _places(model, before.keys())
        for name in before.keys():  # noqa: SIM118
            old = before.get_tensor(name)
            tensors[name] = state[places[name]].to(old.dtype).contiguous() if name in places else old
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})


def _places(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The model's own names of the file's tensors. A model without its head has no prefix before them, one with a head
    has, whichever of the two was saved."""
    state, prefix = model.state_dict(), f"{model.base_model_prefix}."
    found = {}
    for name in names:
        own = next((one for one in (name, name.removeprefix(prefix), f"{prefix}{name}") if one in state), None)
        if own is not None:
            found[name] = own
    return found
