"""The page of a run: answers and failures by the second, with each blow where it fell."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from measure.chaos.act import ChaosAct
from measure.chaos.load import OK
from online.files import replace_file

_STYLE = "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto}svg{width:100%;height:auto}"


def write_page(file: Path, acts: Sequence[ChaosAct]) -> None:
    body = "".join(_section(act) for act in acts)
    page = f'<!doctype html><meta charset="utf-8"><title>Chaos</title><style>{_STYLE}</style><h1>Chaos</h1>{body}'
    replace_file(file, page.encode())


def _section(act: ChaosAct) -> str:
    lines = [blow.text for blow in act.blows]
    if act.fuzzed is not None:
        lines.append(f"fuzz: {act.fuzzed.text}")
    lines.append("requests: " + ", ".join(f"{count:,} {cause}" for cause, count in act.load.causes.most_common()))
    lines.append(f"held before: {act.before}; after: {act.after}")
    lines += [f"FAULT: {fault}" for fault in act.faults] or ["no fault"]
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<h2>{escape(act.name)}</h2>{_timeline(act)}<ul>{items}</ul>"


def _timeline(act: ChaosAct) -> str:
    """SVG: requests that ended in each second, those that failed below the line."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "chaos", "svg.fonttype": "none"})
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    axes = figure.subplots()
    last = max(act.load.seconds, default=0)
    counts: list[Mapping[str, int]] = [act.load.seconds.get(second, {}) for second in range(last + 1)]
    axes.bar(range(last + 1), [count.get(OK, 0) for count in counts], width=1.0, color="#4a7", label="answered")
    failed = [-sum(number for cause, number in count.items() if cause != OK) for count in counts]
    axes.bar(range(last + 1), failed, width=1.0, color="#c33", label="failed")
    top = axes.get_ylim()[1]
    for blow in act.blows:
        for number, at in enumerate(blow.at_s):
            axes.axvline(at, color="0.3", linewidth=0.7, linestyle=":")
            if not number:
                axes.text(at, top, f" {blow.name}", rotation=90, va="top", ha="right", fontsize=8, color="0.2")
    axes.set(xlabel="seconds", ylabel="requests a second", xlim=(0, last + 1))
    axes.legend(loc="lower right", frameon=False)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    return drawn.getvalue().partition("<svg")[1] + drawn.getvalue().partition("<svg")[2]
