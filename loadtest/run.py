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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from loadtest.connection import Protocol
from loadtest.counters import Ledger
from loadtest.errors import LoadInputError, LoadRunError
from loadtest.figures import Record, merged
from loadtest.prompts import StreamLoad, longest_prompt
from loadtest.recording import PROGRESS_PREFIX, StreamCell, Trace
from loadtest.report import LoadReport
from loadtest.server import Snapshot, Target, made_tokens, probe, snapshot
from loadtest.shapes import DRAIN_SLACK_S, SETTLE_S, Schedule, Shape
from loadtest.texts import read_texts

Address = Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]+:[0-9]{1,5}$")]
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]

START_LIMIT_S = 60  # for Locust to import, and for its workers to meet
STOP_LIMIT_S = 10  # for Locust to leave after its last word
COUNT_LIMIT_S = 3.0  # for a generator to publish its last counts, which it does once a second


class LoadPlan(Record):
    """What to measure and how. Addresses are `host:port`."""

    model: Annotated[str, Field(min_length=1)]
    texts_file: Path = Field(description="UTF-8, one text a line")
    grpc_address: Address = Field("127.0.0.1:8001", description="always needed: statistics are read there")
    http_address: Address = "127.0.0.1:8000"
    metrics_address: Address | None = "127.0.0.1:8002"
    protocol: Literal["grpc", "http", "both"] = Field("grpc", description="both: half of the users each")
    shape: Shape = "constant"
    users: Positive = 8
    steps: Annotated[int, Field(ge=2, le=50)] = Field(5, description="plateaux of the shape `steps`")
    duration_s: Positive = Field(60, description="measured, after the warm-up")
    warm_up_s: NotNegative = Field(5, description="does not count")
    texts_per_request: Positive = 1
    request_timeout_s: Annotated[float, Field(gt=0)] = Field(10.0, description="of a whole answer, to its last token")
    rate_per_s: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="requests that are started in a second at random moments, by all users together, whatever the "
        "answers do; none: each user waits for its answer",
    )
    stream: StreamLoad | None = Field(None, description="the model is a generator, and this is asked of it")
    seed: int = 0
    processes: Positive = Field(1, description="Locust workers; more than 1 when one core cannot make the load")

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.shape, self.users, self.warm_up_s, self.duration_s, self.steps)

    @property
    def addresses(self) -> dict[Protocol, str]:
        """Where requests go, by protocol."""
        every: dict[Protocol, str] = {"grpc": self.grpc_address, "http": self.http_address}
        return {name: address for name, address in every.items() if self.protocol in (name, "both")}

    @property
    def limit_s(self) -> float:
        """Wall clock after which the load generator is stopped, whatever it does."""
        return START_LIMIT_S + self.schedule.end_s + self.request_timeout_s + 2 * DRAIN_SLACK_S + STOP_LIMIT_S


class Progress(Record):
    """How far a run is; `answered` and `errors` count from its start, the warm-up included."""

    elapsed_s: float
    end_s: float
    users: int
    answered: int
    errors: int


@dataclass(frozen=True)
class Evidence:
    """Everything that a report is made of. The snapshots enclose the measured window to within a second or two."""

    plan: LoadPlan
    texts: tuple[str, ...]
    target: Target
    trace: Trace
    before: Snapshot
    after: Snapshot
    ledger: Ledger | None = None  # none: the server does not count tokens


def run_load(
    plan: LoadPlan,
    *,
    spec_name: str = "unknown",
    on_progress: Callable[[Progress], None] | None = None,
) -> LoadReport:
    """Measures a served model; blocks for about warm_up_s + duration_s + 5 s, and never longer than plan.limit_s.

    `on_progress` is called about once a second, from this thread.
    Raises LoadInputError (nothing was started) and LoadRunError (nothing that was seen can be trusted).
    """
    from loadtest.assemble import report_from_evidence

    check_plan(plan)
    texts = read_texts(plan.texts_file)
    trial = [texts[number % len(texts)] for number in range(plan.texts_per_request)]
    longest = None if plan.stream is None else longest_prompt(texts, plan.stream)
    made_before = made_tokens(plan.metrics_address, plan.model)
    target = probe(plan.model, plan.addresses, plan.grpc_address, trial, longest)
    with tempfile.TemporaryDirectory(prefix="trireme-load-") as folder:
        evidence = _drive(plan, texts, target, Path(folder), on_progress or (lambda _: None))
    if made_before is not None:
        evidence = replace(evidence, ledger=_ledger(evidence, made_before))
    return report_from_evidence(evidence, spec_name)


def _ledger(evidence: Evidence, made_before: float) -> Ledger | None:
    whole = merged(cell for cells in evidence.trace.cells.values() for cell in cells.values())
    seen = whole.stream or StreamCell()
    received = evidence.target.trial_tokens + seen.output_tokens + seen.lost_tokens
    plan = evidence.plan
    made = made_tokens(plan.metrics_address, plan.model, made_before + received, COUNT_LIMIT_S)
    if made is None or made < made_before:  # gone, or loaded anew
        return None
    return Ledger(received_tokens=received, made_tokens=round(made - made_before), owed_tokens=seen.owed_tokens)


def check_plan(plan: LoadPlan) -> None:
    """What the types cannot say. Raises LoadInputError."""
    if plan.stream is not None and (plan.protocol != "grpc" or plan.texts_per_request != 1):
        raise LoadInputError(
            f"protocol={plan.protocol} with texts_per_request={plan.texts_per_request}",
            got="a load that a generator does not take",
            expected="one prompt a request, over grpc: text is streamed there",
            fix="use protocol grpc and texts_per_request 1",
        )
    if plan.shape == "steps" and plan.duration_s < plan.steps * (SETTLE_S + 3):
        raise LoadInputError(
            f"duration_s={plan.duration_s} with steps={plan.steps}",
            got=f"{plan.duration_s / plan.steps:.3g} s a step",
            expected=f"{SETTLE_S + 3} s or more, of which the first {SETTLE_S} do not count",
            fix=f"use duration_s={plan.steps * (SETTLE_S + 3)} or more, or fewer steps",
        )
    if plan.users < max(plan.processes, plan.steps if plan.shape == "steps" else 1, len(plan.addresses)):
        raise LoadInputError(
            f"users={plan.users}",
            got="fewer users than steps, processes or protocols",
            expected="at least one user for each",
            fix="use more users, or fewer of the others",
        )


def command(plan: LoadPlan, trace_file: Path) -> list[str]:
    """The Locust command line of a plan."""
    options: dict[str, object] = {
        "--locustfile": Path(__file__).with_name("locustfile.py"),
        "--model": plan.model,
        "--texts": plan.texts_file.resolve(),
        "--protocol": plan.protocol,
        "--grpc-address": plan.grpc_address,
        "--http-address": plan.http_address,
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
        port = _free_port()
        flags += [f"--processes={plan.processes}", "--master-bind-host=127.0.0.1", f"--master-bind-port={port}"]
        flags += ["--master-host=127.0.0.1", f"--master-port={port}", f"--expect-workers-max-wait={START_LIMIT_S}"]
    return [sys.executable, "-m", "locust", *flags, *(f"{name}={value}" for name, value in options.items())]


def _drive(
    plan: LoadPlan, texts: tuple[str, ...], target: Target, folder: Path, on_progress: Callable[[Progress], None]
) -> Evidence:
    trace_file, log_file = folder / "trace.json", folder / "locust.log"
    before: Snapshot | None = None
    after: Snapshot | None = None
    with _generator(command(plan, trace_file), log_file) as process:

        def look() -> Snapshot:
            return snapshot(plan.model, target, plan.grpc_address, plan.metrics_address, process.pid)

        for state in _progress_of(process, plan):
            on_progress(state)
            if before is None and state.elapsed_s >= plan.warm_up_s:
                before = look()
            if after is None and state.elapsed_s >= plan.warm_up_s + plan.duration_s:
                after = look()
        with contextlib.suppress(subprocess.TimeoutExpired):  # then its return code stays None
            process.wait(STOP_LIMIT_S)
        if process.returncode != 0 or before is None or after is None or not trace_file.is_file():
            raise LoadRunError(f"Locust ended early with exit code {process.returncode}: {_tail(log_file)}")
    return Evidence(plan, texts, target, Trace.from_json(trace_file.read_bytes()), before, after)


@contextlib.contextmanager
def _generator(arguments: list[str], log_file: Path) -> Iterator[subprocess.Popen[str]]:
    """Locust in a process group of its own, which is gone when the block is left, however it is left."""
    root = str(Path(__file__).parents[1])
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


def _progress_of(process: subprocess.Popen[str], plan: LoadPlan) -> Iterator[Progress]:
    """Progress until the process closes its output. Raises LoadRunError when that is not within plan.limit_s."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        with contextlib.suppress(ValueError):  # the stream was closed: the run was given up
            for line in process.stdout or ():
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, name="locust-output", daemon=True).start()
    deadline = time.monotonic() + plan.limit_s
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise LoadRunError(f"Locust did not end within {plan.limit_s:g} s; it was stopped") from None
        if line is None:
            return
        if line.startswith(PROGRESS_PREFIX):
            yield Progress(end_s=plan.schedule.end_s, **json.loads(line.removeprefix(PROGRESS_PREFIX)))


def _free_port() -> int:
    import socket

    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        return int(probe_socket.getsockname()[1])


def _tail(log_file: Path, characters: int = 1500) -> str:
    return log_file.read_text(errors="replace").strip()[-characters:] or "it wrote nothing"
