"""The result of a proof: frozen records, saved as `proof.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal

Status = Literal["ran", "not run", "failed"]


@dataclass(frozen=True)
class Measured:
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
    reason: str = ""
    seconds: float = 0.0
    rows: tuple[Measured, ...] = ()


@dataclass(frozen=True)
class Proof:
    """`dry`: made on a CPU with tiny shapes. It proves that the script works, and says nothing about speed."""

    date: str
    device: str
    dry: bool
    budget_s: float
    sections: tuple[Section, ...]
    schema: int = 1

    @property
    def failed(self) -> list[Section]:
        return [section for section in self.sections if section.status == "failed"]

    @property
    def held(self) -> list[Measured]:
        """Rows that were held against a limit."""
        return [row for section in self.sections for row in section.rows if "fraction" in row.figures]

    @property
    def largest_gap(self) -> Measured | None:
        """Of the fastest way of each case that the limit holds for, the one furthest from it.

        A row that took less than its floor tells nothing: the floor was not its own, as `roofline` says.
        """
        best: dict[str, Measured] = {}
        for row in sorted(self.held, key=lambda each: each.figures["fraction"]):
            if row.figures["fraction"] <= 1:
                best[row.case] = row
        return min(best.values(), key=lambda row: row.figures["fraction"], default=None)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"
