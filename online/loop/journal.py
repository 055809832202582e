"""Where the loop writes things down: one file that says where it stands, and a folder for each update."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from builders.store.atomic import atomic_directory
from online.files import lock_beside, replace_file
from online.loop.records import LoopState, UpdateRecord
from online.tasks.task import Rows
from runtime.errors import InputError
from runtime.settings import ServerSettings

_RECORD = "record.json"
_ROWS = ("rows.npy", "held-out.npy")


class LoopFiles:
    """Of one deployment, under its build folder. Reading asks for no lock."""

    def __init__(self, build_dir: Path, name: str) -> None:
        self.folder = build_dir / name / "online"
        self.state_file = self.folder / "loop.json"
        self.page = self.folder / "timeline.html"
        self.asked_back = self.folder / "roll-back.json"

    @property
    def feedback_url(self) -> str:
        return f"sqlite:///{(self.folder / 'feedback.db').resolve()}"

    def update(self, number: int) -> Path:
        return self.folder / "updates" / f"{number:04d}"

    def checkpoint(self, number: int) -> Path:
        """What an update has made; 0 is the first version."""
        return (self.update(number) / "checkpoint").resolve()

    def rollout(self, number: int) -> Path:
        return self.update(number) / "rollout.json"

    def load(self) -> LoopState | None:
        """None where no loop was begun. Raises InputError for a file that is not a loop's."""
        try:
            return LoopState.model_validate_json(self.state_file.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise _damaged(self.state_file, error) from error

    def ended(self) -> list[UpdateRecord]:
        """Every update that has ended, oldest first. Raises InputError for a damaged record."""
        found = []
        for file in sorted(self.folder.glob(f"updates/*/{_RECORD}")):
            try:
                found.append(UpdateRecord.model_validate_json(file.read_bytes()))
            except ValidationError as error:
                raise _damaged(file, error) from error
        return found

    def server_settings(self, version: int) -> ServerSettings | None:
        """What a version was published with: a promoted one, or the one that is being rolled out."""
        state = self.load()
        if state is None:
            return None
        known = {item.version: item.settings for item in state.promoted}
        if state.update is not None and state.update.version is not None:
            known[state.update.version] = state.update.settings
        return ServerSettings.model_validate_json(known[version]) if version in known else None

    def rows(self, number: int) -> tuple[Rows, Rows]:
        """To learn from, and held out: [rows, width] each."""
        learnt, held_out = (np.load(self.update(number) / name, allow_pickle=False) for name in _ROWS)
        return learnt, held_out


class LoopJournal(LoopFiles):
    """For the one process that carries the loop out."""

    def __init__(self, build_dir: Path, name: str) -> None:
        """Raises MachineError when another process has it."""
        super().__init__(build_dir, name)
        self._lock = lock_beside(self.state_file, "online learning in")

    def __enter__(self) -> LoopJournal:
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()

    def save(self, state: LoopState) -> None:
        replace_file(self.state_file, state.model_dump_json(indent=1).encode())

    def set_aside(self, number: int, learnt: Rows, held_out: Rows) -> None:
        """In the folder of a new update. One that a crash left, and no state knows, is written over."""
        rows: Mapping[str, Rows] = dict(zip(_ROWS, (learnt, held_out), strict=True))
        folder = self.update(number)
        if not folder.is_dir():
            with atomic_directory(folder) as work:
                for name, found in rows.items():
                    np.save(work / name, found, allow_pickle=False)
            return
        for name, found in rows.items():
            np.save(folder / name, found, allow_pickle=False)

    def put_down(self, record: UpdateRecord) -> None:
        """An update that has ended."""
        replace_file(self.update(record.number) / _RECORD, record.model_dump_json(indent=1).encode())

    def tidy(self, keep: set[int]) -> None:
        """While no update is under way: all rows go, and the weights of updates that are not among `keep`."""
        for folder in self.folder.glob("updates/[0-9]*"):
            for file in (
                *(folder / name for name in _ROWS),
                *folder.glob(".*.update"),
                *folder.glob("federated/*.safetensors"),
            ):
                file.unlink(missing_ok=True)
            if folder.name.isdigit() and int(folder.name) not in keep:
                shutil.rmtree(folder / "checkpoint", ignore_errors=True)


def _damaged(file: Path, error: ValidationError) -> InputError:
    return InputError(
        f"online learning's {file.name} in {file.parent}",
        got=str(error.errors(include_url=False, include_input=False)[0]["msg"]),
        expected="what this Trireme wrote",
        fix="use the Trireme that wrote it; or move the folder away, and the loop begins anew from the spec's model",
    )
