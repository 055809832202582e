"""Real text of five kinds that are nothing alike, from packages that Trireme installs: the same on every machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from builders.errors import MachineError
from builders.judging.corpus import Document, mixed
from measure.other_text import kubernetes_descriptions

_LONGEST = 4000  # characters of a document: no single one is a client's whole text
_SHORTEST = 400
_HEAD = 2500  # characters at the start of a model's code: a licence and imports, in each the same
# Bytes of each kind: clients do not hold alike much.
_BYTES = {"kubernetes": 400_000, "readmes": 320_000, "headers": 280_000, "models": 240_000, "licences": 120_000}


def five_texts() -> dict[str, list[Document]]:
    """Descriptions in the Kubernetes API, READMEs of packages, C++ headers, Python code of models, and licences. Raises
    MachineError where a package is missing."""
    sources = {
        "kubernetes": (Document(f"text of {one.name}", one.passages) for one in kubernetes_descriptions()),
        "readmes": _distributions("readmes"),
        "headers": _files("torch", "include/ATen", "*.h"),
        "models": _files("transformers", "models", "modeling_*.py", _HEAD),
        "licences": _distributions("licences"),
    }
    return {kind: list(_until(documents, _BYTES[kind], kind)) for kind, documents in sources.items()}


def _distributions(kind: str) -> Iterator[Document]:
    found: dict[str, str] = {}
    for one in metadata.distributions():
        name = one.metadata["Name"]
        if kind == "readmes":
            found[name] = (one.read_text("METADATA") or "").partition("\n\n")[2]  # behind its headers
        else:
            paths = [path for path in one.files or () if path.name.upper().startswith(("LICEN", "COPYING"))]
            for path in paths:
                file = Path(str(path.locate()))
                if file.is_file() and file.suffix not in (".py", ".pyc"):
                    found[f"{name} {path.name}"] = file.read_text(errors="replace")
    yield from _documents(found)


def _files(package: str, folder: str, pattern: str, skipped: int = 0) -> Iterator[Document]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return
    root = Path(spec.origin).parent / folder
    files = {str(file.relative_to(root)): file for file in root.rglob(pattern)}
    yield from _documents({name: file.read_text(errors="replace")[skipped:] for name, file in files.items()})


def _documents(texts: dict[str, str]) -> Iterator[Document]:
    """In a mixed, stable order. Many packages come with the same licence: what begins alike is one. A document's name,
    by which it is held out, is not what orders it: else the first ones would all be held out."""
    known = set[str]()
    for name in mixed(texts):
        text = texts[name].strip()[:_LONGEST]
        start = "".join(text.split())[200:800]
        if len(text) >= _SHORTEST and start not in known:
            known.add(start)
            yield Document(f"text of {name}", (text,))


def _until(documents: Iterable[Document], most: int, kind: str) -> Iterator[Document]:
    size = 0
    for document in documents:
        if size >= most:
            return
        size += len(document.passages[0].encode())
        yield document
    if size < most // 2:
        raise MachineError(
            f"text of kind {kind}", got=f"{size} bytes", expected=f"{most // 2} at least", fix="run `make install`"
        )
