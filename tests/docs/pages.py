"""The pages that people read, taken apart: fenced blocks, code in running text, links and headings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests import ROOT

PAGES = tuple(
    path.relative_to(ROOT).as_posix()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
        ROOT / "docs" / "gpu" / "README.md",
        ROOT / "k8s" / "README.md",
    )
)
_GENERATOR = "<!-- needs a generator -->"


@dataclass(frozen=True)
class Block:
    """A fenced block; `generator`: the line before it says that it wants a language model, not the encoder."""

    page: str
    line: int
    language: str
    text: str
    generator: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def blocks() -> tuple[Block, ...]:
    return tuple(block for page in PAGES for block in _blocks(page))


def _blocks(page: str) -> list[Block]:
    found, lines = [], (ROOT / page).read_text().splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        before = lines[start - 1] if start else ""
        text = "\n".join(lines[start + 1 : number]) + "\n"
        found.append(Block(page, start + 1, lines[start].removeprefix("```"), text, before == _GENERATOR))
        start = None
    assert start is None, f"{page}:{start} opens a block that nothing closes"
    return found


def prose(page: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.S | re.M)


def codes(page: str) -> list[str]:
    """What stands between backticks in running text, a line break in it as a space."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def commands(block: Block) -> list[str]:
    """The lines of a block that a shell would run, continued ones joined, without prompts."""
    if block.language not in ("", "bash", "console"):
        return []
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if block.language != "console" or line.startswith("$ ")]


def anchors(page: Path) -> set[str]:
    """Of the headings, as the forge makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
