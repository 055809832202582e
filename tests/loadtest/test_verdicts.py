"""What a report says of its own figures: failures are late, small samples are named, verdicts need intervals apart."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from builders.__main__ import app
from loadtest.plan import Evidence, LoadPlan
from loadtest.report.assemble import report_from_evidence
from loadtest.report.page import render_html
from loadtest.report.record import LoadReport
from loadtest.report.rows import pair_rows
from loadtest.report.slo import check_slo, judge
from loadtest.report.summary import render_comparison, render_text
from loadtest.requests.interface import Interface
from loadtest.seen.counters import RequestLedger
from loadtest.seen.histogram import LatencyHistogram, samples_for
from loadtest.seen.intervals import Interval
from loadtest.seen.recording import Trace
from loadtest.seen.server import Identity, Snapshot, TestedServer
from tests.loadtest.test_report import Limits, Page

START = 1_000_000.0


def _evidence(trace: Trace, *, requests: RequestLedger | None = None, **changes: object) -> Evidence:
    plan = LoadPlan.model_validate(
        {"model": "m", "texts_file": "t", "users": 2, "duration_s": 30, "warm_up_s": 0, **changes}
    )
    target = TestedServer(Interface(("text",), "embedding", 8, ()), "2.51.0", ("m",))
    ends = [Snapshot(at, {}, at, None, Identity(model="m", digest="d")) for at in (0.0, 30.0)]
    return Evidence(plan, ("a",), target, trace, ends[0], ends[1], requests=requests)


def _served(seed: int = 0, *, pace: float = 1.0, failing: float = 0.0, a_second: int = 20, seconds: int = 31) -> Trace:
    """A server whose seconds are like those before them (AR(1) in the logarithm), around `pace` x 100 ms."""
    dice, trace, level = random.Random(seed), Trace(started_at=START), 0.0
    for second in range(int(START), int(START) + seconds):
        trace.sample_users(second, 2)
        level = 0.6 * level + 0.15 * dice.gauss(0, 1)
        for _ in range(a_second):
            trace.started("grpc", second + 0.1)
            if dice.random() < failing:
                trace.failed("grpc", second + 0.1, "TIMEOUT", "no answer within 10 s")
            else:
                latency_ms = 100 * pace * 2.718 ** (level + 0.2 * dice.gauss(0, 1))
                trace.answered("grpc", second + 0.1, latency_ms, texts=1, tokens=0, truncated=0)
    return trace


def _report(trace: Trace, **changes: object) -> LoadReport:
    return report_from_evidence(_evidence(trace, **changes), "spec")  # type: ignore[arg-type]


def test_failures_are_later_than_any_answer() -> None:
    """30 % time-outs: p95 of the answers is clean, p95 of the requests is not."""
    report = _report(_served(failing=0.3))
    figures = report.figures
    assert figures.p95_ms is not None
    assert figures.p95_ms < 1000
    assert figures.all_requests is not None
    assert (figures.all_requests.p95_ms, figures.all_requests.failed) == (None, figures.failed)
    missed = check_slo(report, Limits(p95_latency_ms=1000, max_error_rate=1))
    assert len(missed) == 1
    assert "p95 latency over all requests (failures count as late) is later than any answer, because 3" in missed[0]
    assert f"with {figures.failed} failures as late as can be: p95 failed" in render_text(report)
    judged = report.model_copy(update={"slo": judge(report, Limits(p95_latency_ms=1000))})
    text = " ".join(Page(render_html(judged)).text.split())
    assert "Limits: 2 of 3 missed" in text
    assert missed[0] in text
    assert "at most 1,000 failed" not in text  # it has no figure there


def test_a_few_failures_move_the_percentile_of_all_requests() -> None:
    histogram = LatencyHistogram()
    for latency_ms in range(1, 97):
        histogram.add(latency_ms)
    assert histogram.percentile(95, failed=4) == pytest.approx(95, rel=0.005)
    assert histogram.percentile(97, failed=4) == float("inf")
    assert histogram.percentile(95) == pytest.approx(92, rel=0.005)


def test_a_window_in_which_nothing_was_answered_misses_whatever_the_limits() -> None:
    """800 users whose answers all came after the window: no failure, no throughput, and no exit 0."""
    trace = Trace(started_at=START)
    for _ in range(800):
        trace.started("grpc", START + 1)
        trace.answered("grpc", START + 1, 40_000, texts=1, tokens=0, truncated=0)
    report = _report(trace, users=800)
    assert (report.figures.requests_per_s, report.figures.errors) == (0, {})
    (missed,) = check_slo(report, Limits())
    assert missed.startswith("No request was answered within the 30 measured seconds: 800 users are more than")
    assert "answers took 40 s (p50). Use fewer users, or measure" in missed


def test_users_that_had_not_begun_and_a_starved_generator_are_named() -> None:
    trace = _served()
    trace.users = dict.fromkeys(trace.users, 54)
    trace.sample_late(START + 1, 1200.0)
    report = _report(trace, users=800)
    assert any("only 54 of 800 users had sent their first request" in note for note in report.notes)
    assert any("came to its work up to" in note for note in report.notes)
    assert not any("had sent their first request" in note for note in _report(_served()).notes)


@pytest.mark.parametrize(("percent", "needed"), [(50, 10), (90, 60), (95, 130), (99, 660)])
def test_a_percentile_takes_a_number_of_samples(percent: float, needed: int) -> None:
    assert samples_for(percent) == needed


def test_a_percentile_of_too_few_requests_is_named() -> None:
    few, enough = (_report(_served(a_second=n)) for n in (20, 22))  # in 30 s
    assert (few.figures.requests, enough.figures.requests) == (600, 660)
    assert few.model_dump()["few"]["latency_p99_ms"] == {"seen": 600, "needed": 660}
    assert "Latency p99 has 600 of 660" in render_text(few)
    assert "percentile of too few requests" in render_html(few)
    assert enough.few == {}
    assert "too few samples" not in render_text(enough)
    assert 'class=" few"' not in render_html(enough)


def test_two_runs_of_one_server_are_noise() -> None:
    """Twenty pairs; a figure or two in a hundred may come out apart by chance, and then by a little."""
    verdicts = [
        row.verdict
        for seed in range(20)
        for row in pair_rows(_report(_served(seed)), _report(_served(seed + 1000)))
        if row.verdict
    ]
    assert len(verdicts) == 20 * 9
    assert sum(verdict in ("better", "worse") for verdict in verdicts) <= 0.05 * len(verdicts)
    assert "unknown" not in verdicts


def test_a_server_that_takes_twice_as_long_is_worse() -> None:
    rows = {row.label: row.verdict for row in pair_rows(_report(_served(pace=2.0)), _report(_served(1000)))}
    times = ("Latency p50", "Latency p95", "Latency mean")
    assert [rows[name] for name in times] == ["worse"] * len(times)
    assert rows["Errors"] == "same"
    failing = {row.label: row.verdict for row in pair_rows(_report(_served(failing=0.3)), _report(_served(1000)))}
    assert (failing["Errors"], failing["Latency p95, failures late"]) == ("worse", "worse")


def test_intervals_hold_their_figure_and_a_short_run_has_none() -> None:
    report = _report(_served())
    for name, value in (("latency_p95_ms", report.figures.p95_ms), ("throughput_texts_per_s", 20.0)):
        interval = report.intervals[name]
        assert value is not None
        assert interval.low is not None
        assert interval.high is not None
        assert interval.low <= value <= interval.high
    assert report.intervals["errors_percent"].high == pytest.approx(100 * 3 / 600)  # no failure among 600
    short = _report(_served(seconds=4), duration_s=3)
    assert short.intervals == {}
    assert {row.verdict for row in pair_rows(short, _report(_served(1)))} == {"", "same", "unknown"}


def test_a_failure_lies_above_every_interval() -> None:
    assert not Interval(low=1, high=2).overlaps(Interval(low=None, high=None))
    assert Interval(low=1, high=None).overlaps(Interval(low=None, high=None))
    assert Interval(low=1, high=2).overlaps(Interval(low=2, high=3))


def test_report_of_two_prints_both_and_leaves_the_page_of_the_first(tmp_path: Path) -> None:
    for name, trace in (("a", _served()), ("b", _served(1000, pace=3.0))):
        _report(trace).save(tmp_path / f"{name}.json")
    (tmp_path / "a.html").write_text("mine")
    done = CliRunner().invoke(app, ["report", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "a.html").read_text() == "mine"
    page = Page((tmp_path / "a-vs-b.html").read_text())
    assert "better" in page.text
    assert f"report: {tmp_path / 'a-vs-b.html'}" in done.output
    row = next(line for line in done.output.splitlines() if "Latency p50" in line)
    assert row.split()[-1] == "better"
    assert row.count(" to ") == 2
    assert render_comparison(_report(_served()), _report(_served(1000, pace=3.0))) in done.output


@pytest.mark.parametrize(
    ("succeeded", "noted"),
    [(None, False), (90, False), (97, False), (98, True), (89, True)],
)
def test_requests_that_the_server_and_its_clients_count_differently_are_noted(
    succeeded: int | None, noted: bool
) -> None:
    """90 came, 3 failed here, 2 were under way, and the server probed itself twice at most."""
    counts = {"started": 95, "answered": 90, "failed": {"TIMEOUT": 3}, "left": 0, "under_way": 2, "probes": 2}
    ledger = RequestLedger.model_validate({**counts, "server_succeeded": succeeded, "server_failed": 0})
    report = _report(_served(), requests=ledger)
    assert any("answered requests over the whole run" in note for note in report.notes) == noted
    assert "95 requests started = 90 answered + 3 failed + 2 under way" in render_text(report)
    assert "95 requests were started: 90 answered" in " ".join(Page(render_html(report)).text.split())
