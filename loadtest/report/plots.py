"""Plots of a report as inline SVG. Colours are CSS variables of the page, so a plot is light or dark as the page is."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from loadtest.seen.counters import ModelStatistics
from loadtest.seen.figures import Figures, Point, Step, knee_of
from loadtest.seen.histogram import CURVE_PERCENTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

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


def stream_times_over_time(points: Sequence[Point]) -> str:
    """Of a generator: what its readers wait for, on a logarithmic axis, because one is many times the other."""

    def draw(axes: Axes) -> None:
        for name, colour in (("first_token", "series1"), ("gap", "series2")):
            for percent, style in (("p50", "-"), ("p99", (0, (2, 2)))):
                values = [_or_nan(getattr(point.stream, f"{name}_{percent}_ms", None)) for point in points]
                label = f"{name.replace('_', ' ')} {percent}"
                _curve(axes, points, values, label=label, color=_VARIABLES[colour], linestyle=style)
        axes.set_yscale("log")
        _label_decades(axes.yaxis)
        axes.set_ylabel("ms")

    return _over_time("times", draw)


def distribution(name: str, curve_ms: Sequence[float], baseline_ms: Sequence[float] = ()) -> str:
    """Share of what was seen (per cent) that took at most so long. `curve_ms`: values at CURVE_PERCENTS."""

    def draw(axes: Axes) -> None:
        axes.plot(curve_ms, CURVE_PERCENTS, color=_VARIABLES["series1"], linewidth=1.6, label="now")
        if baseline_ms:
            style: dict[str, Any] = {"color": _VARIABLES["series2"], "linestyle": (0, (2, 2))}
            axes.plot(baseline_ms, CURVE_PERCENTS, linewidth=1.6, label="baseline", **style)
        for percent in (50, 90, 99):
            value = curve_ms[CURVE_PERCENTS.index(percent)]
            label = f"p{percent} {value:.3g} ms"
            axes.plot([value], [percent], "o", color=_VARIABLES["series1"], markersize=2 + percent / 30, label=label)
        axes.set_xscale("log")
        _label_decades(axes.xaxis)
        axes.set_ylim(0, 102)
        axes.set_xlabel("ms")
        axes.set_ylabel("at most so long, %")

    return _figure(name, draw)


def throughput_over_time(points: Sequence[Point], unit: str, load: str, baseline: Sequence[Point] = ()) -> str:
    """`unit` of what is made, and `load`: what the right axis counts."""

    def draw(axes: Axes) -> None:
        _line(axes, points, "throughput_per_s", label=unit, color=_VARIABLES["series1"])
        if baseline:
            style = {"color": _VARIABLES["series1"], "linestyle": (0, (2, 2))}
            _line(axes, baseline, "throughput_per_s", label=f"{unit} baseline", **style)
        axes.set_ylabel(unit)
        right = axes.twinx()
        times = [point.elapsed_s for point in points]
        users = [float("nan") if point.users is None else point.users for point in points]
        right.step(times, users, where="mid", color=_VARIABLES["muted"], linewidth=1.2)
        right.set_ylim(0, max([1.0, *(user for user in users if user == user)]) * 1.25)
        right.set_ylabel(load)
        right.locator_params(axis="y", integer=True)
        _quiet(right)
        axes.plot([], [], color=_VARIABLES["muted"], linewidth=1.2, label=f"{load} (right)")
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


def load_curve(steps: Sequence[Step], loads: Sequence[float], load: str, unit: str) -> str:
    """Throughput and waiting against the load: the knee is where the first stops to rise and the second begins.

    `loads[i]` is that of a step, counted in `load`; throughput is in `unit`. The wait is p95 latency; of a generator
    p99 of the time to the first token.
    """
    knee = knee_of(steps)

    def draw(axes: Axes) -> None:
        made = [step.figures.throughput_per_s for step in steps]
        streams = any(step.figures.stream for step in steps)
        wait = "first token p99" if streams else "p95"
        waits = [_wait_ms(step.figures) for step in steps]
        axes.plot(loads, made, "o-", color=_VARIABLES["series1"], label=unit)
        axes.plot([], [], "s--", color=_VARIABLES["series2"], label=f"{wait} (right)")
        if knee is not None:
            at = loads[list(steps).index(knee)]
            label = f"knee, {at:.4g} {load}"
            axes.axvline(at, color=_VARIABLES["muted"], linewidth=1, linestyle=":", label=label)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(load)
        axes.set_ylabel(unit)
        right = axes.twinx()
        right.plot(loads, [_or_nan(value) for value in waits], "s--", color=_VARIABLES["series2"])
        right.set_ylim(bottom=0)
        right.set_ylabel(f"{wait}, ms")
        _quiet(right)

    return _figure("curve", draw)


def _wait_ms(figures: Figures) -> float | None:
    return figures.p95_ms if figures.stream is None else figures.stream.first_token.p99_ms


def _line(axes: Axes, points: Sequence[Point], key: str, **style: Any) -> None:
    _curve(axes, points, [_or_nan(getattr(point, key)) for point in points], **style)


def _curve(axes: Axes, points: Sequence[Point], values: Sequence[float], **style: Any) -> None:
    # a value without neighbours would be an invisible line
    seen = [False, *(value == value for value in values), False]
    alone = [at for at in range(len(values)) if seen[at + 1] and not seen[at] and not seen[at + 2]]
    style |= {"linewidth": 1.6, "marker": "o" if alone else "", "markersize": 4}
    axes.plot([point.elapsed_s for point in points], values, markevery=alone, **style)


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _over_time(name: str, draw: Callable[[Axes], None]) -> str:
    def draw_over_time(axes: Axes) -> None:
        draw(axes)
        if axes.get_yscale() == "linear":
            axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.05)
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("seconds after the warm-up")

    return _figure(name, draw_over_time)


def _label_decades(axis: Axis) -> None:
    """1, 2, 5, 10 … as plain numbers: the powers that matplotlib writes are formulas, which are drawn as they stand."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _quiet(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, which="both")


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
