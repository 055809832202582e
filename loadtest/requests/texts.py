"""The texts that users send."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

from loadtest.errors import LoadInputError


def read_texts(path: Path) -> tuple[str, ...]:
    """Lines of a UTF-8 file, without the blank ones. Raises LoadInputError."""
    fix = "give a UTF-8 file that holds one text a line"
    try:
        # newline="\n" keeps U+2028 and form feeds inside a text
        with path.open(encoding="utf-8-sig", newline="\n") as stream:
            texts = tuple(text for line in stream if (text := line.strip()))
    except UnicodeDecodeError as error:
        got = f"bytes that are not UTF-8 ({error.reason} at byte {error.start})"
        raise LoadInputError(f"texts file {path}", got=got, expected="UTF-8", fix=fix) from error
    except OSError as error:
        got = error.strerror or str(error)
        raise LoadInputError(f"texts file {path}", got=got, expected="a readable file", fix=fix) from error
    if not texts:
        raise LoadInputError(f"texts file {path}", got="no text", expected="at least one line of text", fix=fix)
    return texts


def digest_texts(texts: Sequence[str]) -> str:
    """SHA-256 over the texts as they are sent, so that two reports show whether they used the same ones."""
    whole = hashlib.sha256()
    for text in texts:
        whole.update(text.encode() + b"\n")
    return whole.hexdigest()


def dice_of_user(seed: int, worker: int, user: int) -> random.Random:
    """A stream of its own for each user of each worker: a run can be repeated, and no two users walk in lockstep."""
    return random.Random(f"{seed}/{worker}/{user}")  # a string is hashed with SHA-512, so near seeds are far apart
