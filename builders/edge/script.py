"""Scripts that run a maker's library in a process of its own: it may print what it likes there, or crash, or want
other versions of what we have."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from builders.errors import CheckError
from runtime.graph import Tensors

_LIMIT_S = 3600.0
_SAID = 4  # last lines of a script that failed


@dataclass(frozen=True)
class EdgeScript:
    """`python FILE VERB ARGUMENT…`; the last line of its output is its answer."""

    python: str
    file: Path

    def run(self, *arguments: object) -> str:
        """Raises ScriptFailed with what it said."""
        command = [self.python, str(self.file), *map(str, arguments)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise ScriptFailed(f"no end within {_LIMIT_S:.0f} s") from error
        except OSError as error:
            raise ScriptFailed(str(error)) from error
        said = done.stdout.strip().splitlines()
        if done.returncode:
            lines = [*said, *done.stderr.strip().splitlines()]
            told = [line for line in lines if not line.startswith((" ", "Traceback"))][-_SAID:]  # not where it stood
            ended = f"exit {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
            raise ScriptFailed(f"{ended}: " + "\n".join(told))
        return said[-1] if said else ""


class ScriptFailed(Exception):
    """Its message is what the script said last."""


class ScriptExecutor:
    """A `GraphExecutor`: batches and vectors go through files."""

    lanes = 1

    def __init__(self, script: EdgeScript, model: Path, output: str, description: str) -> None:
        """`output`: the name of the vectors in the model."""
        self._script, self._model, self._output, self.description = script, model, output, description

    def run_all(self, batches: Sequence[Tensors], wide: int = 0) -> list[NDArray[np.float32]]:
        """Raises CheckError where the runtime fails."""
        with tempfile.TemporaryDirectory(prefix="trireme-edge-") as folder:
            given, made = Path(folder, "given.npz"), Path(folder, "made.npz")
            np.savez(
                given, **{f"{i}/{name}": array for i, batch in enumerate(batches) for name, array in batch.items()}
            )
            try:
                self._script.run("run", self._model, self._output, given, made)
            except ScriptFailed as error:
                raise CheckError(f"{self.description} does not run {self._model.name}: {error}") from error
            with np.load(made) as found:
                return [found[str(index)] for index in range(len(batches))]
