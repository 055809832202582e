"""The result as a Markdown page: what was measured, what was not and why, and the largest gap to the limit."""

from __future__ import annotations

from collections.abc import Sequence

from measure.gpu_proof.record import Proof, Row, Section, beyond_limit, largest_gap

DRY_NOTICE = "dry run: proves the script, not a speed"
_PERCENT = ("fraction", "host_share")
_PLOTS = {"fraction": "Achieved fraction of the limit", "tokens": "Decode: tokens/s against batch"}


def render(proof: Proof, plots: Sequence[str], note: str = "") -> str:
    """`plots` are the names of the SVG files beside the page, without their ending; `note` says why there are none."""
    ran = sum(section.status == "ran" for section in proof.sections)
    lines = [
        f"# GPU proof: {proof.device}, {proof.date}",
        "",
        *([f"**{DRY_NOTICE}.**", ""] if proof.dry else []),
        f"{ran} of {len(proof.sections)} sections ran, in {sum(s.seconds for s in proof.sections):.0f} s of "
        f"{proof.budget_s:.0f} s. `floor_ms` is the least time that the bytes and operations of a case can take at the "
        "limits measured here; `fraction` is that over the time measured. Everything is in `proof.json`.",
        "",
        "| section | status | seconds | |",
        "|---|---|--:|---|",
        *(f"| {s.name} | {s.status} | {s.seconds:.1f} | {_cell(s.reason)} |" for s in proof.sections),
        "",
        *_gap_lines(proof),
        *(line for name in plots for line in (f"![{_PLOTS[name]}]({name}.svg)", "")),
        *([" ".join(note.split()), ""] if note else []),
    ]
    for section in proof.sections:
        lines += _section_lines(section)
    return "\n".join(lines).rstrip() + "\n"


def _gap_lines(proof: Proof) -> list[str]:
    gap, beyond = largest_gap(proof), beyond_limit(proof)
    lines = ["No case was held against a limit, so no gap is named.", ""]
    if gap is not None:
        lines = [
            f"**Largest gap to the limit:** {gap.case}: {gap.how}, the fastest way that the limit holds for, takes "
            f"{_number(gap.ms)} ms where {gap.bound_by} alone takes {_number(gap.floor_ms)} ms: {gap.fraction:.1%} of "
            "the limit.",
            "",
        ]
    if beyond:
        named = "; ".join(f"{row.case}, {row.how}: {row.figures['fraction']:.1%}" for row in beyond)
        lines += [f"Faster than the limit, which therefore does not hold for them (docs/gpu says when): {named}.", ""]
    return lines


def _section_lines(section: Section) -> list[str]:
    lines = [f"## {section.name}", ""]
    if section.status != "ran":
        lines += [f"{section.status}: {section.reason}", ""]
    measured = [row for row in section.rows if row.figures]
    for names in dict.fromkeys(tuple(row.figures) for row in measured):  # a table for each set of figures
        lines += [*_table([row for row in measured if tuple(row.figures) == names], names), ""]
    for row in section.rows:
        if row.facts and not row.figures:
            facts = ", ".join(f"{name} {value}" for name, value in row.facts.items())
            lines.append(f"- {row.case}: {facts}")
        elif row.reason:
            lines.append(f"- {row.case} ({row.how}): not run: {row.reason}")
    return [*lines, ""]


def _table(rows: Sequence[Row], names: tuple[str, ...]) -> list[str]:
    facts = list(dict.fromkeys(name for row in rows for name in row.facts))
    noted = any(row.note for row in rows)
    heads = ["case", "how", *names, *facts, *(["note"] if noted else [])]
    lines = [f"| {' | '.join(heads)} |", f"|---|---|{'--:|' * len(names)}{'---|' * (len(heads) - 2 - len(names))}"]
    for row in rows:
        figures = [_figure(name, row.figures[name]) for name in names]
        cells = [row.case, row.how, *figures, *(row.facts.get(name, "") for name in facts)]
        lines.append(f"| {' | '.join(map(_cell, [*cells, *([row.note] if noted else [])]))} |")
    return lines


def _figure(name: str, value: float) -> str:
    return f"{value:.1%}" if name in _PERCENT else _number(value)


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
