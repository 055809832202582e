"""Content-addressed results of stages.

`<root>/<stage>/<key>/` holds the files of one artifact and its `record.json`. The key is the SHA-256 of everything
that the result depends on: what the caller names (input digests, the spec slice), and the source and the libraries of
the stage itself, which are found here. A directory appears by a rename, so it is whole or absent. Two processes may
build the same key: the first rename wins.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from builders.artifacts import Artifact, file_digest
from builders.errors import MachineError
from builders.store.atomic import atomic_directory
from builders.store.closure import code_key

A = TypeVar("A", bound=Artifact)
_RECORD = "record.json"


def link_or_copy(source: Path, target: Path) -> Path:
    """The same file under another name where the file system allows it, else a copy. Returns `target`."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
    return target


def key_of(content: dict[str, Any]) -> str:
    """Of what is JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class Store:
    """Artifacts under one root."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get_or_build(
        self, stage: str, inputs: dict[str, Any], kind: type[A], build: Callable[[Path], A]
    ) -> tuple[A, bool]:
        """The artifact of `stage` for these inputs, and whether it was there already.

        `build(directory)` writes files into an empty directory and returns the record; its own code is part of the key.
        `inputs` are JSON: what has no order, or an address, would give another key in each process. A stored artifact
        whose files no longer have their digests is dropped and built again.
        """
        target = self.root / stage / key_of({**inputs, "made by": code_key(build)})
        damaged = target.is_dir()  # asked first: what appears while we look is another process's, and whole
        found = _load(target, kind)
        if found is not None:
            return found, True
        if damaged:
            shutil.rmtree(target, ignore_errors=True)
        with atomic_directory(target) as work:
            record = build(work)
            (work / _RECORD).write_text(record.model_dump_json(indent=2) + "\n")
        built = _load(target, kind)
        if built is None:
            raise MachineError(
                f"{stage} result in {target}",
                got="files that changed while they were written",
                expected="the files of the record",
                fix="check the disk, then run the command again",
            )
        return built, False


def _load(directory: Path, kind: type[A]) -> A | None:
    try:
        data = json.loads((directory / _RECORD).read_text())
        artifact = kind.model_validate({**data, "directory": directory})
        intact = all(
            artifact.path(file.name).stat().st_size == file.bytes
            and file_digest(artifact.path(file.name)) == file.sha256
            for file in artifact.files
        )
    except (OSError, ValueError):
        return None
    return artifact if intact else None
