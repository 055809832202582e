"""Plots of a proof as SVG: achieved fraction of the limit, and tokens a second against batch."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

from measure.gpu_proof.page import DRY_NOTICE
from measure.gpu_proof.record import Proof, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(proof: Proof) -> dict[str, str]:
    """SVG by name, for what there are figures of."""
    held = [row for section in proof.sections for row in section.rows if "fraction" in row.figures]
    decode = [row for row in held if "tokens_per_s" in row.figures and {"batch", "context"} <= set(row.axes)]
    found = {}
    if held:
        cases = list(dict.fromkeys(row.case for row in held))
        found["fraction"] = _figure(proof, 1.5 + 0.26 * len(cases), lambda axes: _fractions(axes, held, cases))
    if decode:
        found["tokens"] = _figure(proof, 4.0, lambda axes: _tokens(axes, decode))
    return found


def _fractions(axes: Axes, rows: list[Row], cases: list[str]) -> None:
    """A line a case, the first on top; a mark for each way."""
    for number, how in enumerate(dict.fromkeys(row.how for row in rows)):
        mine = [row for row in rows if row.how == how]
        places = [cases.index(row.case) for row in mine]
        axes.plot([100 * row.figures["fraction"] for row in mine], places, "os^Dv<>P"[number % 8], label=how)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.axvline(100, color="0.4", linewidth=1)
    axes.set_xlabel("achieved, % of the limit measured in the same run")


def _tokens(axes: Axes, rows: list[Row]) -> None:
    for line in dict.fromkeys((row.how, row.axes["context"]) for row in rows):
        mine = sorted((r for r in rows if (r.how, r.axes["context"]) == line), key=lambda row: row.axes["batch"])
        batches = [row.axes["batch"] for row in mine]
        axes.plot(batches, [row.figures["tokens_per_s"] for row in mine], "o-", label=f"{line[0]}, context {line[1]}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({row.axes["batch"] for row in rows}))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("batch")
    axes.set_ylabel("tokens/s")


def _figure(proof: Proof, height: float, draw_on: Callable[[Axes], None]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "trireme", "svg.fonttype": "none", "text.parse_math": False}):
        figure = Figure(figsize=(9, height), layout="constrained")
        axes = figure.add_subplot()
        draw_on(axes)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.set_title(f"{proof.device}, {proof.date}" + (f" ({DRY_NOTICE})" if proof.dry else ""), fontsize=10)
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
