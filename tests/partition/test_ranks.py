"""Rank processes end with their owner, with each other, and in bounded time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from runtime.errors import ServerFault
from runtime.ranks.group import RankGroup
from runtime.ranks.program import Communicate, RankGrid, RankProgram, RunGraph, Transfer

PATIENCE_SECONDS = 30.0


@pytest.fixture
def pair() -> Iterator[RankGroup]:
    with RankGroup(2) as group:
        yield group


def doubled() -> RunGraph:
    """y = x + x"""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return RunGraph(onnx.ModelProto.SerializeToString(model), ("x",), ("y",))


def program(step: Communicate, states: tuple[tuple[str, str], ...] = ()) -> RankProgram:
    return RankProgram(folder="", steps=(doubled(), step), inputs=("x",), outputs=("y", "z"), states=states)


def gone(pids: list[int]) -> bool:
    """Whether the kernel has no such processes any more, within the limit."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def alive(pid: int) -> bool:
    """A zombie has ended: its new parent has only not asked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_collectives_states_and_stages(pair: RankGroup) -> None:
    feeds = [{"x": np.float32([rank + 1])} for rank in range(2)]
    pair.load([program(Communicate("all_reduce", "y", "z", 2))] * 2, RankGrid(2, 1))
    assert [result["z"].tolist() for result in pair.run(feeds, ["z"], seconds=20)] == [[6.0], [6.0]]
    pair.load([program(Communicate("all_gather", "y", "z", 2))] * 2, RankGrid(2, 1))
    assert [result["z"].tolist() for result in pair.run(feeds, ["z"], seconds=20)] == [[2.0, 4.0], [2.0, 4.0]]
    kept = [program(Communicate("all_reduce", "y", "z", 2), states=(("z", "x"),))] * 2
    pair.load(kept, RankGrid(2, 1))
    pair.run(feeds, [], seconds=20)
    assert pair.run([{}, {}], ["z"], seconds=20)[0]["z"].tolist() == [24.0]
    first = RankProgram("", (doubled(),), ("x",), ("y",), sent=(Transfer("y", 1),))
    second = RankProgram("", (RunGraph(doubled().model, ("x",), ("y",)),), (), ("y",), received=(Transfer("x", 0),))
    named = RankProgram("", first.steps, ("x",), ("y",), sent=(Transfer("x", 1),))
    pair.load([named, second], RankGrid(1, 2))
    assert pair.run([{"x": np.float32([[1, 2]])}, {}], ["y"], seconds=20)[1]["y"].tolist() == [[2.0, 4.0]]


def test_wrong_number_of_ranks_in_the_graph(pair: RankGroup) -> None:
    pair.load([program(Communicate("all_reduce", "y", "z", 4))] * 2, RankGrid(2, 1))
    pids = pair.processes
    with pytest.raises(ServerFault, match="for 4 ranks, the stage has 2"):
        pair.run([{"x": np.float32([1])}] * 2, ["z"], seconds=20)
    assert gone(pids)
    with pytest.raises(ServerFault, match="has ended"):
        pair.forget()


def test_rank_that_dies_ends_the_group(pair: RankGroup) -> None:
    pair.load([program(Communicate("all_reduce", "y", "z", 2))] * 2, RankGrid(2, 1))
    pids = pair.processes
    os.kill(pids[1], signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(ServerFault, match=r"rank 1 has died|rank 0 failed"):
        pair.run([{"x": np.float32([1])}] * 2, ["z"], seconds=PATIENCE_SECONDS)
    assert time.monotonic() - begun < PATIENCE_SECONDS
    assert gone(pids)


def test_rank_that_hangs_ends_the_group(pair: RankGroup) -> None:
    pair.load([program(Communicate("all_reduce", "y", "z", 2))] * 2, RankGrid(2, 1))
    pids = pair.processes
    os.kill(pids[0], signal.SIGSTOP)
    with pytest.raises(ServerFault, match="no answer from rank 0, 1 within 1 s"):
        pair.run([{"x": np.float32([1])}] * 2, ["z"], seconds=1)
    assert gone(pids)


@pytest.mark.parametrize("kind", ["half", "deaf"])
def test_a_rank_that_stops_in_the_middle_of_a_message_ends_the_group(kind: str) -> None:
    """Of its own, or of one that is sent to it and fits no pipe."""
    with RankGroup(2, worker="tests.ranks.stopping_rank") as group:
        pids = group.processes
        commands = [[("answer", (1,)), (kind, ())], [("answer", (bytes(1 << 24),))] * 2]
        with pytest.raises(ServerFault, match="no answer from rank 1 within 1 s; all 2 ranks were ended"):
            group.call(commands, seconds=1)
        assert gone(pids)


def test_answers_are_those_of_the_call_or_the_group_has_ended() -> None:
    """More at once than pipes hold, in both directions; and a call that fails leaves no answers for the next."""
    with RankGroup(2, worker="tests.ranks.stopping_rank") as group:
        big = [[("answer", (number, bytes(3 << 20)))] * 2 for number in range(4)]
        answers = group.call(big, seconds=PATIENCE_SECONDS)
        assert [[answer[0] for answer in row] for row in answers] == [[number] * 2 for number in range(4)]
        assert group.call_one(1, ("answer", (7,)), seconds=PATIENCE_SECONDS) == (7,)
        pids = group.processes
        with pytest.raises(ServerFault, match="rank 1 sent what is no answer"):
            group.call([[("answer", ()), ("no answer", ())], [("answer", ())] * 2], seconds=PATIENCE_SECONDS)
        assert gone(pids)
        with pytest.raises(ServerFault, match="has ended"):
            group.call([[("answer", ())] * 2], seconds=1)


def test_owner_that_is_killed_leaves_no_orphan() -> None:
    start = "from runtime.ranks.group import RankGroup; import time; group = RankGroup(2)"
    script = f"{start}; print(*group.processes, flush=True); time.sleep(600)"
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert len(pids) == 2
    assert gone(pids)


def test_temporary_files_go(pair: RankGroup) -> None:
    folder = pair._folder
    assert folder.is_dir()
    pair.close()
    pair.close()
    assert not folder.exists()
