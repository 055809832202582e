"""What a version keeps of its past, in its own folder: rows to replay, and a hold-out of every domain it learnt.

Both belong to the version, as its weights do: a version that is rolled back takes its memory with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from online.tasks.task import Rows
from runtime.errors import InputError

FOLDER = "online"
_RESERVOIR = "reservoir.npy"
_SEEN = "seen.npy"
CAPACITY = 2048  # rows


@dataclass
class Reservoir:
    """An even sample of all rows that were ever offered, [rows, width]. Vitter, 1985, algorithm R."""

    rows: Rows
    seen: int
    capacity: int = CAPACITY

    @staticmethod
    def empty(width: int, capacity: int = CAPACITY) -> Reservoir:
        return Reservoir(np.zeros((0, width), np.int64), 0, capacity)

    def offered(self, rows: Rows, random: np.random.Generator) -> Reservoir:
        """A reservoir of all rows so far and these; this one stays as it is."""
        kept = list(self.rows)
        seen = self.seen
        for row in rows:
            seen += 1
            if len(kept) < self.capacity:
                kept.append(row)
            elif (place := int(random.integers(seen))) < self.capacity:
                kept[place] = row
        return Reservoir(np.array(kept, np.int64).reshape(-1, rows.shape[1]), seen, self.capacity)


@dataclass(frozen=True)
class Memory:
    """`held_out` by domain, oldest first. No row of it is ever trained on."""

    reservoir: Reservoir
    held_out: Mapping[str, Rows] = field(default_factory=dict)

    def with_domain(self, name: str, rows: Rows) -> Memory:
        """Raises InputError for a domain that is there already: its hold-out would no longer be held out."""
        require_name(name)
        if name in self.held_out:
            raise InputError(
                f"domain {name}",
                got="a hold-out that this version has already",
                expected="a new domain",
                fix="give the new rows another name",
            )
        return Memory(self.reservoir, {**self.held_out, name: rows})


def save_memory(memory: Memory, folder: Path) -> None:
    """Into a version's folder that is being written."""
    target = folder / FOLDER
    target.mkdir()
    np.save(target / _RESERVOIR, memory.reservoir.rows, allow_pickle=False)
    np.save(target / _SEEN, np.array([memory.reservoir.seen, memory.reservoir.capacity]), allow_pickle=False)
    for number, (name, rows) in enumerate(memory.held_out.items()):
        require_name(name)
        np.save(target / f"held-out.{number:03d}.{name}.npy", rows, allow_pickle=False)


def load_memory(folder: Path) -> Memory:
    """Raises InputError for a version without a memory, or with a damaged one."""
    source = folder / FOLDER
    try:
        seen, capacity = np.load(source / _SEEN, allow_pickle=False).tolist()
        reservoir = Reservoir(_rows(source / _RESERVOIR), seen, capacity)
        held_out = {file.name.split(".")[2]: _rows(file) for file in sorted(source.glob("held-out.*.npy"))}
    except (OSError, ValueError, IndexError) as error:
        raise InputError(
            f"memory of {folder}",
            got=f"{type(error).__name__}: {error}",
            expected=f"{FOLDER}/ with a reservoir and hold-outs",
            fix="save a memory beside the first version (`online.learner.memory.save_memory`)",
        ) from error
    return Memory(reservoir, held_out)


def _rows(file: Path) -> Rows:
    found: Rows = np.load(file, allow_pickle=False)
    if found.ndim != 2 or found.dtype != np.int64:
        raise ValueError(f"{file.name} holds {found.dtype} {list(found.shape)}, not rows of whole numbers")
    return found


def require_name(name: str) -> None:
    """Raises InputError for a name that is no part of a file's name."""
    if not name or not all(char.isascii() and (char.isalnum() or char in "-_") for char in name) or len(name) > 64:
        raise InputError(
            "domain", got=repr(name), expected="letters, digits, - and _, 64 at most", fix="name it otherwise"
        )
