"""Load tests of a real Triton that serves a tiny real decoder, by real Locust processes."""

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
import yaml

from loadtest.drive.run import run_load
from loadtest.errors import LoadInputError
from loadtest.plan import LoadPlan, RunProgress
from loadtest.report.record import read_report
from loadtest.requests.prompts import Lengths, Prompt, StreamLoad
from loadtest.requests.streaming import StreamConnection
from loadtest.seen.counters import generator_counters
from runtime.prometheus import fetch
from runtime.server.launch import Ports, TritonServer
from runtime.server.supervise import ready_server
from tests import ROOT
from tests.conftest import wait_until
from tests.generation.setup import write_repository

pytestmark = pytest.mark.triton
pytest_plugins = ("tests.generation.fixtures",)

SLOTS, QUEUE, LONGEST = 4, 4, 4096


@pytest.fixture(scope="module")
def repository(decoder_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"slots": SLOTS, "queue_size": QUEUE, "capacities": (64, 256, LONGEST), "max_length": LONGEST}
    return write_repository(tmp_path_factory.mktemp("repository"), decoder_graph, **settings)


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    with ready_server(repository) as running:  # its probes are no traffic, so a ledger that follows at once is exact
        yield running


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("open a file\nreturn the number of seconds\nthe quick brown fox jumps\n", encoding="utf-8")
    return file


def _plan(server: TritonServer, texts: Path, **changes: object) -> LoadPlan:
    load = StreamLoad(prompt_words=Lengths(low=2, high=8), output_tokens=Lengths(low=8, high=24))
    fixed = {
        "model": "tiny", "texts_file": texts, "grpc_address": server.grpc_address, "users": 3, "duration_s": 3,
        "metrics_address": server.metrics_address, "warm_up_s": 1, "request_timeout_s": 20.0, "stream": load,
    }  # fmt: skip
    return LoadPlan.model_validate({**fixed, **changes})


def _spec(folder: Path, **slo: float) -> Path:
    file = folder / "spec.yaml"
    model = {"source": "nowhere", "task": "generation", "max_length": LONGEST}
    file.write_text(yaml.safe_dump({"name": "tiny", "model": model, "slo": slo}))
    return file


def test_command_measures_a_generator_and_exits_1_when_its_slo_is_missed(server: TritonServer, tmp_path: Path) -> None:
    output = tmp_path / "load.json"
    spec = _spec(tmp_path, p99_first_token_ms=0.001, p99_response_gap_ms=1e6)
    arguments = [
        "loadtest", spec, "-o", output, "--grpc", server.grpc_address, "--metrics", server.metrics_address,
        "--users", 3, "--duration-s", 3, "--warm-up-s", 1,
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "builders", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert "p99 of the time to the first token is" in done.stderr
    assert "gaps between responses" not in done.stderr
    assert "tokens/s" in done.stdout
    assert "<svg" in output.with_suffix(".html").read_text()
    report = read_report(output)
    seen, stream = report.figures, report.figures.stream
    assert stream is not None
    assert seen.errors == {}
    assert seen.requests > 0
    assert stream.first_token.count == seen.requests
    assert report.ledger is not None  # every token that the server made came to a user
    assert report.ledger.received_tokens == report.ledger.made_tokens > stream.output_tokens > 0
    assert report.generator is not None
    assert report.generator.steps > 0
    assert report.identity.digest == "m"
    rates = [point.stream.output_tokens_per_s for point in report.points if point.stream]
    assert sum(rates) / len(rates) == pytest.approx(stream.output_tokens_per_s)
    assert str(tmp_path) not in output.read_text()


def test_a_full_queue_and_clients_that_leave_are_lines_of_their_own(server: TritonServer, texts: Path) -> None:
    """Answers are long and left in their first half: Triton 2.51 can crash when a client leaves at an end."""
    users = 3 * (SLOTS + QUEUE)
    load = StreamLoad(output_tokens=Lengths(low=1500, high=1500), cancel_share=1.0)
    report = run_load(_plan(server, texts, users=users, processes=2, stream=load, request_timeout_s=60.0))
    stream = report.figures.stream
    assert stream is not None
    assert set(report.figures.errors) == {"UNAVAILABLE"}
    assert report.error_examples["UNAVAILABLE"] == f"{QUEUE} requests wait already; try again later"
    assert stream.cancelled > 0
    assert report.figures.requests == 0
    assert report.ledger is not None
    assert 0 <= report.ledger.made_tokens - report.ledger.received_tokens <= report.ledger.owed_tokens
    assert report.ledger.received_tokens > 0
    assert max(point.users or 0 for point in report.points) == users  # two workers, added up


def test_arrivals_go_on_while_the_server_is_dead(repository: Path, texts: Path) -> None:
    """In the open loop a failure thins no load. 40 requests/s for 4 s: 160, with a standard deviation of 13."""
    with ready_server(repository) as server:

        def kill_under_load(progress: RunProgress) -> None:
            if progress.elapsed_s >= 3 and progress.answered > 0:  # the window begins within 2 s
                with contextlib.suppress(ProcessLookupError):
                    os.kill(server.pid, signal.SIGKILL)

        plan = _plan(server, texts, rate_per_s=40.0, duration_s=4, request_timeout_s=5.0)
        report = run_load(plan, on_progress=kill_under_load)
    assert report.figures.requests > 0
    assert set(report.figures.errors) == {"UNAVAILABLE"}
    assert 95 <= report.figures.requests + report.figures.failed <= 225
    assert report.points[-1].errors.keys() == {"UNAVAILABLE"}
    assert report.ledger is None
    assert report.generator is None
    assert any("statistics could not be read" in note for note in report.notes)
    assert "no errors" not in report.model_dump_json()


@pytest.mark.slow
def test_workers_of_a_cluster_heed_their_master_which_prints_the_figures(server: TritonServer, texts: Path) -> None:
    """As `k8s/components/locust` starts them: only the master is told how long the answers are."""
    both = ["--model=tiny", f"--grpc-address={server.grpc_address}", f"--texts={texts}"]
    port = Ports.free().grpc
    locust = [sys.executable, "-m", "locust", "--locustfile", str(ROOT / "loadtest" / "drive" / "locustfile.py"), *both]
    master = [*locust, "--master", f"--master-bind-port={port}", "--headless", "--expect-workers=1", "--users=2"]
    master += ["--duration-s=2", "--warm-up-s=0", "--output-tokens=7"]
    before = _counters(server)
    worker = subprocess.Popen(
        [*locust, "--worker", "--master-host=127.0.0.1", f"--master-port={port}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=texts.parent, env=_environment(),
    )  # fmt: skip
    try:
        done = subprocess.run(
            master, capture_output=True, text=True, timeout=60, cwd=texts.parent, env=_environment(), check=True
        )
    finally:
        worker.kill()
        worker.wait(10)
    assert "first token p50" in done.stdout
    assert wait_until(lambda: _counters(server)["requests_total"] > before["requests_total"], 10)
    after = _counters(server)
    tokens, requests = (after[name] - before[name] for name in ("output_tokens_total", "requests_total"))
    assert tokens == 7 * requests > 0


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def _counters(server: TritonServer) -> dict[str, float]:
    """Of a server that rests: two looks more than a second apart, between which it publishes, are alike."""
    seen: list[tuple[float, dict[str, float]]] = []

    def rests() -> bool:
        page = fetch(f"http://{server.metrics_address}/metrics")
        seen.append((time.monotonic(), generator_counters(page, "tiny")))
        return any(seen[-1][0] - at > 1.5 and seen[-1][1] == counters for at, counters in seen)

    assert wait_until(rests, 30)
    return seen[-1][1]


def test_the_clock_of_a_request_runs_from_when_it_was_due(server: TritonServer) -> None:
    connection = StreamConnection(server.grpc_address, 20)
    try:
        stream = connection.ask("tiny", Prompt("open a file", 4), time.perf_counter() - 1000)
    finally:
        connection.close()
    assert stream.error is None
    assert stream.tokens == 4
    assert stream.arrivals[0][0] >= 1000


def test_input_is_checked_before_anything_starts(server: TritonServer, texts: Path) -> None:
    nobody = f"127.0.0.1:{Ports.free().grpc}"
    too_long = StreamLoad(output_tokens=Lengths(low=1, high=LONGEST + 1))
    for changes, said in (
        ({"model": "tini"}, "a name that the server does not have"),
        ({"grpc_address": nobody}, f"gRPC address {nobody}"),
        ({"stream": too_long}, r"INVALID_ARGUMENT: max_tokens=4097.*--output-tokens"),
        ({"stream": None}, "a generator, which streams text; expected an encoder"),
        ({"protocol": "http"}, "use protocol grpc"),
    ):
        with pytest.raises(LoadInputError, match=said):
            run_load(_plan(server, texts, **changes))


def test_the_trial_prompt_is_the_longest_in_tokens(server: TritonServer, texts: Path) -> None:
    """A character of the second text is three tokens, so with its answer it is too long for the model. The first has
    more characters, and fits.
    """
    texts.write_text("a file " * 250 + "\n" + "\u6f22" * 1200 + "\n", encoding="utf-8")
    load = StreamLoad(output_tokens=Lengths(low=1, high=LONGEST - 3 * 1200 + 64))
    with pytest.raises(LoadInputError, match="INVALID_ARGUMENT"):
        run_load(_plan(server, texts, stream=load))


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        ("generation", ["--output-tokens", "9-3"], "--output-tokens: got '9-3'"),
        ("minilm", ["--cancel-share", "0.5"], "use it with a model that streams text"),
    ],
)
def test_wrong_options_exit_2_with_a_cure(spec: str, options: list[str], said: str, tmp_path: Path) -> None:
    name = spec if spec == "minilm" else str(_spec(tmp_path))
    command = [sys.executable, "-m", "builders", "loadtest", name, "-o", str(tmp_path / "load.json"), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "load.json").exists()
