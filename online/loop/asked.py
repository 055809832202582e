"""A person's word that a version goes back: written down by a command, carried out by the loop."""

from __future__ import annotations

from pydantic import ValidationError

from online.files import replace_file
from online.loop.journal import LoopFiles
from online.loop.records import LoopState
from runtime.errors import InputError
from runtime.record import Record


class AskedBack(Record):
    """Names what is meant, so that it is carried out once: `update` under way, or the champion's `version`."""

    reason: str
    update: int | None = None
    version: int | None = None


def ask_back(files: LoopFiles, reason: str) -> str:
    """Writes it down; returns what will go back. Raises InputError where nothing can."""
    state = files.load()
    if state is None:
        raise InputError(
            f"online learning in {files.folder}", got="none", expected="a loop that was begun",
            fix="begin it with `trireme online run SPEC`",
        )  # fmt: skip
    if state.update is not None:
        asked, said = AskedBack(reason=reason, update=state.update.number), f"update {state.update.number}"
    elif len(state.promoted) > 1:
        asked = AskedBack(reason=reason, version=state.champion.version)
        said = f"version {state.champion.version}, back to {state.promoted[-2].version}"
    else:
        raise InputError(
            f"version {state.champion.version}", got="the first one, and no update under way",
            expected="a version to go back to", fix="there is nothing to do",
        )  # fmt: skip
    replace_file(files.asked_back, asked.model_dump_json().encode())
    return said


def going_back(files: LoopFiles, state: LoopState) -> str | None:
    """The reason, where what was asked for still stands; else the word is taken away."""
    try:
        asked = AskedBack.model_validate_json(files.asked_back.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise InputError(
            str(files.asked_back), got="what no rollback command wrote", expected="its word", fix="remove the file"
        ) from error
    of_update = state.update is not None and asked.update == state.update.number
    of_version = state.update is None and asked.version == state.champion.version and len(state.promoted) > 1
    if of_update or of_version:
        return asked.reason
    files.asked_back.unlink(missing_ok=True)
    return None
