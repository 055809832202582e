"""Generation on rank processes: the tokens of one process, and what the death of a rank does."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from builders.partition.cut.shard import partition_graph
from builders.partition.prove.verify import rank_programs
from runtime.errors import Unavailable
from runtime.generation.engine import generate
from runtime.generation.executor.rank_processes import RankStepExecutor
from runtime.generation.request import SamplingParams
from runtime.ranks.program import RankGrid
from runtime.ranks.stored import StoredPrograms, save_programs
from runtime.rows import CacheShape
from tests.generation.setup import VOCABULARY, engine_over, prompts, real_engine

pytest_plugins = ("tests.generation.fixtures",)

CAPACITIES = (16, 32, 64)
GREEDY = SamplingParams(max_tokens=12)


def _ranks(graph: Path, folder: Path, tensor: int, pipeline: int, slots: int = 4) -> RankStepExecutor:
    partition = partition_graph(graph, tensor, pipeline, folder / "parts")
    outputs = tuple(port.name for port in partition.outputs)
    programs = StoredPrograms(RankGrid(tensor, pipeline), outputs, tuple(rank_programs(partition)))
    manifest = save_programs(programs, partition.directory)[-1]
    shape = CacheShape(heads=2 // tensor, head_dim=8, dtype="float32")
    return RankStepExecutor(manifest, CAPACITIES, slots + 2, shape=shape, vocabulary=VOCABULARY, threads=1)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_ranks_give_the_tokens_of_one_process(decoder_graph: Path, tmp_path: Path, tensor: int, pipeline: int) -> None:
    asked = prompts(8)
    alone = generate(real_engine(decoder_graph, CAPACITIES, 4), asked, GREEDY)
    executor = _ranks(decoder_graph, tmp_path, tensor, pipeline)
    try:
        engine = engine_over(executor, CAPACITIES, 4, call_cost=8)
        assert generate(engine, asked, GREEDY) == alone
        assert engine.scheduler.cache.kept  # rows were reused and moved on the ranks, too
    finally:
        executor.close()


def test_a_dead_rank_ends_what_runs_and_the_next_request_succeeds(decoder_graph: Path, tmp_path: Path) -> None:
    asked = prompts(3)
    alone = generate(real_engine(decoder_graph, CAPACITIES, 4), asked, GREEDY)
    executor = _ranks(decoder_graph, tmp_path, 1, 2, slots=2)
    try:
        engine = engine_over(executor, CAPACITIES, 2)
        running = [engine.submit(prompt, SamplingParams(max_tokens=30)) for prompt in asked[:2]]
        engine.step()
        waiting = engine.submit(asked[2], GREEDY)
        before = executor.processes
        os.kill(before[1], signal.SIGKILL)
        updates = []
        while engine.step():
            updates += engine.take_updates()
        failed = {update.request: update.error for update in updates if update.error is not None}
        assert set(failed) == set(running)
        assert all(isinstance(error, Unavailable) for error in failed.values())
        assert [token for update in updates if update.request == waiting for token in update.tokens] == alone[2]
        assert not set(before) & set(executor.processes)
        assert generate(engine, asked[:2], GREEDY) == alone[:2]
    finally:
        executor.close()
    assert np.all([not Path(f"/proc/{pid}").exists() for pid in before])


def test_a_rank_that_stops_ends_what_runs_within_the_limit(decoder_graph: Path, tmp_path: Path) -> None:
    executor = _ranks(decoder_graph, tmp_path, 2, 1, slots=2)
    try:
        engine = engine_over(executor, CAPACITIES, 2)
        running = [engine.submit(prompt, SamplingParams(max_tokens=30)) for prompt in prompts(2)]
        engine.step()
        before = executor.processes
        executor.step_seconds = 1.0
        os.kill(before[1], signal.SIGSTOP)
        engine.step()
        failed = {update.request: str(update.error) for update in engine.take_updates() if update.error is not None}
        assert set(failed) == set(running)
        assert all("within 1 s" in error for error in failed.values())
        assert not set(before) & set(executor.processes)
    finally:
        executor.close()


def test_a_rank_that_dies_while_nobody_asks_costs_no_request(decoder_graph: Path, tmp_path: Path) -> None:
    asked = prompts(2)
    alone = generate(real_engine(decoder_graph, CAPACITIES, 4), asked, GREEDY)
    executor = _ranks(decoder_graph, tmp_path, 1, 2, slots=2)
    engine, stopped = engine_over(executor, CAPACITIES, 2), threading.Event()
    loop = threading.Thread(target=engine.run, args=(stopped,))  # the ranks end with the thread that starts them
    try:
        generate(engine, asked, GREEDY)
        before = executor.processes
        os.kill(before[0], signal.SIGKILL)
        loop.start()  # idle: it looks after its ranks
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (not executor.processes or set(before) & set(executor.processes)):
            time.sleep(0.05)
        assert executor.processes
        assert not set(before) & set(executor.processes)
        order = [engine.submit(prompt, GREEDY) for prompt in asked]
        outputs: dict[int, list[int]] = {request: [] for request in order}
        ended: set[int] = set()
        while time.monotonic() < deadline and len(ended) < len(order):
            for update in engine.take_updates(wait_s=0.1):
                assert update.error is None
                outputs[update.request] += update.tokens
                ended |= {update.request} if update.finish else set()
        assert list(outputs.values()) == alone
    finally:
        stopped.set()
        loop.join(60)
        executor.close()
