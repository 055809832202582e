"""The result for people: a Markdown page that says what was measured, what was not and why, and SVG plots beside it."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from measure.gpu_proof.record import Measured, Proof, Section

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DRY_NOTICE = "dry run: proves the script, not a speed"
_PERCENT = ("fraction", "host_share")
_PLOTS = {"fraction": "Achieved fraction of the limit", "tokens": "Decode: tokens/s against batch"}


def render(proof: Proof, plots: Sequence[str] = (), note: str = "") -> str:
    """`plots` are the names of the SVG files beside the page, without their ending; `note` says why there are none."""
    ran = sum(section.status == "ran" for section in proof.sections)
    lines = [
        f"# GPU proof: {proof.device}, {proof.date}\n",
        *([f"**{DRY_NOTICE}.**\n"] if proof.dry else []),
        f"{ran} of {len(proof.sections)} sections ran, in {sum(s.seconds for s in proof.sections):.0f} s of "
        f"{proof.budget_s:.0f} s. `floor_ms` is the least time that the bytes and operations of a case can take at the "
        "limits measured here; `fraction` is that over the time measured. Everything is in `proof.json`.\n",
        *_table([{"section": s.name, "status": s.status, "seconds": s.seconds, "": s.reason} for s in proof.sections]),
        *_gap_lines(proof),
        *(f"![{_PLOTS[name]}]({name}.svg)\n" for name in plots),
        *([" ".join(note.split()) + "\n"] if note else []),
        *(line for section in proof.sections for line in _section_lines(section)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _gap_lines(proof: Proof) -> list[str]:
    gap, lines = proof.largest_gap, ["No case was held against a limit, so no gap is named.\n"]
    if gap is not None:
        lines = [
            f"**Largest gap to the limit:** {gap.case}: {gap.how}, the fastest way that the limit holds for, takes "
            f"{_number(gap.figures['ms'])} ms where {gap.facts['bound by']} alone takes "
            f"{_number(gap.figures['floor_ms'])} ms: {gap.figures['fraction']:.1%} of the limit.\n"
        ]
    beyond = [row for row in proof.held if row.figures["fraction"] > 1]
    if beyond:
        named = "; ".join(f"{row.case}, {row.how}: {row.figures['fraction']:.1%}" for row in beyond)
        lines.append(f"Faster than the limit, which therefore does not hold for them (docs/gpu says when): {named}.\n")
    return lines


def _section_lines(section: Section) -> list[str]:
    lines = [f"## {section.name}\n"]
    if section.status != "ran":
        lines.append(f"{section.status}: {section.reason}\n")
    measured = [row for row in section.rows if row.figures]
    for names in dict.fromkeys(tuple(row.figures) for row in measured):  # a table for each set of figures
        lines += _table([_cells(row) for row in measured if tuple(row.figures) == names])
    for row in section.rows:
        if row.facts and not row.figures:
            lines.append(f"- {row.case}: {', '.join(f'{name} {value}' for name, value in row.facts.items())}")
        elif row.reason:
            lines.append(f"- {row.case} ({row.how}): not run: {row.reason}")
    return [*lines, ""]


def _cells(row: Measured) -> dict[str, str | float]:
    noted = {"note": row.note} if row.note else {}
    return {"case": row.case, "how": row.how, **row.figures, **row.facts, **noted}


def _table(rows: Sequence[Mapping[str, str | float]]) -> list[str]:
    """Numbers stand to the right. A row may lack a column."""
    heads = {name: "---" if isinstance(value, str) else "--:" for row in rows for name, value in row.items()}
    cells = (" | ".join(_cell(name, row.get(name, "")) for name in heads) for row in rows)
    return [f"| {' | '.join(heads)} |", f"|{'|'.join(heads.values())}|", *(f"| {row} |" for row in cells), ""]


def _cell(name: str, value: str | float) -> str:
    return " ".join(value.replace("|", "\\|").split()) if isinstance(value, str) else _number(value, name)


def _number(value: float, name: str = "") -> str:
    if name in _PERCENT:
        return f"{value:.1%}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def draw(proof: Proof) -> dict[str, str]:
    """SVG by name, for what there are figures of."""
    decode = [row for row in proof.held if {"batch", "context"} <= set(row.axes)]
    cases = {row.case for row in proof.held}
    wanted = {"fraction": (_fractions, proof.held, 1.5 + 0.26 * len(cases)), "tokens": (_tokens, decode, 4.0)}
    return {name: _figure(proof, height, draw_on, rows) for name, (draw_on, rows, height) in wanted.items() if rows}


def _fractions(axes: Axes, rows: list[Measured]) -> None:
    """A line a case, the first on top; a mark for each way."""
    cases = list(dict.fromkeys(row.case for row in rows))
    for number, how in enumerate(dict.fromkeys(row.how for row in rows)):
        mine = [row for row in rows if row.how == how]
        places = [cases.index(row.case) for row in mine]
        axes.plot([100 * row.figures["fraction"] for row in mine], places, "os^Dv<>P"[number % 8], label=how)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.axvline(100, color="0.4", linewidth=1)
    axes.set_xlabel("achieved, % of the limit measured in the same run")


def _tokens(axes: Axes, rows: list[Measured]) -> None:
    for how, context in dict.fromkeys((row.how, row.axes["context"]) for row in rows):
        mine = [row for row in rows if (row.how, row.axes["context"]) == (how, context)]
        points = sorted((row.axes["batch"], row.figures["tokens_per_s"]) for row in mine)
        axes.plot(*zip(*points, strict=True), "o-", label=f"{how}, context {context}")
    batches = sorted({row.axes["batch"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set(yscale="log", xlabel="batch", ylabel="tokens/s")
    axes.yaxis.set_major_formatter("{x:g}")


def _figure(proof: Proof, height: float, draw_on: Callable[[Axes, list[Measured]], None], rows: list[Measured]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "trireme", "svg.fonttype": "none", "text.parse_math": False}):
        figure = Figure(figsize=(9, height), layout="constrained")
        axes = figure.add_subplot()
        draw_on(axes, rows)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.set_title(f"{proof.device}, {proof.date}" + (f" ({DRY_NOTICE})" if proof.dry else ""), fontsize=10)
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
