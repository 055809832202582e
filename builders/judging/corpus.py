"""Real text at hand on every machine: the docstrings of Python's own standard library.

Used to calibrate, to check and to load. A user's own file (one text a line) takes its place where the spec names one.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from builders.artifacts import file_digest
from builders.errors import InputError, MachineError

MIN_CHARACTERS = 20
# Written by many hands, on mathematics, graphs, data, language and the web; each comes with what Trireme builds by. The
# last two hold the most, and take a minute to read.
LIBRARIES = (
    "numpy", "networkx", "huggingface_hub", "pydantic", "jinja2", "sqlalchemy", "sympy", "transformers", "torch",
)  # fmt: skip
# Tests hold little prose, and some distributions leave them out; what others installed is not Python's text.
_NOT_READ = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Document:
    """One source file's docstrings in their order, or one topic of `help()`; lines as they were written."""

    name: str
    passages: tuple[str, ...]


def corpus_key(file: Path | None) -> dict[str, Any]:
    """What the texts depend on, for cache keys."""
    if file is None:
        return {"docstrings": platform.python_version()}
    return {"file": file_digest(file) if file.is_file() else "missing"}


def library_key() -> dict[str, Any]:
    """What `library_texts` depends on."""
    return {name: metadata.version(name) for name in LIBRARIES}


def library_texts(characters: int) -> list[str]:
    """Paragraphs of docstrings, and first lines alone, which are as long as a question is: of as many of `LIBRARIES` as
    hold so many characters, or of all. As many tokens of whole docstrings, half of which are cut, teach less."""
    found, count = set[str](), 0
    for name in LIBRARIES:
        if count >= characters:
            break
        more = set(of_library(name)) - found
        count += sum(map(len, more))
        found |= more
    return mixed(found)


@functools.cache
def of_library(name: str) -> tuple[str, ...]:
    """Raises MachineError where it is not installed. A file for a newer Python than this one is passed over."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise MachineError(
            f"package {name}", got="not installed", expected="its sources, to learn from their docstrings",
            fix="install Trireme with the extra `build`, or give precision.calibration_texts",
        )  # fmt: skip
    root, found = Path(spec.origin).parent, set[str]()
    for path in sorted(root.rglob("*.py")):
        if _NOT_READ & set(path.relative_to(root).parts):
            continue
        try:
            docstrings = list(_docstrings_of(path))
        except SyntaxError:
            continue
        for docstring in docstrings:
            line, _, body = docstring.partition("\n")
            parts = (*docstring.split("\n\n"), line if body.strip() else "")
            found |= {" ".join(part.split()) for part in parts}
    return tuple(text for text in found if len(text) >= MIN_CHARACTERS)


def mixed(found: Iterable[str]) -> list[str]:
    """In an order that is stable, and has nothing to do with where they stood."""
    return sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())


def texts(file: Path | None, count: int | None) -> list[str]:
    """The first `count` texts, or all. Raises InputError when the file cannot be read or holds too few, or none."""
    found = _docstrings() if file is None else _lines(file)
    if len(found) < (count or 1):
        raise InputError(
            f"texts in {file or 'the standard library'}",
            got=f"{len(found)} different texts",
            expected=f"at least {count or 1}",
            fix="give a longer file, or lower precision.calibration_samples",
        )
    return list(found[:count])


def labelled(file: Path, labels: int, *, pairs: bool = False) -> list[tuple[int, str, str]]:
    """Labels under `labels`, each with its text and, in `pairs`, a second one (else it is empty): lines of a number, a
    tab and a text (a tab and a text). Raises InputError."""
    found = []
    for number, line in enumerate(texts(file, None), 1):
        label, *parts = line.split("\t", 2 if pairs else 1)
        sound = len(parts) == (2 if pairs else 1) and all(part.strip() for part in parts)
        if not sound or not label.isdecimal() or int(label) >= labels:
            raise InputError(
                f"labels in {file}, different line {number}", got=repr(label[:40]),
                expected=f"a number under {labels}, a tab and a text{', a tab and a second one' if pairs else ''}",
                fix="mend the line",
            )  # fmt: skip
        found.append((int(label), parts[0], parts[1] if pairs else ""))
    return found


@functools.cache
def documents() -> tuple[Document, ...]:
    """Everything that Python says about itself: docstrings of the whole library, and the topics of `help()`.

    In an order that is stable. A paragraph that stands in two documents is kept in the first alone (the topic `if` is
    a section of the topic `compound`), so that a split by document parts all prose.
    """
    owner: dict[str, str] = {}
    found = []
    for name, passages in [*_library(), *_topics()]:
        kept = (_unseen(text, name, owner) for text in dict.fromkeys(passages))
        found.append(Document(name, tuple(text for text in kept if len(text) >= MIN_CHARACTERS)))
    return tuple(document for document in found if document.passages)


def _unseen(passage: str, document: str, owner: dict[str, str]) -> str:
    """`passage` without the paragraphs that another document owns. Short ones, such as headings, belong to nobody."""
    kept = []
    for paragraph in passage.split("\n\n"):
        words = " ".join(paragraph.split())
        if len(words) < 2 * MIN_CHARACTERS or owner.setdefault(words, document) == document:
            kept.append(paragraph)
    return "\n\n".join(kept).strip()


def _library() -> Iterator[tuple[str, list[str]]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not _NOT_READ & set(name.parts):
            yield name.as_posix(), list(_docstrings_of(path))


def _topics() -> Iterator[tuple[str, list[str]]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic {name}", [topics[name]]


def _docstrings_of(path: Path) -> Iterator[str]:
    """Parsed and never imported. Order of the source for modules, breadth first below."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


@functools.cache
def _docstrings() -> tuple[str, ...]:
    """Docstrings of the top-level modules, in an order that is stable and mixed."""
    found = set()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for docstring in _docstrings_of(path):
            text = " ".join(docstring.split())
            if len(text) >= MIN_CHARACTERS:
                found.add(text)
    return tuple(mixed(found))


def _lines(file: Path) -> tuple[str, ...]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"texts in {file}", got=str(error), expected="a UTF-8 file, one text a line", fix="check the path"
        ) from error
    return tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
