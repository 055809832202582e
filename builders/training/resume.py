"""A training's state in one file, which is replaced whole: a process that is killed leaves the old one or the new."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from builders.errors import InputError
from builders.store.atomic import telling_disk_full

EVERY_S = 60.0  # a state is three or four times the weights


class Resume:
    """`key` says what is trained and how: the state of another training is refused, not taken over."""

    def __init__(self, file: Path, key: str, every_s: float = EVERY_S) -> None:
        self._file, self._key, self._every_s = file, key, every_s
        self._saved_at = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self._saved_at >= self._every_s

    def save(self, state: dict[str, Any]) -> None:
        """Raises MachineError when the disk is full."""
        import torch

        part = self._file.with_name(f"{self._file.name}.part")
        with telling_disk_full(self._file.parent):
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                with part.open("wb") as stream:
                    torch.save({"key": self._key, "state": state}, stream)
                    stream.flush()
                    os.fsync(stream.fileno())
                part.replace(self._file)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        self._saved_at = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """None where there is none yet. Raises InputError for a file that is another training's, or damaged."""
        import torch

        if not self._file.is_file():
            return None
        try:
            found = torch.load(self._file, weights_only=True)
            key, state = found["key"], found["state"]
        except Exception as error:  # whatever unpickling makes of bytes that are not its own
            raise self._refused(f"{type(error).__name__}: {str(error).splitlines()[0][:120]}") from error
        if key != self._key:
            raise self._refused("the state of another training")
        return dict(state)

    def drop(self) -> None:
        self._file.unlink(missing_ok=True)

    def _refused(self, got: str) -> InputError:
        return InputError(
            f"training state {self._file}", got=got, expected="the state that this training saved",
            fix="remove the file, and the training starts anew",
        )  # fmt: skip
