"""Real text at hand on every machine: the docstrings of Python's own standard library.

Used to calibrate, to check and to load. A user's own file (one text a line) takes its place where the spec names one.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import platform
import sysconfig
from pathlib import Path
from typing import Any

from builders.artifacts import file_digest
from builders.errors import InputError

MIN_CHARACTERS = 20


def corpus_key(file: Path | None) -> dict[str, Any]:
    """What the texts depend on, for cache keys."""
    if file is None:
        return {"docstrings": platform.python_version()}
    return {"file": file_digest(file) if file.is_file() else "missing"}


def texts(file: Path | None, count: int) -> list[str]:
    """The first `count` texts. Raises InputError when the file cannot be read or holds too few."""
    found = _docstrings() if file is None else _lines(file)
    if len(found) < count:
        raise InputError(
            f"texts in {file or 'the standard library'}",
            got=f"{len(found)} different texts",
            expected=f"at least {count}",
            fix="give a longer file, or lower precision.calibration_samples",
        )
    return list(found[:count])


@functools.cache
def _docstrings() -> tuple[str, ...]:
    """Docstrings of the top-level modules, parsed and never imported, in an order that is stable and mixed."""
    found = set()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) >= MIN_CHARACTERS:
                    found.add(text)
    return tuple(sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest()))


def _lines(file: Path) -> tuple[str, ...]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"texts in {file}", got=str(error), expected="a UTF-8 file, one text a line", fix="check the path"
        ) from error
    return tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
