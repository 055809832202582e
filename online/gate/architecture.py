"""Whether two folders hold models of one architecture, so that one may take the other's place in every later stage."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from runtime.errors import InputError

# What transformers writes of itself, or of how the weights lie on disk.
_NOT_ITS_SHAPE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"}
# Beside the model: what makes a vector of its states. Not every folder has them, and both must have the same.
_OF_SENTENCES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")


def differences(previous: Path, candidate: Path) -> list[str]:
    """In words, none for the same architecture: configuration, tokenizer, and every tensor's name and shape."""
    before, after = (_config(folder) for folder in (previous, candidate))
    found = [
        f"config.json: {key} is {after.get(key)!r}, was {before.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    if _read(previous, "tokenizer.json") != _read(candidate, "tokenizer.json"):
        found.append("tokenizer.json differs: the same ids mean other text")
    found += [f"{name} differs" for name in _beside(previous, candidate)]
    shapes, others = (_shapes(folder) for folder in (previous, candidate))
    return found + [
        f"tensor {name} is {others.get(name)}, was {shapes.get(name)}"
        for name in sorted(shapes.keys() | others.keys())
        if shapes.get(name) != others.get(name)
    ]


def _beside(previous: Path, candidate: Path) -> list[str]:
    """Settings, and weights of modules behind the model, that the two do not share."""
    found = {
        file.relative_to(folder).as_posix()
        for folder in (previous, candidate)
        for file in (*(folder / name for name in _OF_SENTENCES), *folder.glob("[0-9]*_*/*"))
        if file.is_file()
    }
    return [name for name in sorted(found) if _optional(previous / name) != _optional(candidate / name)]


def _optional(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def fingerprint(folder: Path) -> str:
    """A digest of all that `differences` compares: the same where it finds none."""
    parts = [_config(folder), hashlib.sha256(_read(folder, "tokenizer.json")).hexdigest(), _shapes(folder)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _config(folder: Path) -> dict[str, Any]:
    found = json.loads(_read(folder, "config.json"))
    return {key: value for key, value in found.items() if key not in _NOT_ITS_SHAPE}


def _shapes(folder: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    _read(folder, "model.safetensors", 0)
    with safe_open(folder / "model.safetensors", "np") as tensors:
        return {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def _read(folder: Path, name: str, size: int = -1) -> bytes:
    try:
        with (folder / name).open("rb") as stream:
            return stream.read(size)
    except OSError as error:
        raise InputError(
            f"model {folder}",
            got=f"{name}: {error.strerror}",
            expected="config.json, tokenizer.json and model.safetensors",
            fix="name the folder of a model",
        ) from error
