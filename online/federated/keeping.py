"""The last complete round on disk: weights, momentum and a record of every round. A coordinator that is killed goes on
from there."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, ValidationError

from builders.digests import file_digest
from builders.store.atomic import telling_disk_full
from online.federated.tensors import TensorFile, Tensors, write_tensors
from online.files import replace_file
from runtime.errors import InputError
from runtime.record import Record

_STATE = "rounds.json"
_PUSHED = "pushed"


class AcceptedUpdate(Record):
    """`share`: of the round's step. `held_out`: what the client says of the weights that the round began with."""

    client: str
    samples: int
    share: float
    length: float
    loss: float
    held_out: float | None


class RoundRecord(Record):
    """`length`: of the step that it made."""

    number: int
    attempt: int
    accepted: tuple[AcceptedUpdate, ...]
    rejected: Mapping[str, str]
    missing: tuple[str, ...]
    length: float


class RoundsState(Record):
    """`key`: what is trained, and how. Files by name, with their SHA-256."""

    key: str
    complete: int = Field(default=0, ge=0)
    files: Mapping[str, str] = Field(default_factory=dict)
    history: tuple[RoundRecord, ...] = ()


class RoundFiles:
    """A folder of an update. Files of a round are written before the state that names them, and older ones go after."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pushed = folder / _PUSHED

    def open(self, key: str, weights: Tensors) -> RoundsState:
        """Of a coordinator that was killed, or new ones from `weights`. Raises InputError for files of other rounds, or
        damaged ones; MachineError when the disk is full."""
        with telling_disk_full(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.pushed, ignore_errors=True)  # of a round that did not end
            self.pushed.mkdir()
        state = self.load()
        if state is None:
            return self.save(RoundsState(key=key), weights, None)
        if state.key != key:
            raise self._damaged("rounds of another update, or another plan")
        for name, digest in state.files.items():
            if not (self.folder / name).is_file() or file_digest(self.folder / name) != digest:
                raise self._damaged(f"{name} is not what was written")
        return state

    def load(self) -> RoundsState | None:
        try:
            return RoundsState.model_validate_json((self.folder / _STATE).read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise self._damaged(str(error.errors(include_url=False, include_input=False)[0]["msg"])) from error

    def save(self, state: RoundsState, weights: Tensors, momentum: Tensors | None) -> RoundsState:
        """Returns the state with the names of its files. Raises MachineError when the disk is full; the state before is
        then the one that stands."""
        found = {"weights": weights} if momentum is None else {"weights": weights, "momentum": momentum}
        with telling_disk_full(self.folder):
            names = {f"{kind}.{state.complete:06d}.safetensors": tensors for kind, tensors in found.items()}
            files = {name: write_tensors(tensors, self.folder / name) for name, tensors in names.items()}
            after = state.model_copy(update={"files": files})
            replace_file(self.folder / _STATE, after.model_dump_json(indent=1).encode())
        self._tidy(set(files))
        return after

    def weights_file(self, state: RoundsState) -> Path:
        return self.folder / f"weights.{state.complete:06d}.safetensors"

    def momentum(self, state: RoundsState) -> TensorFile | None:
        name = f"momentum.{state.complete:06d}.safetensors"
        return TensorFile(self.folder / name) if name in state.files else None

    def drop(self) -> None:
        """Weights and momentum, once a candidate is made of them; the record stays."""
        self._tidy(set())
        shutil.rmtree(self.pushed, ignore_errors=True)

    def _tidy(self, keep: set[str]) -> None:
        for pattern in ("*.safetensors", ".*.safetensors.new"):
            for file in self.folder.glob(pattern):
                if file.name not in keep:
                    file.unlink(missing_ok=True)

    def _damaged(self, got: str) -> InputError:
        return InputError(
            f"federated rounds in {self.folder}", got=got, expected="what the coordinator of this update wrote",
            fix="remove the folder, and its rounds begin anew",
        )  # fmt: skip
