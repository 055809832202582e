"""Plots of a report as inline SVG. Colours are CSS variables of the page, so a plot is light or dark as the page is."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from loadtest.counters import ModelStatistics
from loadtest.figures import Point, Step, knee_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_IN, HEIGHT_IN = 6.0, 3.1  # 432 x 223 units: text of 10 units is still read on a phone
# matplotlib wants real colours; these stand for the variables of the page until the SVG is written
_VARIABLES = {
    "ink": "#010101", "muted": "#020202", "grid": "#030303", "series1": "#040404", "series2": "#050505",
    "series3": "#060606", "bad": "#070707",
}  # fmt: skip
_ERROR_COLOURS = ("bad", "series2", "series3", "series1")  # of the most frequent kinds; the rest are one more


def latency_over_time(points: Sequence[Point], baseline: Sequence[Point] = ()) -> str:
    def draw(axes: Axes) -> None:
        for key, colour in (("p50_ms", "series1"), ("p95_ms", "series2"), ("p99_ms", "series3")):
            _line(axes, points, key, label=key.removesuffix("_ms"), color=_VARIABLES[colour])
        if baseline:
            _line(axes, baseline, "p95_ms", label="p95 baseline", color=_VARIABLES["series2"], linestyle=(0, (2, 2)))
        axes.set_ylabel("latency, ms")

    return _over_time("latency", draw)


def throughput_over_time(points: Sequence[Point], baseline: Sequence[Point] = ()) -> str:
    def draw(axes: Axes) -> None:
        _line(axes, points, "texts_per_s", label="texts/s", color=_VARIABLES["series1"])
        if baseline:
            style = {"color": _VARIABLES["series1"], "linestyle": (0, (2, 2))}
            _line(axes, baseline, "texts_per_s", label="texts/s baseline", **style)
        axes.set_ylabel("texts/s")
        right = axes.twinx()
        times = [point.elapsed_s for point in points]
        users = [float("nan") if point.users is None else point.users for point in points]
        right.step(times, users, where="mid", color=_VARIABLES["muted"], linewidth=1.2)
        right.set_ylim(0, max([1.0, *(user for user in users if user == user)]) * 1.25)
        right.set_ylabel("users")
        right.locator_params(axis="y", integer=True)
        _quiet(right)
        axes.plot([], [], color=_VARIABLES["muted"], linewidth=1.2, label="users (right)")
        axes.set_zorder(right.get_zorder() + 1)

    return _over_time("throughput", draw)


def errors_over_time(points: Sequence[Point], interval_s: int) -> str:
    """Bars of failed requests a second, by kind, the most frequent at the bottom."""
    totals: dict[str, int] = {}
    for point in points:
        for kind, count in point.errors.items():
            totals[kind] = totals.get(kind, 0) + count
    kinds = sorted(totals, key=lambda kind: -totals[kind])
    shown = {kind: [kind] for kind in kinds[: len(_ERROR_COLOURS)]}
    if kinds[len(_ERROR_COLOURS) :]:
        shown["others"] = kinds[len(_ERROR_COLOURS) :]

    def draw(axes: Axes) -> None:
        times, floor = [point.elapsed_s for point in points], [0.0] * len(points)
        for colour, (label, members) in zip((*_ERROR_COLOURS, "muted"), shown.items(), strict=False):
            heights = [sum(point.errors.get(kind, 0) for kind in members) / interval_s for point in points]
            style: dict[str, Any] = {"color": _VARIABLES[colour], "linewidth": 0, "label": label}
            axes.bar(times, heights, width=interval_s * 0.9, bottom=floor, **style)
            floor = [low + height for low, height in zip(floor, heights, strict=True)]
        axes.set_ylabel("failed requests/s")

    return _over_time("errors", draw)


def batch_sizes(models: Sequence[ModelStatistics]) -> str:
    """Share of executions by batch size, one group of bars a size, one bar a model."""
    sizes = sorted({size for model in models for size in model.batch_sizes})

    def draw(axes: Axes) -> None:
        width = 0.8 / len(models)
        for number, model in enumerate(models):
            at = [index + (number - (len(models) - 1) / 2) * width for index in range(len(sizes))]
            shares = [100 * model.batch_sizes.get(size, 0) / model.executions for size in sizes]
            colour = _VARIABLES[f"series{number % 3 + 1}"]
            axes.bar(at, shares, width=width * 0.9, label=model.model, color=colour, linewidth=0)
        stride = -(-len(sizes) // 16)
        axes.set_xticks(range(0, len(sizes), stride), [str(size) for size in sizes[::stride]])
        axes.set_xlabel("texts in one execution")
        axes.set_ylabel("executions, %")

    return _figure("batches", draw)


def load_curve(steps: Sequence[Step]) -> str:
    """Throughput and p95 latency against users: the knee is where the first stops to rise and the second begins."""
    knee = knee_of(steps)

    def draw(axes: Axes) -> None:
        users = [step.users for step in steps]
        axes.plot(
            users, [step.figures.texts_per_s for step in steps], "o-", color=_VARIABLES["series1"], label="texts/s"
        )
        axes.plot([], [], "s--", color=_VARIABLES["series2"], label="p95 (right)")
        if knee is not None:
            label = f"knee, {knee.users} users"
            axes.axvline(knee.users, color=_VARIABLES["muted"], linewidth=1, linestyle=":", label=label)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("users")
        axes.set_ylabel("texts/s")
        right = axes.twinx()
        latencies = [float("nan") if step.figures.p95_ms is None else step.figures.p95_ms for step in steps]
        right.plot(users, latencies, "s--", color=_VARIABLES["series2"])
        right.set_ylim(bottom=0)
        right.set_ylabel("p95, ms")
        _quiet(right)

    return _figure("curve", draw)


def _line(axes: Axes, points: Sequence[Point], key: str, **style: Any) -> None:
    values = [float("nan") if (value := getattr(point, key)) is None else value for point in points]
    marker = "o" if len(points) < 4 else ""  # a line of one point would be invisible
    axes.plot([point.elapsed_s for point in points], values, linewidth=1.6, marker=marker, markersize=4, **style)


def _over_time(name: str, draw: Callable[[Axes], None]) -> str:
    def draw_over_time(axes: Axes) -> None:
        draw(axes)
        axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.05)
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("seconds after the warm-up")

    return _figure(name, draw_over_time)


def _quiet(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)


def _figure(name: str, draw: Callable[[Axes], None]) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.size": 10,
        "text.color": _VARIABLES["ink"], "axes.labelcolor": _VARIABLES["muted"],
        "xtick.color": _VARIABLES["grid"], "ytick.color": _VARIABLES["grid"],
        "xtick.labelcolor": _VARIABLES["muted"], "ytick.labelcolor": _VARIABLES["muted"],
        "axes.edgecolor": _VARIABLES["grid"], "grid.color": _VARIABLES["grid"], "grid.linewidth": 0.7,
        "axes.facecolor": "none", "figure.facecolor": "none", "legend.frameon": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):  # type: ignore[arg-type]  # its keys are a closed set of literals
        figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        _quiet(axes)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            figure.legend(handles, labels, loc="outside upper left", ncols=4, fontsize=10, handlelength=1.4)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(buffer.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """The `<svg>` element alone: no DTD, no fixed size, colours by variable, ids that no other plot of the page has."""
    svg = svg[svg.index("<svg") :]
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s(width|height|xmlns:xlink|xmlns|version)="[^"]*"', "", head)
    rest = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", rest).replace("xlink:href", "href")
    for variable, colour in _VARIABLES.items():
        rest = rest.replace(colour, f"var(--{variable})")
    rest = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", rest)
    return f'{head} aria-hidden="true">{rest}'
