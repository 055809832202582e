"""A LoRA adapter merged into the weights that it was trained on, by peft."""

from __future__ import annotations

import re
import warnings
from typing import Any

from builders.artifacts import Checkpoint
from builders.checkpoint.reading import read_json
from builders.errors import CheckpointError, MachineError


def provided(checkpoint: Checkpoint) -> list[str]:
    """Patterns of the weights that the adapter brings whole, such as a new head."""
    if checkpoint.adapter is None:
        return []
    saved = read_json(checkpoint.adapter / "adapter_config.json").get("modules_to_save") or []
    return [rf"(^|\.){re.escape(str(name))}\." for name in saved]


def with_adapter(model: Any, checkpoint: Checkpoint) -> Any:
    """The model with its adapter merged; the model itself where there is none. Every tensor of the file is used.

    Raises CheckpointError for an adapter of another model, MachineError where peft is not installed.
    """
    if checkpoint.adapter is None:
        return model
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise MachineError(
            f"adapter {checkpoint.adapter}", got="peft is not installed", expected="peft, which merges it",
            fix="pip install peft, or `make install`",
        ) from error  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of absent tensors; they are counted below
            adapted = PeftModel.from_pretrained(model, str(checkpoint.adapter))
            wanted = set(get_peft_model_state_dict(adapted))
        found = _tensors(checkpoint)
        if wanted != found:
            odd = sorted(wanted ^ found)
            raise ValueError(f"{len(wanted - found)} tensors missing, {len(found - wanted)} unknown ({odd[0]})")
        return adapted.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"adapter {checkpoint.adapter}", got=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            expected=f"an adapter of {type(model).__name__} with the sizes of its config.json",
            fix="give the base model that the adapter was trained on, and the task that it was trained for",
        ) from error  # fmt: skip


def _tensors(checkpoint: Checkpoint) -> set[str]:
    assert checkpoint.adapter is not None
    file = checkpoint.adapter / "adapter_model.safetensors"
    if file.is_file():
        from safetensors import safe_open

        with safe_open(file, framework="np") as tensors:
            return set(tensors.keys())
    import torch

    return set(torch.load(file.with_name("adapter_model.bin"), weights_only=True))
