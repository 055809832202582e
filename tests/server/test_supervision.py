"""Deciding what to do about a server: the machine alone, the page of metrics, and /proc."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.server.guardian import left
from runtime.server.progress import ServerProgress, work_done
from runtime.server.stubs import LOADING_SETTLED_S, Stubs
from runtime.server.supervision import (
    FAILURES_BEFORE_REPAIR,
    MOST_FAILED_REPAIRS,
    MOST_REPAIRS,
    NOTHING,
    RECOVERING_S,
    STANDSTILL_S,
    WINDOW_S,
    Act,
    Event,
    Supervision,
)
from tests.conftest import wait_until


def test_one_wrong_answer_may_pass_and_two_in_a_row_may_not() -> None:
    plan = Supervision(0.0)
    assert plan.hear(Event.FAILED, 1.0) == NOTHING
    assert plan.hear(Event.ANSWERED, 2.0) == NOTHING
    assert plan.hear(Event.FAILED, 3.0) == NOTHING
    assert plan.hear(Event.FAILED, 4.0, "not finite").act is Act.REPAIR


def test_a_server_that_works_is_left_alone_however_long_it_refuses() -> None:
    plan = Supervision(0.0)
    for second in range(1, 1000, 7):
        assert plan.hear(Event.MOVING, second) == NOTHING
        assert plan.hear(Event.BUSY, second + 3) == NOTHING


def test_a_server_that_stands_still_with_work_waiting_is_repaired() -> None:
    plan = Supervision(0.0)
    assert plan.hear(Event.BUSY, STANDSTILL_S - 1, "no token") == NOTHING
    action = plan.hear(Event.BUSY, STANDSTILL_S, "no token")
    assert action.act is Act.REPAIR
    assert "nothing was done for 30 s with work waiting (no token)" in action.reason


def test_a_model_that_gets_a_new_executor_has_its_time_and_no_more() -> None:
    """Ranks with all their weights start for longer than a server may stand still."""
    plan = Supervision(0.0)
    for second in range(1, int(RECOVERING_S), 5):
        assert plan.hear(Event.RECOVERING, second, "no token") == NOTHING
    assert plan.hear(Event.BUSY, RECOVERING_S + 5) == NOTHING, "it stands still from here on"
    assert plan.hear(Event.RECOVERING, RECOVERING_S + STANDSTILL_S + 5, "no token").act is Act.REPAIR
    plan.hear(Event.REPAIRED, RECOVERING_S + 60)
    assert plan.hear(Event.RECOVERING, RECOVERING_S + 60 + 2 * STANDSTILL_S) == NOTHING


def test_repairs_that_fail_are_made_at_growing_intervals_and_end() -> None:
    plan = Supervision(0.0)
    actions = [plan.hear(Event.DIED, 1.0, "killed")]
    while actions[-1].act is Act.REPAIR:
        actions.append(plan.hear(Event.NOT_REPAIRED, 2.0, "does not start"))
    assert [action.pause_s for action in actions[:-1]] == [0, 1, 2, 4, 8]
    assert len(actions) == MOST_FAILED_REPAIRS + 1
    assert actions[-1].reason == f"{MOST_FAILED_REPAIRS} repairs in a row did not help: does not start"
    assert plan.hear(Event.ANSWERED, 3.0) == actions[-1]


def test_repairs_that_succeed_are_bounded_too_but_not_for_ever() -> None:
    plan, now = Supervision(0.0), 0.0
    for _ in range(MOST_REPAIRS):
        now += 1
        assert plan.hear(Event.DIED, now).act is Act.REPAIR
        assert plan.hear(Event.REPAIRED, now) == NOTHING
    assert plan.hear(Event.DIED, now + WINDOW_S).act is Act.REPAIR
    plan.hear(Event.REPAIRED, now + WINDOW_S)
    busy = Supervision(0.0)
    for _ in range(MOST_REPAIRS):
        busy.hear(Event.DIED, 1.0)
        busy.hear(Event.REPAIRED, 1.0)
    assert busy.hear(Event.DIED, 2.0, "killed").act is Act.GIVE_UP


_STEP = st.tuples(st.sampled_from(list(Event)), st.floats(0, 60))


@given(st.lists(_STEP, max_size=200))
def test_whatever_happens(steps: list[tuple[Event, float]]) -> None:
    plan, now = Supervision(0.0), 0.0
    repairing, over, since_sound, recovering = False, None, 0.0, None
    failures, failed_repairs = 0, 0
    repairs: list[float] = []
    for event, pause in steps:
        now += pause
        action = plan.hear(event, now, "why")
        if over is not None:
            assert action == over, "once it is over, it is over"
            continue
        if event is Event.ASKED_TO_STOP:
            assert action.act is Act.STOP
        elif repairing:
            assert (action == NOTHING) == (event is not Event.NOT_REPAIRED), "what is heard of the old server is stale"
        else:
            failures = 0 if event is Event.ANSWERED else failures + (event is Event.FAILED)
            if event in (Event.ANSWERED, Event.MOVING):
                since_sound, recovering = now, None
            if event is Event.RECOVERING:
                recovering = now if recovering is None else recovering
                since_sound = now if now - recovering < RECOVERING_S else since_sound
            still = event in (Event.BUSY, Event.RECOVERING) and now - since_sound >= STANDSTILL_S
            wrong = event in (Event.DIED, Event.WRONG) or failures >= FAILURES_BEFORE_REPAIR or still
            assert (action.act in (Act.REPAIR, Act.GIVE_UP)) == wrong
        if repairing and event is Event.REPAIRED:
            repairing, failures, failed_repairs, since_sound, recovering = False, 0, 0, now, None
        if repairing and event is Event.NOT_REPAIRED:
            failed_repairs += 1
        if action.act is Act.REPAIR:
            repairing = True
            repairs.append(now)
            assert (action.pause_s > 0) == (failed_repairs > 0)
        elif action.act is not Act.NOTHING:
            over = action
        assert failed_repairs <= MOST_FAILED_REPAIRS
        assert sum(now - when < WINDOW_S for when in repairs) <= MOST_REPAIRS
    assert plan.repairs == len(repairs)


GENERATOR = """# TYPE nv_inference_request_success counter
nv_inference_request_success{model="lm",version="1"} 7
trireme_generation_executor_seconds_total{model="lm",version="1"} 2.5
trireme_generation_executor_seconds_total{model="lm",version="2"} 0.25
trireme_generation_executor_seconds_total{model="other",version="1"} 100
"""
ENCODER = """nv_inference_request_success{model="minilm-tokenizer",version="1"} 90
nv_inference_request_success{model="minilm-encoder",version="1"} 40
nv_inference_request_success{model="minilm",version="1"} 40
"""


@pytest.mark.parametrize(
    ("page", "model", "done"),
    [(GENERATOR, "lm", 2.75), (ENCODER, "minilm", 40), (ENCODER, "lm", None), ("", "lm", None)],
)
def test_work_is_read_from_the_page(page: str, model: str, done: float | None) -> None:
    assert work_done(page, model) == done


@pytest.fixture
def page() -> Iterator[tuple[str, list[str]]]:
    """An address that answers with the last text of the list."""
    texts = [GENERATOR]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(texts[-1].encode())

        def log_message(self, format: str, *arguments: object) -> None:
            """Not of interest."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}", texts
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_progress_is_a_change_since_the_last_look(page: tuple[str, list[str]]) -> None:
    address, texts = page
    progress = ServerProgress(address, "lm")
    assert not progress.look().moved, "nothing to compare with"
    assert not progress.look().moved
    texts.append(GENERATOR.replace("2.5", "2.75"))
    assert progress.look().moved
    assert not progress.look().moved
    assert not progress.look().recovering
    texts.append(f'{texts[-1]}trireme_generation_recovering{{model="lm",version="1"}} 1\n')
    assert progress.look() == (False, True)
    texts.append("a page of somebody else")
    assert not progress.look().moved
    assert not ServerProgress("127.0.0.1:9", "lm").look().moved


def _process(proc: Path, number: int, parent: int, state: str) -> None:
    (proc / str(number)).mkdir(parents=True, exist_ok=True)
    (proc / str(number) / "stat").write_text(f"{number} (a (strange) name) {state} {parent} 1 1\n")


def test_a_stub_died_when_it_stays_a_zombie(tmp_path: Path) -> None:
    now = [0.0]
    tasks = tmp_path / "10" / "task"
    for task, children in (("10", "20 21 "), ("11", "")):
        (tasks / task).mkdir(parents=True)
        (tasks / task / "children").write_text(children)
    _process(tmp_path, 20, 10, "S")
    _process(tmp_path, 21, 10, "S")
    stubs = Stubs(10, tmp_path, lambda: now[0])
    assert stubs.dead() is None, "nothing is known yet"
    stubs.learn()
    assert stubs.dead() is None
    _process(tmp_path, 20, 10, "Z")
    assert stubs.dead() is None, "the server may be about to wait for it"
    _process(tmp_path, 20, 99, "S")  # it did, and the number is another process's
    now[0] = 1.0
    assert stubs.dead() is None
    _process(tmp_path, 21, 10, "Z")
    assert stubs.dead() is None
    now[0] = 2.0
    assert stubs.dead(LOADING_SETTLED_S) is None, "while models come and go, it may be slow to wait for it"
    assert stubs.dead() == 21
    now[0] = 4.1
    assert stubs.dead(LOADING_SETTLED_S) == 21


def test_a_stub_that_is_killed_is_seen_in_the_real_proc() -> None:
    """A parent with two children: one that it waits for, one that it does not."""
    code = (
        "import subprocess, sys\n"
        "children = [subprocess.Popen(['/bin/sleep', '600']) for _ in range(2)]\n"
        "print(*(child.pid for child in children), flush=True)\n"
        "children[0].wait(); print('waited', flush=True); sys.stdin.read(); children[1].kill()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    first, second = parent.stdout.readline().split()
    stubs = Stubs(parent.pid)
    stubs.learn()
    os.kill(int(first), signal.SIGKILL)
    assert parent.stdout.readline() == "waited\n"
    assert stubs.dead() is None
    os.kill(int(second), signal.SIGKILL)
    assert wait_until(lambda: stubs.dead() == int(second), 10)
    parent.communicate("", timeout=10)


@pytest.mark.parametrize(
    ("said", "groups"),
    [("", set()), ("+12\n", {12}), ("+12\n-12\n+13\n", {13}), ("+12\n-12\n", set()), ("+12\n+13\n", {12, 13})],
)
def test_the_guardian_ends_what_was_not_seen_to_end(said: str, groups: set[int]) -> None:
    assert left(said) == groups
