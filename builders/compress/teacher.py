"""What the teacher makes of each batch, kept on disk as fp16: computed at the first pass, read at the next ones.

A file a batch, which appears whole. What a run that was killed has computed, the next one finds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builders.compress.losses import Seen, Wanted, look
from builders.compress.texts import Batch
from builders.store.atomic import telling_disk_full
from builders.training.arithmetic import Arithmetic

if TYPE_CHECKING:
    import torch


class TeacherStates:
    """`folder` belongs to this teacher, these batches and `wanted` alone."""

    def __init__(
        self, model: Any, forward: Callable[..., torch.Tensor], wanted: Wanted, arithmetic: Arithmetic, folder: Path
    ) -> None:
        self.cpu_s, self.tokens = 0.0, 0  # spent on computing, in this process
        self._model, self._forward, self._wanted = model, forward, wanted
        self._arithmetic, self._folder = arithmetic, folder

    def of(self, number: int, batch: Batch) -> Seen:
        """In fp32, whatever they were computed and kept in. Raises MachineError when the disk is full."""
        file = self._folder / f"{number:06d}.safetensors"
        kept = _read(file, batch)
        if kept is None:
            kept = self._compute(batch)
            _write(kept, file)
        found = {name: value.float() for name, value in kept.items()}
        return Seen(
            found["output"],
            {layer: found[f"states.{layer}"] for layer in self._wanted.states},
            {layer: found[f"attention.{layer}"] for layer in self._wanted.attention},
        )

    def _compute(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        import torch

        started = time.process_time()
        mixed = torch.autocast("cpu", torch.bfloat16) if self._arithmetic == "bfloat16" else nullcontext()
        with torch.no_grad(), mixed:
            seen = look(self._model, self._forward, batch, self._wanted)
        self.cpu_s += time.process_time() - started
        self.tokens += int(batch["attention_mask"].sum())
        kept = {"output": seen.output.float()}  # small, and compared the closest
        kept |= {f"states.{layer}": value.half() for layer, value in seen.states.items()}
        return kept | {f"attention.{layer}": value.half() for layer, value in seen.attention.items()}


def _read(file: Path, batch: Batch) -> Mapping[str, torch.Tensor] | None:
    """None where there is no file, or one that is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        return None
    try:
        found = load_file(file)
    except (OSError, SafetensorError):
        return None
    return found if len(found["output"]) == len(batch["input_ids"]) else None


def _write(kept: Mapping[str, torch.Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    part = file.with_name(f"{file.name}.{os.getpid()}")
    with telling_disk_full(file.parent):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in kept.items()}, part)
            part.replace(file)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
