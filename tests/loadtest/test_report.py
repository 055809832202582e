"""Reports: figures from a trace, the SLO check, the JSON round trip, the page."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

from loadtest.errors import LoadInputError, LoadRunError
from loadtest.plan import Evidence, LoadPlan
from loadtest.report.assemble import report_from_evidence
from loadtest.report.page import render_html
from loadtest.report.record import LoadReport, read_report
from loadtest.report.rows import number, rows_of
from loadtest.report.slo import check_slo
from loadtest.report.summary import render_text
from loadtest.requests.interface import Interface
from loadtest.seen.intervals import Interval
from loadtest.seen.recording import Trace
from loadtest.seen.server import Identity, Snapshot, TestedServer

START = 1_000_000.4  # the window of a plan with one second of warm-up begins at 1000002
EVIL = '<script>alert("x")</script>$a_b$'


@dataclass(frozen=True)
class Limits:
    p95_latency_ms: float | None = None
    min_throughput_per_s: float | None = None
    max_error_rate: float = 0.0
    p99_first_token_ms: float | None = None
    p99_response_gap_ms: float | None = None
    p99_inter_token_ms: float | None = None
    min_output_tokens_per_s: float | None = None


def _batches(*sizes: tuple[int, int]) -> list[dict[str, object]]:
    return [{"batch_size": str(s), "compute_infer": {"count": str(n), "ns": str(n * 2_000_000)}} for s, n in sizes]


def _evidence(*, failures: int = 0, identity: Identity | None = None, **changes: object) -> Evidence:
    """Ten answers of 10 ms and `failures` failures in each of four measured seconds; 99 ms outside the window."""
    fixed = {"model": EVIL, "texts_file": "folder/texts.txt", "users": 2, "duration_s": 4, "warm_up_s": 1}
    plan = LoadPlan.model_validate({**fixed, **changes})
    trace = Trace(started_at=START)
    for second in range(int(START), int(START) + 12):
        trace.sample_users(second, 2)
        measured = second in range(1_000_002, 1_000_006)
        for _ in range(10):
            latency_ms = 10 if measured else 99
            trace.answered("grpc", second + 0.2, latency_ms, texts=2, tokens=12, truncated=1)
        for _ in range(failures if measured else 0):
            trace.failed("grpc", second + 0.2, "BAD_OUTPUT", EVIL)
    counted = {"success": {"count": "5", "ns": "50000000"}, "queue": {"count": "5", "ns": "5000000"}}
    late = {("core", "1"): {"inference_stats": counted, "batch_stats": _batches((1, 4), (8, 3))}}
    early = {("core", "1"): {"inference_stats": {}, "batch_stats": _batches((1, 1))}}
    return Evidence(
        plan=plan,
        texts=("a", "b"),
        target=TestedServer(Interface(("text",), "embedding", 8, ("token_count", "truncated")), "2.51.0", ("core",)),
        trace=trace,
        before=Snapshot(at=10, statistics=early, client_cpu_s=1, server_cpu_s=2, identity=identity),
        after=Snapshot(at=14, statistics=late, client_cpu_s=2, server_cpu_s=4, identity=identity),
    )


def _report(**changes: object) -> LoadReport:
    return report_from_evidence(_evidence(**changes), "spec")  # type: ignore[arg-type]


def test_only_the_measured_window_counts() -> None:
    report = _report()
    assert report.figures.requests == 40
    assert report.figures.requests_per_s == 10
    assert report.figures.texts_per_s == 20
    assert report.figures.p99_ms == pytest.approx(10)
    assert report.figures.tokens_per_text == 6
    assert report.figures.truncated_share == 0.5
    assert [point.users for point in report.points] == [2, 2, 2, 2]
    assert report.started_at == "1970-01-12T13:46:40+00:00"


def test_counters_of_triton_become_differences() -> None:
    (model,) = _report().models
    assert model.batch_sizes == {1: 3, 8: 3}
    assert model.mean_batch == pytest.approx(27 / 6)
    assert (model.request_ms, model.queue_ms, model.compute_ms) == (10, 1, 2)


def test_cpu_is_a_share_of_the_window() -> None:
    report = _report()
    assert report.processor.client_cores == 0.25
    assert report.processor.server_seconds == 2
    assert report.processor.server_share == pytest.approx(2 / 4 / report.machine.cores)


def test_steps_leave_out_their_first_seconds() -> None:
    report = _report(shape="steps", steps=2, duration_s=10)
    assert [step.users for step in report.steps] == [1, 2]
    assert report.steps[0].figures.requests == 20  # of five seconds, two whole ones are left after settling
    assert "knee at" in render_text(report)


def test_unknown_weights_are_named_so() -> None:
    report = _report()
    assert report.identity == Identity(model=EVIL)
    assert report.identity.digest == "unknown"
    assert any("does not name its weights" in note for note in report.notes)
    assert _report(identity=Identity(model=EVIL, digest="d")).notes == ()


def test_weights_that_changed_during_the_run_are_noted() -> None:
    evidence = _evidence(identity=Identity(model=EVIL, version="1", digest="old"))
    after = Snapshot(**{**evidence.after.__dict__, "identity": Identity(model=EVIL, version="2", digest="new")})
    report = report_from_evidence(Evidence(**{**evidence.__dict__, "after": after}), "spec")
    assert any("version 1 old, then version 2 new" in note for note in report.notes)


def test_run_without_a_single_request_has_no_report() -> None:
    evidence = _evidence()
    with pytest.raises(LoadRunError, match="no request ended"):
        report_from_evidence(Evidence(**{**evidence.__dict__, "trace": Trace(started_at=START)}), "spec")


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (Limits(), None),
        (Limits(p95_latency_ms=10.1, min_throughput_per_s=20), None),
        (Limits(p95_latency_ms=5), "p95 latency is 10 ms, which is 2.00 times the limit of 5 ms."),
        (
            Limits(min_throughput_per_s=40),
            "Throughput is 20 texts/s, which is 0.50 times the required 40 texts/s.",
        ),
    ],
)
def test_slo_says_each_miss_with_its_figures(limits: Limits, said: str | None) -> None:
    assert check_slo(_report(), limits) == ([said] if said else [])


def test_slo_counts_errors() -> None:
    report = _report(failures=10)
    (missed,) = check_slo(report, Limits(max_error_rate=0.1))
    expected = "Error rate is 50.0000% (40 of 80 requests: 40 BAD_OUTPUT), over the limit of 10.0000%."
    assert missed == expected
    assert check_slo(report, Limits(max_error_rate=0.5)) == []


def test_slo_is_missed_when_nothing_was_answered() -> None:
    evidence = _evidence(failures=3)
    for cell in evidence.trace.cells["grpc"].values():
        cell.latency.counts.clear()
        cell.answered = cell.texts = 0
    missed = check_slo(report_from_evidence(evidence, "spec"), Limits(p95_latency_ms=5, min_throughput_per_s=1))
    assert len(missed) == 4
    assert missed[0] == "No request was answered in 4 s; 12 failed."


def test_report_survives_its_file(tmp_path: Path) -> None:
    report = _report(failures=1)
    report.save(tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == report
    assert "folder" not in (tmp_path / "report.json").read_text()


@pytest.mark.parametrize(
    ("text", "got"),
    [
        (None, "No such file"),
        ("\x00", "not JSON"),
        ("[]", "without the key `format`"),
        ('{"format": "trireme-load-report-0"}', "format 'trireme-load-report-0'"),
        ('{"format": "trireme-load-report-1"}', "Field required"),
    ],
)
def test_file_that_is_no_report_is_an_input_error(tmp_path: Path, text: str | None, got: str) -> None:
    file = tmp_path / "report.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(LoadInputError) as caught:
        read_report(file)
    assert got in str(caught.value.got)
    assert caught.value.exit_code == 2


def test_unknown_key_in_a_report_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps({**_report().model_dump(mode="json"), "extra": 1}))
    with pytest.raises(LoadInputError, match="extra"):
        read_report(file)


class Page(HTMLParser):
    """Every tag, every attribute that could fetch something, and all text outside the style sheet."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "xlink:href", "data", "action", "srcset"):
                self.links.append(value or "")
            if key == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("changes", [{}, {"failures": 2}, {"shape": "steps", "steps": 2, "duration_s": 10}])
def test_page_is_self_contained_and_escaped(changes: dict[str, object]) -> None:
    report = _report(**changes)
    html = render_html(report)
    page = Page(html)
    assert "script" not in page.tags
    assert EVIL in page.text  # as text, not as a tag
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert not re.search(r"#0[1-7]0[1-7]0[1-7]", html)  # every stand-in became a variable
    assert ("no errors" in page.text) == (report.figures.failed == 0)
    assert page.tags.count("svg") == 3 + bool(report.figures.failed) + bool(report.steps)
    assert html == render_html(report)


def test_page_sets_figures_beside_the_baseline() -> None:
    report, slower = _report(), _report(failures=1)
    figures = slower.figures.model_copy(update={"p95_ms": 20.0, "mean_ms": 10.8, "texts_per_s": 10.0})
    slower = slower.model_copy(update={"figures": figures, "load": slower.load.model_copy(update={"users": 3})})
    narrow = {row.line.key: Interval(low=row.value, high=row.value) for row in rows_of(report.figures, None)}
    below = {row.line.key: Interval(low=row.value, high=row.value) for row in rows_of(slower.figures, None)}
    rows = rows_of(report.figures, slower.figures, narrow, below)
    verdicts = {row.label: row.verdict for row in rows}
    ratios = {row.label: row.ratio for row in rows}
    assert [verdicts[name] for name in ("Throughput", "Latency p95", "Errors")] == ["better"] * 3
    assert [verdicts[name] for name in ("Latency p50", "Latency mean")] == ["same"] * 2  # runs of one server differ so
    assert (ratios["Throughput"], ratios["Latency p50"], ratios["Errors"]) == (2.0, 1.0, 0.0)
    assert ratios["Latency p95"] == pytest.approx(0.5)
    assert ratios["Latency mean"] == pytest.approx(10 / 10.8)
    back = {row.label: row.verdict for row in rows_of(slower.figures, report.figures, below, narrow)}
    assert back["Errors"] == "worse"
    assert back["Latency p99, failures late"] == "worse"  # a failure stands there
    text = Page(render_html(report, slower)).text
    assert "users 2 against 3" in text
    assert "2.00 \N{MULTIPLICATION SIGN} baseline" in text


def test_page_draws_a_report_without_answers_or_batches() -> None:
    evidence = _evidence(failures=1)
    for cell in evidence.trace.cells["grpc"].values():
        cell.latency.counts.clear()
    bare = report_from_evidence(evidence, "unknown").model_copy(update={"models": ()})
    assert "Triton told no batch sizes" in Page(render_html(bare)).text


def test_summary_holds_the_figures() -> None:
    text = render_text(_report(failures=1))
    for part in ("20 texts/s", "p95 10 ms", "BAD_OUTPUT 4", "mean batch 4.5", "note: the service does not name"):
        assert part in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "\N{EN DASH}"),
        (0.0, "0"),
        (0.01234, "0.0123"),
        (4.56, "4.56"),
        (78.94, "78.9"),
        (12345.6, "12,346"),
        (100.0, "100"),
    ],
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert number(value) == text
