"""The report as one HTML page: no script, and nothing that is fetched from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.report import plots
from loadtest.report.record import LoadReport
from loadtest.report.rows import few_of, lines_of, number, pair_rows, rows_of, span
from loadtest.seen.figures import Point, knee_of
from loadtest.seen.histogram import samples_for
from loadtest.seen.proof import proof_text


@dataclass(frozen=True)
class Card:
    """One plot with its heading; `label` is what a screen reader says. Without an SVG, `instead` stands there."""

    title: str
    label: str
    svg: str
    instead: str = ""
    good: bool = False  # that there is nothing to draw


def _cards(report: LoadReport, baseline: LoadReport | None) -> list[Card]:
    streams = report.figures.stream is not None
    old = baseline.points if baseline is not None and (baseline.figures.stream is not None) == streams else ()
    load = "users" if report.load.rate_per_s is None else "requests under way"
    made = "tokens/s" if streams else "texts/s"
    cards = _stream_cards(report, baseline) if streams else _encoder_cards(report, old)
    throughput = plots.throughput_over_time(report.points, made, load, old)
    cards.insert(1, Card(f"Throughput and {load}", f"Throughput and {load} over time", throughput))
    if report.steps:
        loads = [report.load.amount(step.users) for step in report.steps]
        curve = plots.load_curve(report.steps, loads, report.load.unit, made)
        cards.insert(2, Card("Load curve", f"Throughput and waiting against {report.load.unit}", curve))
    errors = plots.errors_over_time(report.points, report.interval_s) if report.figures.failed else ""
    return [*cards, Card("Errors", "Failed requests over time", errors, "no errors", good=True)]


def _encoder_cards(report: LoadReport, old: Sequence[Point]) -> list[Card]:
    batched = [model for model in report.models if model.batch_sizes]
    sizes = plots.batch_sizes(batched) if batched else ""
    return [
        Card("Latency", "Latency percentiles over time", plots.latency_over_time(report.points, old)),
        Card("Batch sizes that Triton formed", "Share of executions by batch size", sizes,
             "Triton told no batch sizes"),
    ]  # fmt: skip


def _stream_cards(report: LoadReport, baseline: LoadReport | None) -> list[Card]:
    cards = [Card("First token and gaps", "Waits over time", plots.stream_times_over_time(report.points))]
    for name, title in (("first_token", "Time to the first token"), ("gap", "Gaps between responses")):
        curve = report.curves.get(name, ())
        old = baseline.curves.get(name, ()) if baseline is not None else ()
        svg = plots.distribution(name, curve, old) if curve else ""
        cards.append(Card(title, f"Distribution: {title}", svg, "nothing was seen"))
    return cards


def differences(report: LoadReport, baseline: LoadReport) -> list[str]:
    """Everything but the weights that differs between two runs: with any of it, a ratio compares other things too."""
    said = []
    for name in type(report.load).model_fields:
        new, old = getattr(report.load, name), getattr(baseline.load, name)
        if new != old and name != "texts_file":
            cut = 16 if name == "texts_digest" else None
            said.append(f"{name} {str(new)[:cut]} against {str(old)[:cut]}")
    if report.machine != baseline.machine:
        said.append(f"{report.machine.cpu_model}, {report.machine.cores} cores, against {baseline.machine.cpu_model}, "
                    f"{baseline.machine.cores} cores")  # fmt: skip
    return said


def render_html(report: LoadReport, baseline: LoadReport | None = None) -> str:
    """One self-contained page, light and dark. With `baseline`, an earlier report, figures stand side by side."""
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
    environment.filters["span"] = span
    environment.globals |= {"few_of": few_of, "samples_for": samples_for}
    environment.filters["drawn"] = Markup  # safe: matplotlib escapes the texts in its SVG
    environment.filters["proof_text"] = proof_text
    environment.filters["moment"] = lambda iso: iso.replace("T", " ").replace("+00:00", " UTC")
    values: dict[str, Any] = {
        "report": report,
        "baseline": baseline,
        "few": few_of(report.figures),
        "rows": rows_of(report.figures, None, report.intervals) if baseline is None else pair_rows(report, baseline),
        "differences": differences(report, baseline) if baseline is not None else [],
        "protocols": {"grpc": "gRPC", "http": "HTTP", "both": "gRPC and HTTP"},
        "knee": knee_of(report.steps),
        "columns": [line for line in lines_of(report.figures) if line.column],
        "cards": _cards(report, baseline),
    }
    return environment.get_template("page.html").render(values)
