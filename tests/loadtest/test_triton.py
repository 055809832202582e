"""Load tests of a real Triton: a tiny ensemble of the same interface as ours, real Locust processes, real sockets."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtest.drive.run import run_load
from loadtest.drive.stopping import Stop
from loadtest.errors import LoadInputError
from loadtest.plan import LoadPlan, RunProgress
from loadtest.report.page import render_html
from loadtest.report.record import LoadReport, read_report
from loadtest.report.slo import check_slo
from loadtest.report.summary import render_text
from loadtest.seen.server import request_counts
from runtime.server.launch import Ports, TritonServer
from runtime.settings import ServerSettings
from tests import ROOT
from tests.conftest import wait_until

pytestmark = pytest.mark.triton

IO = """
max_batch_size: 4
input [ { name: "text" data_type: TYPE_STRING dims: [ 1 ] } ]
output [
  { name: "embedding" data_type: TYPE_FP32 dims: [ 8 ] },
  { name: "token_count" data_type: TYPE_INT32 dims: [ 1 ] },
  { name: "truncated" data_type: TYPE_BOOL dims: [ 1 ] }
]
"""
ENSEMBLE = f"""
name: "toy" platform: "ensemble" {IO}
ensemble_scheduling {{ step [ {{
  model_name: "toy-core" model_version: -1
  input_map {{ key: "text" value: "text" }}
  output_map {{ key: "embedding" value: "embedding" }}
  output_map {{ key: "token_count" value: "token_count" }}
  output_map {{ key: "truncated" value: "truncated" }}
}} ] }}
"""
CORE = f"""
name: "toy-core" backend: "python" {IO}
dynamic_batching {{ max_queue_delay_microseconds: 500 }}
"""
# Words in the text choose the fault: refused, not finite, late.
MODEL = """
import time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.info = pb_utils.MetricFamily(name="trireme_model_info", description="x", kind=pb_utils.MetricFamily.GAUGE)
        labels = {"model": "toy", "version": "1", "precision": "fp32", "digest": "d1ge57", "spec_digest": "5pec"}
        self.metric = self.info.Metric(labels=labels)
        self.metric.set(1)

    def execute(self, requests):
        batches = [pb_utils.get_input_tensor_by_name(request, "text").as_numpy().ravel() for request in requests]
        if any(b"late" in text for texts in batches for text in texts):
            time.sleep(0.6)
        return [self.answer([text.decode().split() for text in texts]) for texts in batches]

    def answer(self, texts):
        if any("refuse" in words for words in texts):
            return pb_utils.InferenceResponse(error=pb_utils.TritonError("refused", pb_utils.TritonError.INVALID_ARG))
        rows = np.array([[np.nan if "nan" in words else len(words)] * 8 for words in texts], np.float32)
        counts = np.array([[len(words)] for words in texts], np.int32)
        tensors = [("embedding", rows), ("token_count", counts), ("truncated", counts > 3)]
        return pb_utils.InferenceResponse([pb_utils.Tensor(*pair) for pair in tensors])
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    for name, config in (("toy", ENSEMBLE), ("toy-core", CORE)):
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(config)
    (folder / "toy-core" / "1" / "model.py").write_text(MODEL)
    settings = {"response_cache_bytes": 0, "rate_limited": False, "content_digest": "0", "version": 1}
    ServerSettings.model_validate({"ensemble": "toy", "models": ("toy", "toy-core"), **settings}).save(folder)
    return folder


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository, Ports.free()) as server:
        _wait_ready(server)
        yield server


def _wait_ready(server: TritonServer) -> None:
    import tritonclient.grpc
    from tritonclient.utils import InferenceServerException

    client = tritonclient.grpc.InferenceServerClient(server.grpc_address)
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            server.require_alive()
            with contextlib.suppress(InferenceServerException):
                if client.is_model_ready("toy"):
                    return
            time.sleep(0.05)
        raise TimeoutError(server.log_tail())
    finally:
        client.close()


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("one\ntwo words\n\nthree words here\nfour words are here\n", encoding="utf-8")
    return file


def _plan(server: TritonServer, texts: Path, **changes: object) -> LoadPlan:
    addresses = {
        "grpc_address": server.grpc_address,
        "http_address": server.http_address,
        "metrics_address": server.metrics_address,
    }
    few = {"users": 4, "duration_s": 3, "warm_up_s": 1, "request_timeout_s": 5.0}
    return LoadPlan.model_validate({"model": "toy", "texts_file": texts, **addresses, **few, **changes})


class Limits:
    """Limits that only errors can miss."""

    p95_latency_ms = None
    min_throughput_per_s = 0.001
    max_error_rate = 0.0
    p99_first_token_ms = p99_response_gap_ms = p99_inter_token_ms = min_output_tokens_per_s = None


def test_both_protocols_give_a_report_that_names_the_weights(server: TritonServer, texts: Path, tmp_path: Path) -> None:
    seen: list[RunProgress] = []
    report = run_load(_plan(server, texts, protocol="both"), spec_name="toy-spec", on_progress=seen.append)
    assert seen
    assert seen[-1].answered > 0
    assert report.identity.digest == "d1ge57"
    assert report.identity.spec_digest == "5pec"
    assert report.spec_name == "toy-spec"
    assert check_slo(report, Limits()) == []
    assert set(report.by_protocol) == {"grpc", "http"}
    assert all(figures.requests > 0 for figures in report.by_protocol.values())
    assert sum(figures.requests for figures in report.by_protocol.values()) == report.figures.requests
    assert len(report.points) == 3
    assert {point.users for point in report.points} <= {4, None}  # None: this machine was too busy to count
    assert report.figures.tokens_per_text is not None
    assert 1 <= report.figures.tokens_per_text <= 4
    assert report.figures.truncated_share is not None
    core = next(model for model in report.models if model.model == "toy-core")
    assert sum(core.batch_sizes.values()) == core.executions > 0
    assert core.mean_batch is not None
    assert 1 <= core.mean_batch <= 4
    assert report.processor.server_seconds is not None
    ledger = report.requests
    assert ledger is not None  # every request that was started was answered, and the server counts as many
    assert ledger.started == ledger.answered == ledger.server_succeeded
    assert (ledger.failed, ledger.under_way, ledger.server_failed) == ({}, 0, 0)
    assert ledger.answered > report.figures.requests
    assert not _texts_or_paths_leak(report, texts)
    report.save(tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == report
    assert "toy" in render_text(report)
    assert "<svg" in render_html(report, baseline=report)


def _texts_or_paths_leak(report: LoadReport, texts: Path) -> bool:
    return str(texts.parent) in report.model_dump_json()


def test_workers_send_their_series_to_the_master(server: TritonServer, texts: Path) -> None:
    report = run_load(_plan(server, texts, processes=2, texts_per_request=2))
    assert report.figures.failed == 0
    assert report.figures.requests > 0
    assert max(point.users or 0 for point in report.points) == 4  # two workers with two users each, added up
    assert sum(point.requests_per_s for point in report.points) > 0
    assert report.figures.texts_per_s == pytest.approx(2 * report.figures.requests_per_s)


def test_steps_show_each_number_of_users(server: TritonServer, texts: Path) -> None:
    report = run_load(_plan(server, texts, shape="steps", steps=2, duration_s=10))
    assert [step.users for step in report.steps] == [2, 4]
    assert all(step.figures.requests > 0 for step in report.steps)


@pytest.mark.slow
def test_open_loop_starts_requests_at_its_rate_over_both_protocols(server: TritonServer, texts: Path) -> None:
    """30 requests/s for 4 s: 120, with a standard deviation of 11."""
    report = run_load(_plan(server, texts, protocol="both", rate_per_s=30.0, duration_s=4))
    assert report.figures.errors == {}
    assert 65 <= report.figures.requests <= 175
    assert set(report.by_protocol) == {"grpc", "http"}
    assert "Open loop" in render_html(report)


def test_failures_are_counted_by_kind(server: TritonServer, texts: Path) -> None:
    texts.write_text("a text that is fine\nrefuse\nnan\n")  # the longest is the trial
    report = run_load(_plan(server, texts, protocol="both"))
    assert set(report.figures.errors) == {"INVALID_ARGUMENT", "BAD_OUTPUT"}
    assert set(report.error_examples) == {"INVALID_ARGUMENT", "BAD_OUTPUT"}
    assert report.figures.requests > 0
    (missed,) = check_slo(report, Limits())
    assert missed.startswith("Error rate is ")
    ledger = report.requests
    assert ledger is not None
    late = ledger.under_way  # on a busy machine; the server may have ended it all the same
    assert ledger.started == ledger.answered + sum(ledger.failed.values()) + late
    assert ledger.server_failed is not None
    assert ledger.server_succeeded is not None
    # Triton 2.51 counts those of an ensemble twice.
    assert 0 <= ledger.server_failed - 2 * ledger.failed["INVALID_ARGUMENT"] <= 2 * late
    good = ledger.answered + ledger.failed["BAD_OUTPUT"]  # the server thought them good
    assert 0 <= ledger.server_succeeded - good <= late
    assert not any("over the whole run" in note for note in report.notes)


def test_late_answers_are_timeouts(server: TritonServer, texts: Path) -> None:
    texts.write_text("late")
    report = run_load(_plan(server, texts, protocol="both", request_timeout_s=0.3))
    assert set(report.figures.errors) == {"TIMEOUT"}
    assert report.figures.p95_ms is None
    assert check_slo(report, Limits())[0].startswith("No request was answered")
    assert "no errors" not in render_html(report)


def test_server_that_dies_during_the_run_shows_as_unavailable(repository: Path, texts: Path) -> None:
    with TritonServer(repository, Ports.free()) as server:
        _wait_ready(server)

        def kill_under_load(progress: RunProgress) -> None:
            if progress.elapsed_s >= 2:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(server.pid, signal.SIGKILL)

        plan = _plan(server, texts, protocol="both", duration_s=5)
        report = run_load(plan, on_progress=kill_under_load)
    assert report.figures.requests > 0
    assert report.figures.errors["UNAVAILABLE"] > 0
    assert report.points[-1].errors.keys() == {"UNAVAILABLE"}
    assert report.identity.digest == "d1ge57"
    assert any("statistics could not be read" in note for note in report.notes)


def test_input_is_checked_before_anything_starts(server: TritonServer, texts: Path) -> None:
    nobody = f"127.0.0.1:{Ports.free().grpc}"
    for changes, said in (
        ({"model": "toi"}, "toi"),
        ({"grpc_address": nobody}, f"gRPC address {nobody}"),
        ({"protocol": "http", "http_address": nobody}, "UNAVAILABLE"),
        ({"texts_per_request": 5}, "INVALID_ARGUMENT"),
        ({"model": "toy-core", "texts_file": texts.parent / "none.txt"}, "none.txt"),
    ):
        with pytest.raises(LoadInputError, match=said):
            run_load(_plan(server, texts, **changes))


def test_a_run_that_is_stopped_reports_what_it_measured(server: TritonServer, texts: Path) -> None:
    """By two workers, whose last words still reach the report."""
    stop = Stop()

    def ask_to_stop(progress: RunProgress) -> None:
        stop.asked = progress.elapsed_s >= 5

    report = run_load(_plan(server, texts, processes=2, duration_s=60), on_progress=ask_to_stop, stop=stop)
    assert report.stopped is not None
    assert 1 <= report.stopped.measured_s == len(report.points) < 30
    assert report.stopped.planned_s == 60
    assert report.figures.requests > 0
    assert report.figures.failed == 0
    assert report.requests is not None
    assert report.requests.started == report.requests.answered == report.requests.server_succeeded
    assert "PARTIAL" in render_text(report)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_leaves_a_report_of_the_command(
    server: TritonServer, texts: Path, tmp_path: Path, number: signal.Signals
) -> None:
    spec, output = tmp_path / "spec.yaml", tmp_path / "load.json"
    spec.write_text("name: toy\nmodel: {source: nowhere, task: embedding}\n")
    options = ["--grpc", server.grpc_address, "--metrics", server.metrics_address, "--texts", texts, "--users", 2]
    options += ["--duration-s", 300, "--warm-up-s", 0]
    before = _answered(server)
    process = subprocess.Popen(
        [sys.executable, "-m", "builders", "loadtest", str(spec), "-o", str(output), *map(str, options)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert wait_until(lambda: _answered(server) > before + 1, 120)  # one more than the trial
        begun = time.monotonic()
        assert wait_until(lambda: time.monotonic() - begun > 4, 10)  # so that whole seconds are measured
        process.send_signal(number)
        printed, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait(10)
    assert process.returncode == 1, errors
    assert "the load test was stopped: the report is of" in errors
    assert "PARTIAL: stopped after" in printed
    report = read_report(output)
    assert report.stopped is not None
    assert report.figures.requests > 0
    assert report.slo is not None
    assert "partial: stopped after" in output.with_suffix(".html").read_text()


def _answered(server: TritonServer) -> int:
    counts = request_counts(server.grpc_address, "toy")
    assert counts is not None
    return counts[0]


def test_nothing_is_left_running(server: TritonServer, texts: Path) -> None:
    import psutil

    def interrupt(_: RunProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_load(_plan(server, texts, processes=2), on_progress=interrupt)
    children = psutil.Process(os.getpid()).children(recursive=True)
    assert not [child for child in children if "locust" in " ".join(child.cmdline())]
