"""`locust -f loadtest/drive/locustfile.py --model minilm --texts texts.txt …`: alone, as a master, or as a worker.

Workers send what they recorded to the master with Locust's own reports; the master (or the only process) writes the
trace of the whole run to `--trace-out`, from which `loadtest.drive.run` makes the report.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import gevent
from locust import LoadTestShape, events
from locust.runners import MasterRunner, WorkerRunner

from loadtest.drive.users import TritonUser
from loadtest.report.summary import figures_lines
from loadtest.requests.clients import Orders
from loadtest.requests.interface import RequestError
from loadtest.requests.prompts import StreamLoad, parse_lengths
from loadtest.requests.texts import read_texts
from loadtest.seen.figures import Counted, figures_of, measured_keys, merged
from loadtest.seen.recording import PROGRESS_PREFIX, Trace
from loadtest.shapes import DRAIN_SLACK_S, EARLY_DRAIN_S, Schedule, interval_for

__all__ = ["ScheduledShape", "TritonUser"]

REPORT_KEY = "trireme_trace"
LATE_EVERY_S = 0.05


def add_options(parser: Any) -> None:
    parser.add_argument("--model", default="", help="Name of the ensemble in Triton")
    parser.add_argument("--texts", default="", help="UTF-8 file, one text a line")
    parser.add_argument("--protocol", choices=["grpc", "http", "both"], default="grpc")
    parser.add_argument("--grpc-address", default="127.0.0.1:8001")
    parser.add_argument("--http-address", default="127.0.0.1:8000")
    parser.add_argument("--api-key-file", default="", help="Holds the key of a gateway that asks for one")
    parser.add_argument("--texts-per-request", type=int, default=1)
    parser.add_argument("--load-shape", choices=["constant", "steps"], default="constant")
    parser.add_argument("--load-steps", type=int, default=5, help="Plateaux of the shape `steps`, up to --users")
    parser.add_argument("--duration-s", type=int, default=60, help="Measured seconds, after the warm-up")
    parser.add_argument("--warm-up-s", type=int, default=5, help="Seconds that do not count")
    parser.add_argument("--rate-per-user", type=float, default=0.0, help="Requests a second that each user starts "
                        "without waiting for answers; 0: each user waits for its answer")  # fmt: skip
    parser.add_argument("--prompt-words", default="", help="Generators: 64, or 16-128; default: each text as it is")
    parser.add_argument("--output-tokens", default="32-128", help="Generators: 64, or 16-128")
    parser.add_argument("--cancel-share", type=float, default=0.0, help="Generators: of requests, 0 to 1")
    parser.add_argument("--request-timeout-s", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace-out", default="", help="Write the trace here", include_in_web_ui=False)
    parser.add_argument("--progress", action="store_true", help="A line a second on stdout", include_in_web_ui=False)


def schedule(options: Any) -> Schedule:
    return Schedule(
        shape=options.load_shape,
        users=options.num_users or 1,
        warm_up_s=options.warm_up_s,
        duration_s=options.duration_s,
        steps=options.load_steps,
    )


class ScheduledShape(LoadTestShape):  # type: ignore[misc]  # locust is untyped here
    """Locust asks `tick` once a second. After the schedule's end users drain, so that hanging requests are counted."""

    use_common_options = True
    ended_at: float | None = None  # the load was ended early; time.monotonic()
    _told: set[str] | None = None  # workers that have reported since the last user left

    def end(self) -> None:
        """From the next tick on nobody asks any more. Locust tells its workers how long users may take to finish."""
        self.ended_at = self.ended_at or time.monotonic()
        self.runner.environment.stop_timeout = EARLY_DRAIN_S

    def tick(self) -> tuple[int, float] | None:
        options = self.runner.environment.parsed_options
        plan, elapsed_s = schedule(options), self.get_run_time()
        users, late_s = plan.users_at(elapsed_s), elapsed_s - plan.end_s - options.request_timeout_s - DRAIN_SLACK_S
        if self.ended_at is not None:
            users, late_s = 0, time.monotonic() - self.ended_at - EARLY_DRAIN_S - DRAIN_SLACK_S
        if users == 0 and (self._all_told() or late_s > 0):
            return None
        return users, float(plan.users)

    def _all_told(self) -> bool:
        """Whether nobody asks any more and every worker has told what it saw until then. They report every 3 s; Locust
        itself would give them half a second for their last words, which a busy machine does not always manage.
        """
        if self.get_current_user_count() != 0:
            self._told = None
            return False
        if not isinstance(self.runner, MasterRunner):
            return True
        if self._told is None:
            self._told = set()
        there = {worker.id for worker in self.runner.clients.all} - {
            worker.id for worker in self.runner.clients.missing
        }
        return there <= self._told

    def hear(self, worker: str, users: int) -> None:
        """Of a report that came in: whose, and how many users it had."""
        if self._told is not None and users == 0:
            self._told.add(worker)


def prepare(environment: Any, **_: Any) -> None:
    """`init` comes after Locust forked its `--processes`; gRPC must not be touched before a fork."""
    import grpc.experimental.gevent

    options, runner = environment.parsed_options, environment.runner
    trace = Trace(interval_s=interval_for(options.duration_s))
    stop_on_signals(environment, trace)
    environment.stop_timeout = options.request_timeout_s + DRAIN_SLACK_S  # users may finish, or answers are lost
    if not isinstance(runner, MasterRunner):
        grpc.experimental.gevent.init_gevent()
        give_orders(environment)
        record_requests(environment, trace)
    if isinstance(runner, WorkerRunner):
        events.report_to_master.add_listener(lambda client_id, data: data.update({REPORT_KEY: trace.take().to_json()}))
        return
    events.worker_report.add_listener(lambda client_id, data: trace.merge(Trace.from_json(data[REPORT_KEY])))
    events.worker_report.add_listener(
        lambda client_id, data: environment.shape_class.hear(client_id, data["user_count"])
    )
    keep_trace(environment, trace)


def stop_on_signals(environment: Any, trace: Trace) -> None:
    """An orderly end. Locust heeds SIGTERM only after a headless shape has ended, so a deleted pod would lose its
    trace, and a KeyboardInterrupt strikes any greenlet, so users would not be asked to finish.
    """

    def end() -> None:
        trace.stopped_at = trace.stopped_at or time.time()
        environment.shape_class.end()

    if isinstance(environment.runner, WorkerRunner):
        gevent.signal_handler(signal.SIGINT, environment.runner.quit)
    elif environment.parsed_options.headless:
        for number in (signal.SIGINT, signal.SIGTERM):
            gevent.signal_handler(number, end)


def give_orders(environment: Any) -> None:
    """Now, so that a wrong option is an error at once; and at each start, because a worker then has its master's."""

    def give(**_: Any) -> None:
        environment.orders = orders(environment.parsed_options)

    give()
    events.test_start.add_listener(give)


def orders(options: Any) -> Orders:
    addresses = {"grpc": options.grpc_address, "http": options.http_address}
    return Orders(
        model=options.model,
        addresses={name: at for name, at in addresses.items() if options.protocol in (name, "both")},  # type: ignore[misc]
        texts=read_texts(Path(options.texts)),
        texts_per_request=options.texts_per_request,
        stream=StreamLoad(
            prompt_words=parse_lengths(options.prompt_words, "--prompt-words") if options.prompt_words else None,
            output_tokens=parse_lengths(options.output_tokens, "--output-tokens"),
            cancel_share=options.cancel_share,
        ),
        rate_per_user=options.rate_per_user or None,
        seed=options.seed,
        request_timeout_s=options.request_timeout_s,
        key=Path(options.api_key_file).read_text().strip() if options.api_key_file else None,
    )


def record_requests(environment: Any, trace: Trace) -> None:
    def on_request(
        request_type: str, start_time: float, response_time: float, exception: Exception | None, context: Any, **_: Any
    ) -> None:
        if "stream" in context:
            trace.streamed(request_type, start_time, context["stream"])
        elif isinstance(exception, RequestError):
            trace.failed(request_type, start_time, exception.kind, exception.message)
        else:
            trace.answered(request_type, start_time, response_time, **context)

    environment.trace = trace  # users tell it what they start

    def on_user_error(user_instance: Any, exception: BaseException, **_: Any) -> None:
        """A fault in our own code: Locust lets the user go on, so it must show as an error."""
        user = getattr(user_instance, "user", user_instance)  # Locust gives the task set of a user
        trace.failed(user.protocol, time.time(), "CLIENT_ERROR", repr(exception))

    events.request.add_listener(on_request)
    events.user_error.add_listener(on_user_error)
    gevent.spawn(sample_users, environment, trace)
    gevent.spawn(sample_late, trace)


def sample_users(environment: Any, trace: Trace) -> None:
    """Users that have begun to ask or, where they wait for no answer, requests under way; amid each interval."""
    while True:  # until Locust ends this process
        now = time.time()
        gevent.sleep(trace.key(now) + 1.5 * trace.interval_s - now)
        asking = [greenlet.args[0] for greenlet in environment.runner.user_greenlets]
        if environment.orders.rate_per_user is not None:
            users = sum(len(user.under_way) for user in asking)
        else:
            users = sum(user.asks for user in asking)
        trace.sample_users(time.time(), users)


def sample_late(trace: Trace) -> None:
    """Every answer is read when this process comes to it; so long as a timer is late, so may be any moment it notes."""
    while True:  # until Locust ends this process
        before = time.perf_counter()
        gevent.sleep(LATE_EVERY_S)
        late_s = time.perf_counter() - before - LATE_EVERY_S
        trace.sample_late(time.time() - late_s, late_s * 1000)


def keep_trace(environment: Any, trace: Trace) -> None:
    """On the process that sees everything: note the start, tell how it goes, write the trace at the end."""
    options = environment.parsed_options

    def on_test_start(**_: Any) -> None:
        trace.take()
        trace.started_at = time.time()
        if options.progress:
            gevent.spawn(tell_progress, environment, trace)

    def on_quitting(**_: Any) -> None:
        if options.trace_out:
            Path(options.trace_out).write_text(trace.to_json())
        elif options.headless:  # nobody makes a report of it, as in a cluster
            lines, measured = window_lines(trace, schedule(options))
            print("\n".join(lines), flush=True)
            if not measured:
                environment.process_exit_code = 1

    events.test_start.add_listener(on_test_start)
    events.quitting.add_listener(on_quitting)


def window_lines(trace: Trace, plan: Schedule) -> tuple[list[str], bool]:
    """What Locust's own table lacks: only the measured window, and of a generator first tokens and gaps. And whether
    anything was measured.
    """
    keys = measured_keys(trace, plan)
    seconds = len(keys) * trace.interval_s
    whole = merged(cells[key] for cells in trace.cells.values() for key in keys if key in cells)
    measured = bool(seconds and (whole.answered or (whole.stream and whole.stream.output_tokens)))
    figures = figures_of([whole], max(1, seconds), Counted(stream=whole.stream is not None))
    part = "" if trace.stopped_at is None else f" (stopped early: {plan.duration_s} s were planned)"
    lines = [f"{seconds} s{part} after {plan.warm_up_s} s of warm-up", *figures_lines(figures)]
    if not measured:
        lines.append(f"error: nothing was answered in these {seconds} s; use fewer users, or a longer --duration-s")
    return lines, measured


def tell_progress(environment: Any, trace: Trace) -> None:
    started_at = trace.started_at
    while trace.started_at == started_at:  # until Locust ends this process, or starts another test
        gevent.sleep(1)
        answered = sum(cell.answered for cells in trace.cells.values() for cell in cells.values())
        errors = sum(sum(cell.errors.values()) for cells in trace.cells.values() for cell in cells.values())
        state = {
            "elapsed_s": round(time.time() - started_at, 3),
            "users": environment.runner.user_count,
            "answered": answered,
            "errors": errors,
        }
        print(PROGRESS_PREFIX + json.dumps(state), flush=True)


def leave_at_once() -> None:
    """Registered before Locust's own exit functions, so it runs after them. Nothing may be taken apart afterwards:
    a gRPC channel that the interpreter finds last waits for ever for gevent's hub, which no longer runs.
    """
    if exit_codes:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_codes[-1])


exit_codes: list[int] = []
atexit.register(leave_at_once)
events.quit.add_listener(lambda exit_code, **_: exit_codes.append(exit_code))
events.init_command_line_parser.add_listener(add_options)
events.init.add_listener(prepare)
