"""The page of a run: what was found, then for each service the seconds of its run with each blow where it fell."""

from __future__ import annotations

import io
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from loadtest.report.assemble import this_machine
from measure.chaos.act import ChaosAct
from measure.chaos.load import OK, WRONG
from online.files import replace_file

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "svg{width:100%;height:auto}table{border-collapse:collapse;margin:.6rem 0 1.4rem}"
    "th,td{text-align:left;padding:.15rem 1.2rem .15rem 0;border-bottom:1px solid #ddd;vertical-align:top}"
    "td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}.bad{color:#b00;font-weight:600}"
    ".note{color:#555;max-width:52rem}h3{margin-bottom:0}"
)
# What became of a request, by kind: its colour, and what it means.
_KINDS = {
    "answered": ("#3b9b6d", "as the first to its text"),
    "refused": ("#e0a030", "with a status: come again later (429, 503), or too late (504)"),
    "lost": ("#c33c3c", "the connection or the stream was cut, or a stream ended with an error"),
    "wrong": ("#000000", "another answer than the first to its text"),
}  # fmt: skip


def write_page(file: Path, acts: Sequence[ChaosAct], load_average: tuple[float, float, float]) -> None:
    """`load_average`: of the machine as the run began."""
    body = "".join(_section(act) for act in acts)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Chaos</title><style>{_STYLE}</style>'
        f"<h1>Chaos</h1>{_verdict(acts)}{_about(load_average)}{body}"
    )
    replace_file(file, page.encode())


def kind_of(cause: str) -> str:
    """A key of `_KINDS`."""
    if cause in (OK, WRONG):
        return "answered" if cause == OK else "wrong"
    return "refused" if cause.isdecimal() else "lost"


def _verdict(acts: Sequence[ChaosAct]) -> str:
    faults = [f"{act.name}: {fault}" for act in acts for fault in act.faults]
    if not faults:
        return "<p><b>No fault.</b> No answer was wrong, every part came back, no fuzz was answered, nothing grew.</p>"
    items = "".join(f"<li>{escape(fault)}</li>" for fault in faults)
    return f'<p class="bad">{len(faults)} fault{"s" * (len(faults) > 1)}</p><ul class="bad">{items}</ul>'


def _about(load_average: tuple[float, float, float]) -> str:
    now = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    then = ", ".join(f"{load:.1f}" for load in load_average)
    machine = this_machine()
    return (
        f'<p class="note">{time.strftime("%Y-%m-%d")}, {escape(machine.cpu_model)}, {machine.cores} cores. '
        f"Load of the machine over 1, 5 and 15 minutes: {then} as the run began, {now} at its end; it holds this run's "
        "own. A user whose request fails asks again after 0.05 s: so there are more failures a second than answers, "
        "and each of the two has a scale of its own.</p>"
    )


def _section(act: ChaosAct) -> str:
    parts = [f"<h2>{escape(act.name)}</h2>", _timeline(act), "<h3>Blows</h3>", _blows(act)]
    parts += ["<h3>Requests of the steady load</h3>", _causes(act.load.causes)]
    if act.fuzzed is not None:
        told = act.fuzzed
        parts += ["<h3>Fuzz</h3>", _fuzz(told.told)]
        parts.append(f"<p>Slowest refusal: {escape(told.slowest)}, {told.slowest_s:.2f} s.</p>")
    parts += ["<h3>Held by the service</h3>", _held(act)]
    return "".join(parts)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: int = 0) -> str:
    """`numbers`: so many columns behind the first are such."""

    def line(cell: str, values: Sequence[object]) -> str:
        kinds = [' class="n"' if 1 <= place <= numbers else "" for place in range(len(values))]
        cells = (f"<{cell}{kind}>{escape(str(value))}</{cell}>" for kind, value in zip(kinds, values, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"


def _blows(act: ChaosAct) -> str:
    rows = []
    for blow in act.blows:
        back = [one for one in blow.back_s if one is not None]
        felt = [f"{median(back):.1f} s", f"{max(back):.1f} s"] if back else ["", ""]
        lost = len(blow.back_s) - len(back)
        said = [blow.note, blow.fault, f"{lost} times not answering again" if lost else ""]
        rows.append([blow.name, len(blow.at_s), *felt, "; ".join(one for one in said if one)])
    return _table(("", "times", "answering again after, median", "at most", ""), rows, numbers=3)


def _causes(causes: Mapping[str, int]) -> str:
    by_kind: dict[str, Counter[str]] = {kind: Counter() for kind in _KINDS}
    for cause, count in causes.items():
        by_kind[kind_of(cause)][cause] += count
    rows = [
        [kind, f"{counts.total():,}", "" if kind == "answered" else _listed(counts), meant]
        for (kind, (_, meant)), counts in zip(_KINDS.items(), by_kind.values(), strict=True)
    ]
    return _table(("", "requests", "of them", ""), rows, numbers=1)


def _fuzz(told: Mapping[str, int]) -> str:
    by_name: dict[str, Counter[str]] = {}
    for name, count in sorted(told.items()):
        what, _, came = name.rpartition(": ")
        by_name.setdefault(what, Counter())[came] += count
    rows = [[name, f"{counts.total():,}", _listed(counts)] for name, counts in by_name.items()]
    return _table(("what was sent", "times", "what came back"), rows, numbers=1)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{cause} ({count:,})" for cause, count in counts.most_common())


def _held(act: ChaosAct) -> str:
    rows = [
        [name, f"{held.rss_mb:,.0f} MB", held.descriptors, held.shared]
        for name, held in (("before", act.before), ("after", act.after)) if held is not None
    ]  # fmt: skip
    return _table(("", "memory", "descriptors of the gateway", "files in /dev/shm"), rows, numbers=3)


def _timeline(act: ChaosAct) -> str:
    """SVG: requests by the second in which they ended; those that failed below, with a scale of their own."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "chaos", "svg.fonttype": "none"})
    last = max(act.load.seconds, default=0) + 1
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    counts = {kind: [0] * last for kind in _KINDS}
    for second, causes in act.load.seconds.items():
        for cause, count in causes.items():
            counts[kind_of(cause)][second] += count
    _bars(above, {"answered": counts.pop("answered")})
    _bars(below, {kind: row for kind, row in counts.items() if any(row)})
    above.set(ylabel="answered a second", xlim=(0, last))
    below.set(ylabel="failed a second", xlabel="seconds")
    below.set_ylim(bottom=0)
    below.invert_yaxis()
    if any(map(any, counts.values())):
        below.legend(loc="lower right", frameon=False, ncols=3)
    _marks(act, above, below)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    return drawn.getvalue().partition("<svg")[1] + drawn.getvalue().partition("<svg")[2]


def _bars(axes: Any, rows: Mapping[str, Sequence[int]]) -> None:
    """Stacked."""
    under = [0] * max(map(len, rows.values()), default=0)
    for kind, row in rows.items():
        axes.bar(range(len(row)), row, bottom=under, width=1.0, align="edge", color=_KINDS[kind][0], label=kind)
        under = [one + two for one, two in zip(under, row, strict=True)]


def _marks(act: ChaosAct, above: Any, below: Any) -> None:
    """A line for each blow. Its kind is named once, over the plot, where no bar hides it."""
    for blow in act.blows:
        for at in blow.at_s:
            for axes in (above, below):
                axes.axvline(at, color="0.35", linewidth=0.7, linestyle=":")
        if blow.at_s:
            above.text(
                blow.at_s[0], 1.03, blow.name, transform=above.get_xaxis_transform(), rotation=50, va="bottom",
                ha="left", fontsize=9, color="0.2",
            )  # fmt: skip
    if act.fuzz_s is not None:
        for axes in (above, below):
            axes.axvspan(*act.fuzz_s, color="0.9", zorder=0)
        above.text(
            act.fuzz_s[0], 1.03, "fuzz", transform=above.get_xaxis_transform(), rotation=50, va="bottom", fontsize=9
        )
