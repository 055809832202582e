"""The result of a proof: frozen records, saved as `proof.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SCHEMA = 1
Status = Literal["ran", "not run", "failed"]


@dataclass(frozen=True)
class Row:
    """One measurement, or the reason why there is none.

    Rows of the same `case` are the same work done in different ways (`how`), so they can be compared. Units stand in
    the names of `figures`; `fraction` is the least time that the case can take over the time that it took.
    """

    case: str
    how: str
    axes: dict[str, int] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    note: str = ""
    reason: str = ""  # why it was not measured


@dataclass(frozen=True)
class Section:
    """`reason` says why it did not run, or what failed; rows measured before a failure are kept."""

    name: str
    status: Status
    reason: str
    seconds: float
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Proof:
    """`dry`: made on a CPU with tiny shapes. It proves that the script works, and says nothing about speed."""

    date: str
    device: str
    dry: bool
    budget_s: float
    sections: tuple[Section, ...]
    schema: int = SCHEMA

    @property
    def failed(self) -> tuple[Section, ...]:
        return tuple(section for section in self.sections if section.status == "failed")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> Proof:
        """Raises ValueError for another schema."""
        data: dict[str, Any] = json.loads(text)
        if data.get("schema") != SCHEMA:
            raise ValueError(f"proof.json has schema {data.get('schema')}, expected {SCHEMA}")
        sections = tuple(
            Section(**{**section, "rows": tuple(Row(**row) for row in section["rows"])}) for section in data["sections"]
        )
        return Proof(**{**data, "sections": sections})


@dataclass(frozen=True)
class Gap:
    """The case that stays furthest from its limit in the fastest way that the limit holds for."""

    case: str
    how: str
    fraction: float
    ms: float
    floor_ms: float
    bound_by: str


def _held(proof: Proof) -> list[Row]:
    return [row for section in proof.sections for row in section.rows if "fraction" in row.figures]


def beyond_limit(proof: Proof) -> tuple[Row, ...]:
    """Rows that took less than their floor: it was not theirs, as `roofline` says, and tells nothing of them."""
    return tuple(row for row in _held(proof) if row.figures["fraction"] > 1)


def largest_gap(proof: Proof) -> Gap | None:
    """None where nothing was held against limits that hold for it."""
    best: dict[str, Row] = {}
    for row in (row for row in _held(proof) if row.figures["fraction"] <= 1):
        kept = best.get(row.case)
        if kept is None or row.figures["fraction"] > kept.figures["fraction"]:
            best[row.case] = row
    if not best:
        return None
    row = min(best.values(), key=lambda each: each.figures["fraction"])
    figures = row.figures
    return Gap(row.case, row.how, figures["fraction"], figures["ms"], figures["floor_ms"], row.facts["bound by"])
