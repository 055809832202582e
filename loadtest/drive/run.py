"""`run_load`: one load test from plan to report. Locust runs in a process of its own, because it patches Python."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from loadtest.drive.ledger import counts_before, with_ledgers
from loadtest.drive.stopping import Stop
from loadtest.errors import LoadRunError
from loadtest.plan import (
    EARLY_END_LIMIT_S,
    START_LIMIT_S,
    STOP_LIMIT_S,
    Evidence,
    LoadPlan,
    RunProgress,
    check_plan,
    key_of,
)
from loadtest.report.record import LoadReport
from loadtest.requests.prompts import longest_prompts
from loadtest.requests.texts import read_texts
from loadtest.seen.recording import PROGRESS_PREFIX, Trace
from loadtest.seen.server import Snapshot, TestedServer, probe, snapshot
from runtime.ports import free_ports

LOOK_S = 0.5  # how often a stop is looked for


def run_load(
    plan: LoadPlan,
    *,
    spec_name: str = "unknown",
    on_progress: Callable[[RunProgress], None] | None = None,
    stop: Stop | None = None,
) -> LoadReport:
    """Measures a served model; blocks for about warm_up_s + duration_s + 5 s, and never longer than plan.limit_s.

    `on_progress` is called about once a second, from this thread. When `stop` is asked for, the load ends within
    seconds, and the report is of what was measured until then.
    Raises LoadInputError (nothing was started) and LoadRunError (nothing that was seen can be trusted).
    """
    from loadtest.report.assemble import report_from_evidence

    check_plan(plan)
    key = key_of(plan)
    texts = read_texts(plan.texts_file)
    longest_first = sorted(texts, key=len, reverse=True)
    trial = [longest_first[number % len(texts)] for number in range(plan.texts_per_request)]
    prompts = () if plan.stream is None else longest_prompts(texts, plan.stream)
    before = counts_before(plan)
    target = probe(plan.model, plan.addresses, plan.grpc_address, trial, prompts, key)
    with tempfile.TemporaryDirectory(prefix="trireme-load-") as folder:
        evidence = _drive(plan, texts, target, Path(folder), on_progress or (lambda _: None), stop or Stop())
    return report_from_evidence(with_ledgers(evidence, before), spec_name)


def command(plan: LoadPlan, trace_file: Path) -> list[str]:
    """The Locust command line of a plan."""
    options: dict[str, object] = {
        "--locustfile": Path(__file__).with_name("locustfile.py"),
        "--model": plan.model,
        "--texts": plan.texts_file.resolve(),
        "--protocol": plan.protocol,
        "--grpc-address": plan.addresses.get("grpc", plan.grpc_address),
        "--http-address": plan.addresses.get("http", plan.http_address),
        "--api-key-file": "" if plan.key_file is None else plan.key_file.resolve(),
        "--users": plan.users,
        "--load-shape": plan.shape,
        "--load-steps": plan.steps,
        "--duration-s": plan.duration_s,
        "--warm-up-s": plan.warm_up_s,
        "--texts-per-request": plan.texts_per_request,
        "--request-timeout-s": plan.request_timeout_s,
        "--rate-per-user": (plan.rate_per_s or 0) / plan.users,
        "--seed": plan.seed,
        "--trace-out": trace_file,
        "--loglevel": "WARNING",
        "--exit-code-on-error": 0,  # failed requests are a result; any other exit code is a fault of the generator
    }
    if plan.stream is not None:
        options |= {"--output-tokens": plan.stream.output_tokens, "--cancel-share": plan.stream.cancel_share}
        options |= {"--prompt-words": plan.stream.prompt_words or ""}
    flags = ["--headless", "--only-summary", "--json", "--progress"]  # --json: no tables among the log
    if plan.processes > 1:
        port = free_ports(1)[0]
        flags += [f"--processes={plan.processes}", "--master-bind-host=127.0.0.1", f"--master-bind-port={port}"]
        flags += ["--master-host=127.0.0.1", f"--master-port={port}", f"--expect-workers-max-wait={START_LIMIT_S}"]
    return [sys.executable, "-m", "locust", *flags, *(f"{name}={value}" for name, value in options.items())]


def _drive(
    plan: LoadPlan,
    texts: tuple[str, ...],
    target: TestedServer,
    folder: Path,
    on_progress: Callable[[RunProgress], None],
    stop: Stop,
) -> Evidence:
    trace_file, log_file = folder / "trace.json", folder / "locust.log"
    before: Snapshot | None = None
    after: Snapshot | None = None
    stop.armed = True
    with _generator(command(plan, trace_file), log_file) as process:

        def look() -> Snapshot:
            return snapshot(plan.model, target, plan.grpc_address, plan.metrics_address, process.pid)

        for state in _progress_of(process, plan, stop):
            on_progress(state)
            if before is None and state.elapsed_s >= plan.warm_up_s:
                before = look()
            if after is None and (stop.asked or state.elapsed_s >= plan.warm_up_s + plan.duration_s):
                after = look()
        with contextlib.suppress(subprocess.TimeoutExpired):  # then its return code stays None
            process.wait(STOP_LIMIT_S)
        if stop.asked and (before is None or after is None):
            raise LoadRunError(
                f"the load test was stopped within its warm-up of {plan.warm_up_s} s, so nothing was measured and "
                "there is no report; let it run for longer, or give a shorter --warm-up-s"
            )
        if process.returncode != 0 or before is None or after is None or not trace_file.is_file():
            raise LoadRunError(f"Locust ended early with exit code {process.returncode}: {_tail(log_file)}")
    return Evidence(plan, texts, target, Trace.from_json(trace_file.read_bytes()), before, after)


@contextlib.contextmanager
def _generator(arguments: list[str], log_file: Path) -> Iterator[subprocess.Popen[str]]:
    """Locust in a process group of its own, which is gone when the block is left, however it is left."""
    root = str(Path(__file__).parents[2])
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])))
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=log_file.parent,  # Locust reads a pyproject.toml or locust.conf in the working directory as options
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a run that is given up leaves nothing worth a polite signal
        process.wait(STOP_LIMIT_S)
        if process.stdout is not None:
            process.stdout.close()


def _progress_of(process: subprocess.Popen[str], plan: LoadPlan, stop: Stop) -> Iterator[RunProgress]:
    """Progress until the process closes its output; when `stop` is asked for, the last once more, and then the process
    is asked to end. Raises LoadRunError when it does not end within plan.limit_s.
    """
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        with contextlib.suppress(ValueError):  # the stream was closed: the run was given up
            for line in process.stdout or ():
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, name="locust-output", daemon=True).start()
    deadline, last, stopping = time.monotonic() + plan.limit_s, None, False
    while True:
        if stop.asked and not stopping:
            stopping, deadline = True, min(deadline, time.monotonic() + EARLY_END_LIMIT_S)
            if last is not None:
                yield last
            process.terminate()
        try:
            line = lines.get(timeout=max(0.0, min(LOOK_S, deadline - time.monotonic())))
        except queue.Empty:
            if time.monotonic() >= deadline:
                raise LoadRunError(f"Locust did not end within {plan.limit_s:g} s; it was stopped") from None
            continue
        if line is None:
            return
        if line.startswith(PROGRESS_PREFIX):
            last = RunProgress(end_s=plan.schedule.end_s, **json.loads(line.removeprefix(PROGRESS_PREFIX)))
            yield last


def _tail(log_file: Path, characters: int = 1500) -> str:
    return log_file.read_text(errors="replace").strip()[-characters:] or "it wrote nothing"
