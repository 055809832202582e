"""Reports of a load on a generator: its counters, figures, limits, page and notes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace

import pytest

from loadtest.errors import LoadInputError, LoadRunError
from loadtest.plan import Evidence, LoadPlan, check_plan
from loadtest.report.assemble import report_from_evidence
from loadtest.report.page import differences, render_html
from loadtest.report.record import LoadReport
from loadtest.report.rows import rows_of
from loadtest.report.slo import check_slo
from loadtest.report.summary import render_text
from loadtest.requests.interface import RequestError
from loadtest.requests.prompts import Lengths, StreamLoad
from loadtest.requests.streaming import Stream, require_generator, streams_text
from loadtest.seen.counters import Ledger, generator_between, generator_counters
from loadtest.seen.figures import Counted, figures_of
from loadtest.seen.histogram import CURVE_PERCENTS, PERCENTILE_ERROR
from loadtest.seen.recording import Cell, Trace
from loadtest.seen.server import Identity, Snapshot, TestedServer, snapshot
from runtime.server.launch import Ports
from tests.loadtest.test_report import Page

START = 1_000_000.0
TEXTS = ("one", "two words", "three words here", "a text of five words")


def _page(tokens: int, steps: int, **extra: float) -> str:
    labels = 'model="tiny",version="1"'
    values = {"output_tokens_total": tokens, "steps_total": steps, **extra}
    lines = [f"trireme_generation_{name}{{{labels}}} {value:f}" for name, value in values.items()]
    lines.append('trireme_generation_inter_token_seconds_bucket{model="tiny",version="1",le="0.5"} 9')
    lines.append('trireme_generation_output_tokens_total{model="other",version="1"} 100')
    return "\n".join(["# HELP x", *lines])


def test_counters_of_a_generator_become_differences() -> None:
    before = generator_counters(_page(10, 5, prompt_tokens_total=3), "tiny")
    after = generator_counters(_page(30, 15, prompt_tokens_total=9, step_seconds_total=0.5), "tiny")
    assert before == {"output_tokens_total": 10, "steps_total": 5, "prompt_tokens_total": 3}
    seen = generator_between(before, after)
    assert seen is not None
    assert (seen.output_tokens, seen.steps, seen.prompt_tokens, seen.tokens_per_step) == (20, 10, 6, 2.0)
    assert seen.step_ms == pytest.approx(50)
    assert seen.gap_ms is None
    again = generator_between(after, before)  # loaded anew: it counts from zero
    assert again is not None
    assert again.output_tokens == 10
    assert generator_between(before, {}) is None
    assert generator_between(None, after) is None  # else the whole life of the server would be the window
    assert generator_between(before, None) is None
    assert generator_counters(_page(1, 1), "absent") == {}


def _metadata(*outputs: str) -> dict[str, object]:
    return {"name": "m", "inputs": [{"name": "text_input"}], "outputs": [{"name": name} for name in outputs]}


def test_a_generator_is_told_by_its_metadata() -> None:
    every = ("text_output", "output_ids", "finish_reason", "prompt_tokens", "completion_tokens")
    assert streams_text(_metadata())
    assert not streams_text({"name": "m", "inputs": [{"name": "text"}]})
    require_generator(_metadata(*every), "grpc")
    with pytest.raises(LoadInputError, match="no output completion_tokens, finish_reason"):
        require_generator(_metadata("text_output", "output_ids", "prompt_tokens"), "grpc")
    with pytest.raises(LoadInputError, match="use the protocol grpc"):
        require_generator(_metadata(*every), "http")


@pytest.mark.parametrize("changes", [{"protocol": "http"}, {"protocol": "both"}, {"texts_per_request": 2}])
def test_a_plan_that_no_generator_takes_is_refused(changes: dict[str, object]) -> None:
    plan = LoadPlan.model_validate({"model": "m", "texts_file": "t", "stream": StreamLoad(), **changes})
    with pytest.raises(LoadInputError, match="one prompt a request, over grpc"):
        check_plan(plan)


@dataclass(frozen=True)
class Limits:
    p95_latency_ms: float | None = None
    min_throughput_per_s: float | None = None
    max_error_rate: float = 1.0
    p99_first_token_ms: float | None = None
    p99_response_gap_ms: float | None = None
    p99_inter_token_ms: float | None = None
    min_output_tokens_per_s: float | None = None


def _evidence(
    *,
    answered: bool = True,
    refused: bool = True,
    stays: bool = True,
    ledger: Ledger | None = None,
    late_ms: float = 0.0,
    **changes: object,
) -> Evidence:
    """In each of four measured seconds one stream of 8 tokens, one whose client leaves, and one refused.

    Without `stays` the first is missing, and without `answered` the second too; without `refused` the last.
    """
    fixed = {"model": "tiny", "texts_file": "t.txt", "users": 4, "duration_s": 4, "warm_up_s": 1}
    fixed["stream"] = StreamLoad()
    plan = LoadPlan.model_validate({**fixed, **changes})
    trace = Trace(started_at=START)
    arrivals = [(0.1, 1), (0.12, 3), (0.16, 4)]
    for second in range(int(START), int(START) + plan.schedule.end_s):
        trace.sample_users(second, 4)
        trace.sample_late(second, late_ms)
        if answered and stays:
            trace.streamed("grpc", second, Stream(arrivals, ended_s=0.2, prompt_tokens=5))
        if answered:
            trace.streamed("grpc", second, Stream(arrivals[:1], ended_s=0.1, left=True))
        if refused:
            error = RequestError("UNAVAILABLE", "full")
            trace.streamed("grpc", second, Stream([], ended_s=0.01, error=error, asked=8))
    pages = [generator_counters(_page(tokens, tokens // 2), "tiny") for tokens in (0, 40)]
    known = Identity(model="tiny", digest="d")
    ends = [Snapshot(at, {}, at, None, known, generator=page) for at, page in zip((10, 14), pages, strict=True)]
    return Evidence(plan, TEXTS, TestedServer(None, "2.51.0", ("tiny",)), trace, ends[0], ends[1], ledger)


def _report(**changes: object) -> LoadReport:
    return report_from_evidence(_evidence(**changes), "spec")  # type: ignore[arg-type]


def test_report_of_a_generator_counts_its_window() -> None:
    report = _report()
    figures, stream = report.figures, report.figures.stream
    assert stream is not None
    assert (figures.requests, figures.errors, stream.cancelled) == (4, {"UNAVAILABLE": 4}, 4)
    assert (figures.ended, figures.error_rate) == (12, 1 / 3)  # a client that leaves is no failure, but an end
    assert (stream.output_tokens, stream.prompt_tokens, stream.lost_tokens) == (4 * 9, 4 * 5, 0)
    assert stream.output_tokens_per_s == figures.throughput_per_s == 9
    assert stream.first_token.p99_ms == pytest.approx(100, rel=PERCENTILE_ERROR + 1e-9)
    assert stream.gap.p50_ms == pytest.approx(20, rel=PERCENTILE_ERROR + 1e-9)
    assert [point.stream.output_tokens_per_s for point in report.points if point.stream] == [9, 9, 9, 9]
    assert {name: len(curve) for name, curve in report.curves.items()} == dict.fromkeys(
        ("first_token", "gap"), len(CURVE_PERCENTS)
    )
    assert report.generator is not None
    assert (report.generator.output_tokens, report.generator.tokens_per_step) == (40, 2.0)
    assert LoadReport.model_validate_json(report.model_dump_json()) == report


def test_the_shape_of_the_json_is_a_contract() -> None:
    seen = json.loads(_report().model_dump_json())
    spread = ["count", "max_ms", "mean_ms", "p50_ms", "p90_ms", "p99_ms"]
    stream = seen["figures"]["stream"]
    assert sorted(stream) == [
        "all_first_tokens", "all_gaps", "all_inter_tokens", "cancelled", "first_token", "gap", "inter_token",
        "largest_gap", "lost_tokens", "output_tokens", "output_tokens_per_s",
        "per_token", "prompt_tokens", "prompt_tokens_per_s", "tokens_per_response",
    ]  # fmt: skip
    assert all(sorted(stream[name]) == spread for name in ("first_token", "gap", "largest_gap", "per_token"))
    assert seen["load"]["stream"]["output_tokens"] == {"low": 32, "high": 128}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ["4 users over gRPC", "Closed loop", "UNAVAILABLE", "Waits", "Inside the generator"]),
        ({"rate_per_s": 8}, ["8 requests/s over gRPC", "Open loop", "Throughput and requests under way"]),
        (
            {"shape": "steps", "steps": 2, "duration_s": 10, "rate_per_s": 8},
            ["4 requests/s", "8 requests/s", "Load curve"],
        ),
        ({"answered": False}, ["nothing was seen"]),
    ],
)
def test_page_of_a_generator(changes: dict[str, object], said: list[str]) -> None:
    report = _report(**changes)
    html = render_html(report, baseline=report)
    page = Page(html)
    text = " ".join(page.text.split())
    assert [part for part in said if part not in text] == []
    assert "script" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    assert "mathdefault" not in html
    assert page.tags.count("svg") == (5 if changes.get("answered", True) else 3) + bool(report.steps)
    for number in ("first_token", "gap"):
        assert (f'id="{number}-' in html) == changes.get("answered", True)


def test_summary_of_a_generator_holds_its_figures() -> None:
    text = render_text(_report(rate_per_s=8))
    for part in ("8 requests/s, grpc", "9 tokens/s", "first token p50 100", "4 of 12   UNAVAILABLE 4", "cancelled   4"):
        assert part in text
    assert all(row.verdict in ("same", "") for row in rows_of(_report().figures, _report().figures))


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (Limits(p95_latency_ms=201, p99_first_token_ms=101, p99_response_gap_ms=41, min_output_tokens_per_s=9), None),
        (Limits(p99_inter_token_ms=10.1), None),  # 3 tokens in 20 ms, 4 in 40 ms
        (
            Limits(p99_inter_token_ms=5),  # 9.987 ms is the middle of a bucket
            "p99 of the time a token is 9.987 ms, which is 2.00 times the limit of 5 ms.",
        ),
        (
            Limits(p99_first_token_ms=50),
            "p99 of the time to the first token is 100 ms, which is 2.00 times the limit of 50 ms.",
        ),
        (
            Limits(p99_response_gap_ms=20),  # 40 ms is in a bucket whose middle is 39.82 ms
            "p99 of the gaps between responses is 39.82 ms, which is 1.99 times the limit of 20 ms.",
        ),
        (
            Limits(min_output_tokens_per_s=18),
            "Output is 9 tokens/s, which is 0.50 times the required 18 tokens/s.",
        ),
        (
            Limits(min_throughput_per_s=2),
            "Throughput is 1 requests/s, which is 0.50 times the required 2 requests/s.",
        ),
    ],
)
def test_slo_of_a_generator(limits: Limits, said: str | None) -> None:
    report = _report(refused=False)
    assert check_slo(report, limits) == ([said] if said else [])


@pytest.mark.parametrize(
    ("name", "share"), [("p99_first_token_ms", 1 / 3), ("p99_response_gap_ms", 1 / 3), ("p99_inter_token_ms", 8 / 15)]
)
def test_a_failed_stream_is_late_for_every_limit_on_its_times(name: str, share: float) -> None:
    """In each second one of three streams, or of two gaps and one that never ended, or 8 of 15 tokens."""
    assert check_slo(_report(refused=False), Limits(**{name: 1e9})) == []
    (missed,) = check_slo(_report(), Limits(**{name: 1e9}))
    assert f"over all requests (failures count as late) is later than any answer, because {share:.1%} failed" in missed
    assert "failed" in render_text(_report())


def test_a_limit_on_what_was_never_seen_is_missed() -> None:
    limits = Limits(p95_latency_ms=1e9, p99_first_token_ms=1e9, p99_response_gap_ms=1e9, p99_inter_token_ms=1e9)
    missed = check_slo(_report(answered=False), limits)
    assert missed[0] == "No request was answered in 4 s; 4 failed."
    assert len(missed) == 5
    assert all("later than any answer, because 100.0% failed" in sentence for sentence in missed[1:])
    unknown = check_slo(_report(stays=False, refused=False), Limits(p99_response_gap_ms=1e9))
    assert [sentence.split(" is unknown")[0] for sentence in unknown] == ["p99 of the gaps between responses"]


def test_a_load_that_every_client_leaves_is_judged_by_what_it_shows() -> None:
    report = _report(stays=False)
    assert report.figures.requests == 0
    assert check_slo(report, Limits(max_error_rate=0.5)) == []
    (missed,) = check_slo(report, Limits(max_error_rate=0.4))
    assert missed.startswith("Error rate is 50.0000% (4 of 8 requests: 4 UNAVAILABLE)")
    (unknown,) = check_slo(report, Limits(p95_latency_ms=1))
    assert unknown.startswith("p95 latency over all requests (failures count as late) is later than any answer")


def test_counters_that_could_not_be_read_are_no_zeros() -> None:
    nobody = f"127.0.0.1:{Ports.free().grpc}"
    unread = snapshot("tiny", TestedServer(None, "2.51.0", ("tiny",)), nobody, nobody, os.getpid())
    assert unread.generator is None
    report = report_from_evidence(replace(_evidence(), before=unread), "spec")
    assert report.generator is None
    assert any("metrics" in note and "could not be read" in note for note in report.notes)


def test_nothing_at_all_has_no_report() -> None:
    evidence = replace(_evidence(), trace=Trace(started_at=START))
    with pytest.raises(LoadRunError, match="no request ended"):
        report_from_evidence(evidence, "spec")


@pytest.mark.parametrize(
    ("ledger", "noted"),
    [
        (None, False),
        (Ledger(received_tokens=9, made_tokens=9, owed_tokens=0), False),
        (Ledger(received_tokens=9, made_tokens=12, owed_tokens=3), False),
        (Ledger(received_tokens=9, made_tokens=12, owed_tokens=2), True),
        (Ledger(received_tokens=9, made_tokens=12, owed_tokens=0), True),
        (Ledger(received_tokens=9, made_tokens=8, owed_tokens=3), True),
    ],
)
def test_tokens_that_the_server_and_its_clients_count_differently_are_noted(ledger: Ledger | None, noted: bool) -> None:
    notes = _report(ledger=ledger).notes
    assert any("tokens over the whole run" in note for note in notes) == noted


@pytest.mark.parametrize(("late_ms", "noted"), [(1.0, False), (9.0, True)])
def test_a_generator_of_load_that_is_late_says_so(late_ms: float, noted: bool) -> None:
    report = _report(late_ms=late_ms)
    assert report.processor.client_late_p99_ms == pytest.approx(late_ms)
    assert any("came to its work up to" in note for note in report.notes) == noted


def test_a_baseline_of_another_load_is_told_apart() -> None:
    other = StreamLoad(prompt_words=Lengths(low=4, high=4), cancel_share=0.25)
    said = differences(_report(), _report(stream=other, rate_per_s=8))
    assert said == [
        "rate_per_s None against 8.0",
        "stream whole texts in, 32-128 tokens out against 4 words in, 32-128 tokens out, 25% leave early",
    ]


def test_reports_from_before_there_were_generators_are_read() -> None:
    report = _report(stream=None, answered=False).model_copy(update={"generator": None, "curves": {}})
    old = json.loads(report.model_dump_json(exclude={"generator", "ledger", "curves"}))
    for part, name in (("load", "stream"), ("load", "rate_per_s"), ("processor", "client_late_p99_ms")):
        del old[part][name]
    read = LoadReport.model_validate(old)
    assert (read.load.stream, read.load.rate_per_s, read.processor.client_late_p99_ms) == (None, None, None)
    assert read.figures == report.figures


def test_an_encoder_has_no_stream_in_its_figures() -> None:
    assert figures_of([Cell()], 1.0, Counted()).stream is None
