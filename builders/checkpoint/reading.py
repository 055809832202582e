"""JSON files of a checkpoint, and what is said of a file that is missing or damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from builders.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """An object; anything else that is valid JSON reads as an empty one."""
    require(path.parent, path.name, "give the folder that transformers' save_pretrained wrote")
    data = parse(path)
    return data if isinstance(data, dict) else {}


def read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(str(path), got=str(error), expected="valid JSON", fix="copy the file again") from error


def size(folder: Path, config: dict[str, Any], *names: str) -> int:
    """The first of these keys of config.json that holds a positive number."""
    found = next((config[name] for name in names if isinstance(config.get(name), int) and config[name] > 0), None)
    if found is None:
        raise CheckpointError(
            f"{folder / 'config.json'}: {names[0]}",
            got=repr(config.get(names[0])),
            expected="a positive number",
            fix="copy config.json of the model again",
        )
    return int(found)


def require(folder: Path, name: str, fix: str) -> None:
    if not (folder / name).is_file():
        raise CheckpointError(f"checkpoint {folder}", got=f"no {name}", expected=f"a file {name}", fix=fix)
