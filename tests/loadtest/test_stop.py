"""Load tests that are stopped: the report of what was measured, and options that a load does not read."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from builders.__main__ import app
from builders.commands.load_plan import LoadRequest, plan_of
from builders.spec import load_spec
from loadtest.drive.run import _generator, _progress_of, command
from loadtest.drive.stopping import Stop
from loadtest.errors import LoadRunError
from loadtest.plan import LoadPlan
from loadtest.report.assemble import report_from_evidence
from loadtest.report.page import render_html
from loadtest.report.record import LoadReport, read_report
from loadtest.report.summary import render_text
from loadtest.seen.recording import Trace
from tests import ROOT
from tests.loadtest.test_report import Page
from tests.loadtest.test_verdicts import START, _evidence, _served


def _stopped(at_s: float, **changes: object) -> LoadReport:
    trace = _served(seconds=int(at_s) + 1)
    trace.stopped_at = START + at_s
    return report_from_evidence(_evidence(trace, **changes), "spec")  # type: ignore[arg-type]


def test_a_stopped_run_reports_the_whole_seconds_that_it_covers(tmp_path: Path) -> None:
    report = _stopped(12.7)
    assert report.stopped is not None
    assert (report.stopped.measured_s, report.stopped.planned_s, report.measured_s) == (12, 30, 12)
    assert report.figures.requests_per_s == 20  # over 12 s, not over 30
    assert len(report.points) == 12
    report.save(tmp_path / "r.json")
    assert read_report(tmp_path / "r.json").stopped == report.stopped
    assert "PARTIAL: stopped after 12 of 30 s" in render_text(report)
    assert "partial: stopped after 12 of 30 s" in " ".join(Page(render_html(report)).text.split())


def test_requests_under_way_at_the_stop_are_named() -> None:
    trace = _served(seconds=11)
    trace.stopped_at = START + 10
    for _ in range(7):
        trace.started("grpc", START + 9.5)
    report = report_from_evidence(_evidence(trace), "spec")
    assert report.stopped is not None
    assert report.stopped.under_way == 7
    assert "7 requests that were under way are in no figure" in render_text(report)


def test_a_ramp_that_is_stopped_has_the_steps_that_it_reached() -> None:
    report = _stopped(14.0, shape="steps", steps=3, users=3)
    assert [step.users for step in report.steps] == [1, 2]


def test_a_stop_after_the_window_is_no_partial_report() -> None:
    assert _stopped(30.5).stopped is None


def test_a_stop_within_the_warm_up_has_no_report() -> None:
    with pytest.raises(LoadRunError, match="stopped within its warm-up of 0 s"):
        _stopped(0.5)


def test_nothing_that_ended_says_whether_anything_was_started() -> None:
    trace = Trace(started_at=START)
    with pytest.raises(LoadRunError, match="none was started"):
        report_from_evidence(_evidence(trace), "spec")
    trace.started("grpc", START + 1)
    with pytest.raises(LoadRunError, match="1 were started and wait still"):
        report_from_evidence(_evidence(trace), "spec")


_SIGNALLED = """
import os, signal, sys
from loadtest.drive.stopping import Stop
number = signal.Signals(int(sys.argv[1]))
before = signal.getsignal(number)
with Stop() as stop:
    try:
        os.kill(os.getpid(), number)
    except (KeyboardInterrupt, SystemExit) as ended:
        print(type(ended).__name__)
    stop.armed = True
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)  # an impatient second one loses nothing
    print(stop.asked)
print(signal.getsignal(number) is before)
"""


@pytest.mark.parametrize(("number", "ended"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "SystemExit")])
def test_signals_ask_an_armed_load_to_stop_and_end_one_that_does_not_run(number: signal.Signals, ended: str) -> None:
    """In a process of its own: a signal that goes astray ends that, and no other tests."""
    command = [sys.executable, "-c", _SIGNALLED, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout.split()) == (0, [ended, "True", "True"]), done.stderr


def test_a_stop_shows_the_last_progress_again_and_asks_the_generator_to_end(tmp_path: Path) -> None:
    """The counters are read before the load ends."""
    line = 'trireme-progress {"elapsed_s": 1.5, "users": 2, "answered": 3, "errors": 0}'
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('asked', flush=True), sys.exit(0)))\n"
        f"print('''{line}''', flush=True)\n"
        "time.sleep(600)"
    )
    stop, seen = Stop(), []
    plan = LoadPlan(model="m", texts_file=Path("t"))
    with _generator([sys.executable, "-c", code], tmp_path / "log") as process:
        for progress in _progress_of(process, plan, stop):
            seen.append(progress.answered)
            stop.asked = True
        assert process.wait(10) == 0
    assert seen == [3, 3]


def _plan(name: str = "minilm", **asked: object) -> LoadPlan:
    addresses = {"grpc": "127.0.0.1:1", "http": "127.0.0.1:2", "metrics": "127.0.0.1:3"}
    return plan_of(load_spec(name), LoadRequest(**{**addresses, **asked}), Path("t"))  # type: ignore[arg-type]


def test_every_choice_reaches_the_load_generator() -> None:
    plan = _plan(shape="steps", steps=3, seed=7, processes=2, texts_per_request=4, duration_s=30)
    assert (plan.steps, plan.seed, plan.processes, plan.texts_per_request) == (3, 7, 2, 4)
    words = command(plan, Path("trace"))
    assert {"--load-steps=3", "--seed=7", "--processes=2", "--texts-per-request=4"} <= set(words)
    assert (_plan().steps, _plan().texts_per_request) == (5, 1)


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        ("minilm", ["--steps", "3"], "--steps: got 3, which says nothing with --shape constant"),
        ("minilm", ["--output-tokens", "3"], "--output-tokens: got 3, which says nothing with model.task=embedding"),
        ("minilm", ["--cancel-share", "0"], "--cancel-share: got 0.0"),
        ("minilm", ["--prompt-words", "3"], "--prompt-words: got 3"),
        (
            "generation",
            ["--texts-per-request", "2"],
            "--texts-per-request: got 2, which says nothing",
        ),
        ("minilm", ["--steps", "1"], "--steps"),
        ("minilm", ["--processes", "0"], "--processes"),
        ("minilm", ["--texts-per-request", "0"], "--texts-per-request"),
        ("minilm", ["--shape", "steps", "--steps", "9", "--duration-s", "20"], "use duration_s=45 or more"),
    ],
)
def test_options_that_say_nothing_or_cannot_be_are_refused_by_name(
    spec: str, options: list[str], said: str, tmp_path: Path
) -> None:
    if spec == "generation":
        spec = str(tmp_path / "spec.yaml")
        Path(spec).write_text("name: tiny\nmodel: {source: nowhere, task: generation, max_length: 64}\n")
    done = CliRunner().invoke(app, ["loadtest", spec, "-o", str(tmp_path / "load.json"), *options])
    assert done.exit_code != 0
    assert said in " ".join((done.output + str(done.exception)).split())
    assert list(tmp_path.glob("load.*")) == []


def test_the_old_meaning_of_the_gap_has_a_name_of_its_own(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "name: tiny\nmodel: {source: nowhere, task: generation, max_length: 64}\n"
        "slo: {p99_response_gap_ms: 100, p99_inter_token_ms: 20}\n"
    )
    slo = load_spec(spec).slo
    assert (slo.p99_response_gap_ms, slo.p99_inter_token_ms) == (100, 20)
