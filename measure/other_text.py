"""Real text of another domain than Python's own, on any machine: man pages, or the Kubernetes API in words."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from builders.errors import MachineError
from builders.judging.corpus import Document, mixed

MAN = Path("/usr/share/man")
FEWEST_BYTES = 500_000  # an update on less learns words rather than a language
MOST_BYTES = 1_500_000
_FAMILY = 8  # pages whose names begin alike
_SHORTEST = 400  # characters of a page: others point to another page
_KUBERNETES = "kubernetes_validate"  # a pinned dependency: its schemas are the same on every machine


def other_documents() -> tuple[str, list[Document]]:
    """What it is, and the documents in a mixed, stable order: man pages in English where the machine has enough of
    them (images of containers leave them out), and else the descriptions in Kubernetes' own schemas. Raises
    MachineError where there are neither."""
    for name, found in (("man pages", man_pages()), ("the Kubernetes API's descriptions", kubernetes_descriptions())):
        documents = _until(found, MOST_BYTES)
        if _bytes(documents) >= FEWEST_BYTES:
            return name, documents
    raise MachineError(
        "text of another domain", got="no man pages, and no schemas of Kubernetes", expected=f"{FEWEST_BYTES} bytes",
        fix="install man pages, or Trireme with the extra `kubernetes`",
    )  # fmt: skip


def man_pages(root: Path = MAN) -> Iterator[Document]:
    """Sections 1 to 8, as plain text; a few of each family, of which some have thousands that say much the same."""
    files = {file.name: file for section in range(1, 9) for file in root.glob(f"man{section}/*.{section}*")}
    families: Counter[str] = Counter()
    for file in (files[name] for name in mixed(files)):
        family = re.split(r"[-_.:]", file.name)[0]
        if families[family] >= _FAMILY:
            continue
        try:
            source = (gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()).decode("utf-8")
        except (OSError, EOFError, UnicodeDecodeError):
            continue  # a link to nowhere, or a page in an encoding of old
        text = plain(source)
        if len(text) >= _SHORTEST:
            families[family] += 1
            yield Document(file.name, (text,))


_ESCAPES = (
    (re.compile(r'\\".*'), ""),  # a comment
    (re.compile(r"\\f(?:\[[^\]]*\]|\(..|.)"), ""),  # fonts
    (re.compile(r"\\s[-+]?\d"), ""),
    (re.compile(r"\\\((?:aq|cq|oq)"), "'"),
    (re.compile(r"\\\((?:lq|rq|dq)"), '"'),
    (re.compile(r"\\\((?:em|en|hy)"), "-"),
    (re.compile(r"\\\(bu"), "*"),
    (re.compile(r"\\(?:\(..|\[[^\]]*\]|\*\(..|\*\[[^\]]*\]|\*.)"), ""),
    (re.compile(r"\\[&|^,/:%c]"), ""),
    (re.compile(r"\\e"), r"\\"),
    (re.compile(r"\\(.)"), r"\1"),
)
# Macros whose arguments are text, and those that part paragraphs; of others nothing is read.
_TEXT = {"SH", "SS", "B", "I", "BR", "RB", "BI", "IB", "IR", "RI", "SM", "SB", "IP", "Sh", "Ss", "Nm", "Nd", "Fl", "Ar",
         "Op", "Pa", "Cm", "It", "Xr", "Li", "Dq", "Sq", "Ql", "Em", "Sy", "Va", "Ev"}  # fmt: skip
_BREAKS = {"PP", "P", "LP", "TP", "IP", "SH", "SS", "Sh", "Ss", "Pp", "It", "sp", "RS", "RE", "nf", "fi", "br"}


def plain(source: str) -> str:
    """Text of a page in roff: what a reader would see, roughly, without its layout."""
    lines: list[str] = []
    skipping = False
    for line in source.splitlines():
        if skipping or line.startswith((".de", ".ig")):
            skipping = not line.startswith("..")
            continue
        if not line.startswith((".", "'")):
            lines.append(_unescaped(line))
            continue
        macro, _, rest = line[1:].strip().partition(" ")
        if macro in _BREAKS:
            lines.append("")
        if macro in _TEXT and (words := " ".join(_unescaped(rest).replace('"', "").split())):
            lines.append(words)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _unescaped(line: str) -> str:
    for pattern, instead in _ESCAPES:
        line = pattern.sub(instead, line)
    return line


def kubernetes_descriptions() -> Iterator[Document]:
    """Of every kind in the newest schema: its own description and those of its fields, each once in all."""
    spec = importlib.util.find_spec(_KUBERNETES)
    if spec is None or spec.origin is None:
        return
    files = Path(spec.origin).parent.rglob("_definitions.json")
    newest = max(files, key=lambda file: [int(part) for part in re.findall(r"\d+", file.parent.name)], default=None)
    if newest is None:
        return
    kinds = json.loads(newest.read_text())["$defs"]
    seen: set[str] = set()
    for name in mixed(kinds):
        passages = [text for text in _described(kinds[name]) if text not in seen]
        seen.update(passages)
        if sum(map(len, passages)) >= _SHORTEST:
            yield Document(name, ("\n".join(passages),))


def _described(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key == "description" and isinstance(value, str):
                yield value
            else:
                yield from _described(value)


def _until(documents: Iterator[Document], most: int) -> list[Document]:
    found, size = [], 0
    for document in documents:
        if size >= most:
            break
        found.append(document)
        size += _bytes([document])
    return found


def _bytes(documents: list[Document]) -> int:
    return sum(len(text.encode()) for document in documents for text in document.passages)
