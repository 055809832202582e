"""The partition map as SVG: stages side by side, their ranks, what fills each rank's memory, what the ranks say.

Pure functions from records to text. Nothing is fetched, no script runs, and colours follow the reader's scheme.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Literal

Kind = Literal["split", "whole", "cache", "activations", "runtime"]
LABELS: dict[Kind, str] = {
    "split": "split weights",
    "whole": "whole weights",
    "cache": "KV cache",
    "activations": "activations",
    "runtime": "runtime",
}


@dataclass(frozen=True)
class Rank:
    """`capacity` is the room on its GPU; None where no GPU is given."""

    name: str
    parts: tuple[tuple[Kind, int], ...]
    capacity: int | None = None

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.parts)


@dataclass(frozen=True)
class DrawnStage:
    """`says` are the collectives among its ranks, `sends` is what it hands to the next stage; each a line of text."""

    name: str
    note: str
    ranks: tuple[Rank, ...]
    says: tuple[str, ...]
    sends: str | None = None


@dataclass(frozen=True)
class Map:
    title: str
    notes: tuple[str, ...]
    stages: tuple[DrawnStage, ...]


STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #c9d1db; --paper: #ffffff; --panel: #f4f6f9;
  --split: #2f6db5; --whole: #8a5aa8; --cache: #c9781a; --activations: #4b8f3f; --runtime: #7d8794; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa6b5; --line: #3a4553; --paper: #14181e;
  --panel: #1c222b; --split: #6aa5ec; --whole: #b98ad6; --cache: #eaa650; --activations: #83c476;
  --runtime: #96a1ae; } }
.map { font: 13px system-ui, sans-serif; display: block; }
.map text { fill: var(--ink); } .map .soft { fill: var(--soft); font-size: 12px; }
.map .name { font-weight: 600; } .map .title { font-weight: 600; font-size: 16px; }
.map .panel { fill: var(--panel); stroke: var(--line); } .map .card { fill: var(--paper); stroke: var(--line); }
.map .room { fill: none; stroke: var(--soft); } .map .arrow { stroke: var(--soft); fill: none; stroke-width: 1.5; }
.map .head { fill: var(--soft); } .map .over { fill: #c8372d; font-weight: 600; }
.map .split { fill: var(--split); } .map .whole { fill: var(--whole); } .map .cache { fill: var(--cache); }
.map .activations { fill: var(--activations); } .map .runtime { fill: var(--runtime); }
"""

_WIDE, _GAP, _PAD, _CARD, _LINE = 340, 100, 14, 66, 18  # pixels: stage, arrow, margin, a rank's card, a line of text
_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def amount(size: float) -> str:
    """Bytes for reading, in decimal units."""
    for factor, unit in _UNITS:
        if size >= factor:
            return f"{size / factor:.3g} {unit}" if size < 1000 * factor else f"{size / factor:.0f} {unit}"
    return f"{size:.0f} B"


def milliseconds(value: float) -> str:
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def draw(found: Map) -> str:
    """One <svg> element. It needs STYLE somewhere above it, or within it when it stands alone."""
    top = _PAD + 24 + _LINE * len(found.notes) + 8
    lines = max(len(stage.says) for stage in found.stages)
    high = 2 * _PAD + 2 * _LINE + max(len(stage.ranks) for stage in found.stages) * (_CARD + 8) + lines * _LINE
    widest = max((rank.capacity or rank.bytes) for stage in found.stages for rank in stage.ranks)
    wide = len(found.stages) * _WIDE + (len(found.stages) - 1) * _GAP + 2 * _PAD
    wide, legend = max(wide, 640), top + high + 26
    parts = [_text(_PAD, _PAD + 14, found.title, "title")]
    parts += [_text(_PAD, _PAD + 36 + _LINE * row, note, "soft") for row, note in enumerate(found.notes)]
    for index, stage in enumerate(found.stages):
        left = _PAD + index * (_WIDE + _GAP)
        parts += _stage(stage, left, top, high, widest)
        if stage.sends is not None and index + 1 < len(found.stages):
            parts += _arrow(left + _WIDE, top + high / 2, stage.sends)
    parts += _legend(found, legend)
    label = escape(f"{found.title}: {len(found.stages)} stages of {len(found.stages[0].ranks)} ranks")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="map" role="img" aria-label="{label}" '
        f'width="{wide}" height="{legend + _PAD}" viewBox="0 0 {wide} {legend + _PAD}">{"".join(parts)}</svg>'
    )


def _stage(stage: DrawnStage, left: float, top: float, high: float, widest: int) -> list[str]:
    parts = [f'<rect class="panel" x="{left}" y="{top}" width="{_WIDE}" height="{high}" rx="8"/>']
    parts.append(_text(left + _PAD, top + 22, stage.name, "name"))
    parts.append(_text(left + _PAD, top + 40, stage.note, "soft"))
    at = top + _PAD + 2 * _LINE
    for rank in stage.ranks:
        parts += _card(rank, left + 10, at, widest)
        at += _CARD + 8
    return parts + [_text(left + _PAD, at + 12 + _LINE * row, line, "soft") for row, line in enumerate(stage.says)]


def _card(rank: Rank, left: float, top: float, widest: int) -> list[str]:
    """A bar of what fills the memory, to the scale of the whole map, in a frame as long as the room there is."""
    inner = _WIDE - 20 - 20
    scale = inner / max(widest, 1)
    parts = [f'<rect class="card" x="{left}" y="{top}" width="{_WIDE - 20}" height="{_CARD}" rx="6"/>']
    parts.append(_text(left + 10, top + 18, rank.name, "name"))
    right = f'x="{left + _WIDE - 30}" y="{top + 18}" text-anchor="end"'
    if rank.capacity is None:
        parts.append(f'<text class="soft" {right}>{amount(rank.bytes)}</text>')
    else:
        free = rank.capacity - rank.bytes
        told = f"{amount(free)} free" if free >= 0 else f"{amount(-free)} too much"
        parts.append(f'<text class="{"soft" if free >= 0 else "over"}" {right}>{told}</text>')
    at = left + 10.0
    for kind, size in rank.parts:
        length = min(size * scale, left + 10 + inner - at)
        title = f"<title>{LABELS[kind]}: {amount(size)}</title>"
        parts.append(
            f'<rect class="{kind}" x="{at:.2f}" y="{top + 26}" width="{length:.2f}" height="12">{title}</rect>'
        )
        at += length
    frame = min((rank.capacity or rank.bytes) * scale, inner)
    parts.append(f'<rect class="room" x="{left + 10}" y="{top + 26}" width="{frame:.2f}" height="12"/>')
    return [*parts, _text(left + 10, top + 56, _figures(rank), "soft")]


def _figures(rank: Rank) -> str:
    """The runtime's share is the same everywhere, and stands in the notes."""
    sizes = dict(rank.parts)
    if rank.capacity is None:
        told = [f"{LABELS[kind]} {amount(size)}" for kind, size in rank.parts if size]
    else:
        told = [f"weights {amount(sizes.get('split', 0) + sizes.get('whole', 0))}"]
        told += [f"KV {amount(sizes['cache'])}"] if sizes.get("cache") else []
        told += [f"activations {amount(sizes['activations'])}"] if sizes.get("activations") else []
    return " · ".join(told)


def _arrow(left: float, middle: float, told: str) -> list[str]:
    lines, right = told.split("\n"), left + _GAP
    return [
        f'<path class="arrow" d="M{left + 8} {middle}H{right - 14}"/>',
        f'<path class="head" d="M{right - 6} {middle}l-10 -5v10z"/>',
        *(
            f'<text class="soft" x="{left + _GAP / 2}" y="{middle - 9 - 15 * row}" text-anchor="middle">{line}</text>'
            for row, line in enumerate(map(escape, reversed(lines)))
        ),
    ]


def _legend(found: Map, top: float) -> list[str]:
    used = {kind for stage in found.stages for rank in stage.ranks for kind, size in rank.parts if size}
    parts, at = list[str](), _PAD
    for kind, label in LABELS.items():
        if kind in used:
            parts.append(f'<rect class="{kind}" x="{at}" y="{top - 10}" width="11" height="11" rx="2"/>')
            parts.append(_text(at + 16, top, label, "soft"))
            at += 16 + 7 * len(label) + 14
    return parts


def _text(left: float, base: float, told: str, kind: str) -> str:
    return f'<text class="{kind}" x="{left}" y="{base}">{escape(told)}</text>'
