"""The report as one HTML page: no script, and nothing that is fetched from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest import plots
from loadtest.figures import Figures, knee_of
from loadtest.report import LoadReport

SAME = 0.02  # values closer than this share are called the same: short runs on one machine differ by more than that

# label, unit, value, whether more is better (None: neither)
_ROWS: tuple[tuple[str, str, Callable[[Figures], float | None], bool | None], ...] = (
    ("Throughput", "texts/s", lambda figures: figures.texts_per_s, True),
    ("Requests answered", "requests/s", lambda figures: figures.requests_per_s, True),
    ("Latency p50", "ms", lambda figures: figures.p50_ms, False),
    ("Latency p95", "ms", lambda figures: figures.p95_ms, False),
    ("Latency p99", "ms", lambda figures: figures.p99_ms, False),
    ("Latency mean", "ms", lambda figures: figures.mean_ms, False),
    ("Latency max", "ms", lambda figures: figures.max_ms, False),
    ("Errors", "%", lambda figures: 100 * figures.error_rate, False),
    ("Tokens a text", "", lambda figures: figures.tokens_per_text, None),
)


@dataclass(frozen=True)
class Row:
    """One figure, and how it stands to the baseline's."""

    label: str
    unit: str
    value: float | None
    baseline: float | None
    ratio: float | None  # value / baseline; None without a baseline, or when that is 0
    verdict: str  # "better", "worse", "same" or ""


def rows_of(figures: Figures, baseline: Figures | None) -> list[Row]:
    rows = []
    for label, unit, value_of, more_is_better in _ROWS:
        value = value_of(figures)
        old = value_of(baseline) if baseline is not None else None
        ratio = value / old if value is not None and old else None
        verdict = ""
        if value is not None and old is not None and more_is_better is not None:
            near = value == old or (ratio is not None and abs(ratio - 1) <= SAME)
            verdict = "same" if near else "better" if (value > old) == more_is_better else "worse"
        rows.append(Row(label, unit, value, old, ratio, verdict))
    return rows


def differences(report: LoadReport, baseline: LoadReport) -> list[str]:
    """Everything but the weights that differs between two runs: with any of it, a ratio compares other things too."""
    said = []
    for name in type(report.load).model_fields:
        new, old = getattr(report.load, name), getattr(baseline.load, name)
        if new != old and name != "texts_file":
            said.append(f"{name} {str(new)[:16]} against {str(old)[:16]}")
    if report.machine != baseline.machine:
        said.append(f"{report.machine.cpu_model}, {report.machine.cores} cores, against {baseline.machine.cpu_model}, "
                    f"{baseline.machine.cores} cores")  # fmt: skip
    return said


def render(report: LoadReport, baseline: LoadReport | None) -> str:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["moment"] = lambda iso: iso.replace("T", " ").replace("+00:00", " UTC")
    old = baseline.points if baseline is not None else ()
    batched = [model for model in report.models if model.batch_sizes]
    drawn = {
        "latency": plots.latency_over_time(report.points, old),
        "throughput": plots.throughput_over_time(report.points, old),
        "batches": plots.batch_sizes(batched) if batched else "",
        "errors": plots.errors_over_time(report.points, report.interval_s) if report.figures.failed else "",
        "curve": plots.load_curve(report.steps) if report.steps else "",
    }
    values: dict[str, Any] = {
        "report": report,
        "baseline": baseline,
        "rows": rows_of(report.figures, baseline.figures if baseline is not None else None),
        "differences": differences(report, baseline) if baseline is not None else [],
        "protocols": {"grpc": "gRPC", "http": "HTTP", "both": "gRPC and HTTP"},
        "knee": knee_of(report.steps),
        # safe: matplotlib escapes the texts in its SVG
        "plots": {name: Markup(svg) for name, svg in drawn.items()},
    }
    return environment.get_template("report.html").render(values)


def number(value: float | None) -> str:
    """Three significant digits or more: `0.0123`, `4.56`, `78.9`, `12,345`."""
    if value is None:
        return "\N{EN DASH}"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(digits, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
