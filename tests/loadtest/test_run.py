"""Plans, schedules, what is read from a server, and bad input: everything that needs no Triton."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from loadtest.drive.run import _generator, _progress_of, run_load
from loadtest.drive.stopping import Stop
from loadtest.errors import LoadInputError, LoadRunError
from loadtest.plan import LoadPlan, RunProgress, check_plan
from loadtest.requests.connection import kind_of_status
from loadtest.requests.interface import Interface, RequestError, interface_from_metadata
from loadtest.requests.texts import dice_of_user, read_texts
from loadtest.seen.counters import statistics_between
from loadtest.seen.server import identity_from_metrics, listening_process
from loadtest.shapes import Schedule


def _plan(**changes: object) -> LoadPlan:
    return LoadPlan.model_validate({"model": "m", "texts_file": "texts.txt", **changes})


def test_importing_is_cheap() -> None:
    heavy = "{'locust', 'gevent', 'matplotlib', 'jinja2', 'grpc', 'tritonclient', 'numpy', 'psutil'}"
    code = f"import sys, loadtest.drive.run, loadtest.report.record; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


@given(
    st.builds(
        Schedule,
        shape=st.sampled_from(["constant", "steps"]),
        users=st.integers(1, 500),
        warm_up_s=st.integers(0, 60),
        duration_s=st.integers(1, 7200),
        steps=st.integers(2, 50),
    )
)
def test_schedule_rises_to_all_users_and_ends(schedule: Schedule) -> None:
    seen = [schedule.users_at(second) for second in range(schedule.end_s)]
    assert seen == sorted(seen)
    assert 1 <= seen[0] <= schedule.users
    assert seen[-1] == schedule.users
    assert schedule.users_at(schedule.end_s) == 0
    assert schedule.plateaux[-1] == schedule.users
    # a window that begins on the next whole interval still ends under full load
    assert schedule.end_s > schedule.warm_up_s + schedule.duration_s


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"shape": "steps", "steps": 5, "duration_s": 20}, "duration_s=25"),
        ({"shape": "steps", "steps": 9, "users": 8, "duration_s": 90}, "more users"),
        ({"protocol": "both", "users": 1}, "more users"),
        ({"processes": 3, "users": 2}, "more users"),
    ],
)
def test_plan_that_cannot_work_is_refused(changes: dict[str, object], fix: str) -> None:
    with pytest.raises(LoadInputError) as caught:
        check_plan(_plan(**changes))
    assert fix in caught.value.fix


@pytest.mark.parametrize("changes", [{"userz": 1}, {"users": 0}, {"grpc_address": "http://x:1/"}, {"model": ""}])
def test_plan_is_typed_and_closed(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        _plan(**changes)


@pytest.mark.parametrize(
    ("content", "got"),
    [(None, "No such file"), (b"", "no text"), (b" \n\r\n\n", "no text"), (b"\xff\xfe", "not UTF-8")],
)
def test_bad_texts_are_input_errors(tmp_path: Path, content: bytes | None, got: str) -> None:
    file = tmp_path / "texts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(LoadInputError) as caught:
        run_load(_plan(texts_file=file))
    assert got in str(caught.value.got)


def test_texts_are_lines_without_the_blank_ones(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes("\ufeffone\r\n\n  two\u2028words \x0c here\n".encode())
    assert read_texts(file) == ("one", "two\u2028words \x0c here")


def test_users_draw_different_texts_and_a_run_can_be_repeated() -> None:
    def draws(seed: int, worker: int, user: int) -> list[int]:
        dice = dice_of_user(seed, worker, user)
        return [dice.randrange(1000) for _ in range(20)]

    streams = [draws(seed, worker, user) for seed in range(3) for worker in range(3) for user in range(10)]
    assert len({tuple(stream) for stream in streams}) == len(streams)
    assert draws(1, 2, 3) == draws(1, 2, 3)


def _metadata(**changes: object) -> dict[str, object]:
    text = {"name": "text", "datatype": "BYTES", "shape": ["-1", "1"]}
    outputs = [
        {"name": "embedding", "datatype": "FP32", "shape": ["-1", "8"]},
        {"name": "token_count", "datatype": "INT32", "shape": ["-1", "1"]},
        {"name": "truncated", "datatype": "BOOL", "shape": ["-1", "1"]},
    ]
    return {"name": "m", "inputs": [text], "outputs": outputs, **changes}


def test_interface_comes_from_the_metadata() -> None:
    pair = {"name": "text_pair", "datatype": "BYTES", "shape": [-1, 1]}
    text = {"name": "text", "datatype": "BYTES", "shape": [-1, 1]}
    logits = {"name": "logits", "datatype": "FP32", "shape": [-1, -1]}
    assert interface_from_metadata(_metadata()) == Interface(("text",), "embedding", 8, ("token_count", "truncated"))
    assert interface_from_metadata(_metadata(inputs=[text, pair], outputs=[logits])) == Interface(
        ("text", "text_pair"), "logits", None, ()
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": []},
        {"inputs": [{"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]}]},
        {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}]},
        {"outputs": [{"name": "text", "datatype": "BYTES", "shape": [-1, 1]}]},
        {"outputs": [{"name": name, "datatype": "FP32", "shape": [-1, 8]} for name in "ab"]},
    ],
)
def test_model_of_another_kind_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(LoadInputError, match="load-test the ensemble"):
        interface_from_metadata(_metadata(**changes))


def test_answer_is_good_only_when_shape_and_values_are() -> None:
    interface = interface_from_metadata(_metadata())
    good = {"embedding": np.ones((2, 8)), "token_count": np.array([[3], [4]]), "truncated": np.array([[True], [False]])}
    answer = interface.check(2, good)
    assert (answer.tokens, answer.truncated) == (7, 1)
    for name, bad in (
        ("embedding", None),
        ("embedding", np.ones((2, 7))),
        ("embedding", np.ones((1, 8))),
        ("embedding", np.full((2, 8), np.inf)),
        ("embedding", np.full((2, 8), np.nan)),
        ("token_count", None),
        ("truncated", np.ones((2, 2))),
    ):
        with pytest.raises(RequestError) as caught:
            interface.check(2, {**good, name: bad})
        assert caught.value.kind == "BAD_OUTPUT"
        assert name in caught.value.message
    with pytest.raises(RequestError):  # a width that the model does not state may still not be zero
        Interface(("text",), "logits", None, ()).check(2, {"logits": np.ones((2, 0))})


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("StatusCode.UNAVAILABLE", "UNAVAILABLE"),
        ("StatusCode.DEADLINE_EXCEEDED", "TIMEOUT"),
        ("503", "UNAVAILABLE"),
        ("400", "INVALID_ARGUMENT"),
        ("418", "UNKNOWN"),
        (None, "CLIENT_ERROR"),
    ],
)
def test_both_protocols_share_the_kinds_of_errors(status: str | None, kind: str) -> None:
    assert kind_of_status(status) == kind


def test_weights_are_read_from_the_metrics() -> None:
    text = "\n".join(
        [
            "# HELP trireme_model_info what is served",
            'trireme_model_info{model="m",version="9",precision="fp32",digest="old",spec_digest="s"} 1',
            'trireme_model_info{digest="a\\"b\\\\c}",version="10",precision="int8",model="m",spec_digest="s"} 1.000000',
            'trireme_model_info{model="m",version="11",precision="fp32",digest="gone",spec_digest="s"} 0',
            'trireme_model_info{model="other",version="12",precision="fp32",digest="x",spec_digest="s"} 1',
        ]
    )
    identity = identity_from_metrics(text, "m")
    assert identity is not None
    assert (identity.version, identity.precision, identity.digest) == ("10", "int8", 'a"b\\c}')
    assert identity_from_metrics(text, "absent") is None
    assert identity_from_metrics("nv_cpu_utilization 0.1", "m") is None


def test_reloaded_model_counts_from_zero() -> None:
    def counters(count: int) -> dict[tuple[str, str], dict[str, object]]:
        return {("m", "1"): {"inference_stats": {"success": {"count": count, "ns": count * 1_000_000}}}}

    assert statistics_between(counters(9), counters(4))[0].requests == 4
    assert statistics_between(counters(4), counters(9))[0].requests == 5
    assert statistics_between(counters(4), counters(4)) == ()


def test_server_elsewhere_has_no_process_here() -> None:
    assert listening_process("triton.example:8001") is None


def _run(code: str, folder: Path, plan: LoadPlan) -> list[RunProgress]:
    with _generator([sys.executable, "-c", code], folder / "log") as process:
        seen = list(_progress_of(process, plan, Stop()))
    assert process.poll() is not None
    return seen


def test_progress_is_read_among_other_lines(tmp_path: Path) -> None:
    line = 'trireme-progress {"elapsed_s": 1.5, "users": 2, "answered": 3, "errors": 0}'
    (progress,) = _run(f"print('noise'); print('''{line}''')", tmp_path, _plan(warm_up_s=0, duration_s=2))
    assert (progress.elapsed_s, progress.end_s, progress.users, progress.answered) == (1.5, 4, 2, 3)


def test_generator_that_hangs_is_stopped(tmp_path: Path) -> None:
    class Hasty(LoadPlan):
        @property
        def limit_s(self) -> float:
            return 0.2

    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    with pytest.raises(LoadRunError, match="did not end within"):
        _run(stubborn, tmp_path, Hasty(model="m", texts_file=Path("t")))
