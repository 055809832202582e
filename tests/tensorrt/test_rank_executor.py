"""Generation on GPU ranks: real processes and the real driver, with stand-ins for CUDA, TensorRT and NCCL."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from builders.partition.cut.shard import partition_graph
from builders.partition.prove.verify import rank_programs
from runtime.errors import BadEnvironment, ServerFault, Unavailable
from runtime.generation.engine import generate
from runtime.generation.request import SamplingParams
from runtime.ranks.program import RankGrid
from runtime.ranks.stored import MANIFEST, StoredPrograms, save_programs
from runtime.step import Batch
from runtime.tensorrt import rank_executor
from runtime.tensorrt.rank_executor import TensorRtRankExecutor
from runtime.tensorrt.rank_manifest import EngineManifest, Passed, RankEngines
from tests.generation.setup import VOCABULARY, engine_over, prompts, real_engine
from tests.partition.exported import decoder

CAPACITIES = (16, 32, 64)
GREEDY = SamplingParams(max_tokens=12)
WORKER = "tests.tensorrt.engine_rank_stand_in"


def _manifest(graph: Path, folder: Path, tensor: int, pipeline: int, flavour: str = "tensorrt") -> Path:
    """The manifest of a partition whose "engines" are its ranks' programs, in a folder for each capacity."""
    partition = partition_graph(graph, tensor, pipeline, folder / "parts")
    programs = rank_programs(partition)
    stored = StoredPrograms(RankGrid(tensor, pipeline), ("logits",), tuple(programs))
    save_programs(stored, partition.directory)
    for capacity in CAPACITIES:
        (folder / str(capacity)).symlink_to(partition.directory)
    ranks = [
        RankEngines(
            received=tuple(_passed(transfer.value, transfer.stage) for transfer in program.received),
            sent=tuple(_passed(transfer.value, transfer.stage) for transfer in program.sent),
            files={f"sm90.{capacity}": f"{capacity}/{MANIFEST}" for capacity in CAPACITIES},
        )
        for program in programs
    ]
    manifest = EngineManifest(
        flavour=flavour, tensor=tensor, pipeline=pipeline, vocabulary=VOCABULARY, ranks=tuple(ranks)
    )
    return manifest.save(folder)


def _passed(name: str, stage: int) -> Passed:
    return Passed(name=name, stage=stage, dims=("batch", "length", 32), itemsize=4)  # hidden states, fp32


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, so that both stages have caches."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("decoder") / "graph.onnx"
    return decoder("llama", file, vocab_size=VOCABULARY, num_hidden_layers=4)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_executor, "visible_targets", lambda: ["sm90"] * 4)


@pytest.mark.usefixtures("gpus")
def test_ranks_give_the_tokens_of_one_process(graph: Path, tmp_path: Path) -> None:
    """Two stages of two ranks: collectives within, hidden states between."""
    asked = prompts(8)
    drawn = SamplingParams(max_tokens=6, temperature=0.8, top_p=0.9, seed=3, logprobs=True)
    alone = real_engine(graph, CAPACITIES, 4)
    executor = TensorRtRankExecutor(_manifest(graph, tmp_path, 2, 2), CAPACITIES, 6, worker=WORKER)
    try:
        engine = engine_over(executor, CAPACITIES, 4, call_cost=8)
        assert generate(engine, asked, GREEDY) == generate(alone, asked, GREEDY)
        assert generate(engine, asked, drawn) == generate(alone, asked, drawn)
        assert executor.stages == 2
        assert executor.call_cost > 0
        stale = executor.run([Batch(0, 0, np.ones((1, 2), np.int64), np.zeros(1, np.int64))])[0]
        executor.run([])
        with pytest.raises(RuntimeError, match="until the next run"):
            stale[[0]]
    finally:
        executor.close()


@pytest.mark.usefixtures("gpus")
def test_a_dead_rank_ends_what_runs_and_the_next_request_succeeds(graph: Path, tmp_path: Path) -> None:
    asked = prompts(3)
    alone = generate(real_engine(graph, CAPACITIES, 4), asked, GREEDY)
    executor = TensorRtRankExecutor(_manifest(graph, tmp_path, 1, 2), CAPACITIES, 6, worker=WORKER)
    try:
        engine = engine_over(executor, CAPACITIES, 2)
        running = [engine.submit(prompt, SamplingParams(max_tokens=30)) for prompt in asked[:2]]
        engine.step()
        before = executor.processes
        assert not executor.lost()
        os.kill(before[0], signal.SIGKILL)
        updates = []
        while engine.step():
            updates += engine.take_updates()
        failed = {update.request: update.error for update in updates if update.error is not None}
        assert set(failed) == set(running)
        assert all(isinstance(error, Unavailable) for error in failed.values())
        assert not set(before) & set(executor.processes)
        assert generate(engine, asked, GREEDY) == alone
    finally:
        executor.close()
    with pytest.raises(ServerFault, match="did not start again"):
        executor.run([])


@pytest.mark.usefixtures("gpus")
def test_a_rank_that_stops_ends_what_runs_within_the_limit(graph: Path, tmp_path: Path) -> None:
    """In a step as in a look at its logits."""
    executor = TensorRtRankExecutor(_manifest(graph, tmp_path, 1, 2), CAPACITIES, 6, worker=WORKER, step_seconds=20.0)
    try:
        engine = engine_over(executor, CAPACITIES, 2)
        looking = SamplingParams(max_tokens=30, logprobs=True)
        running = [engine.submit(prompt, looking) for prompt in prompts(2)]
        engine.step()
        executor.step_seconds = 1.0
        os.kill(executor.processes[1], signal.SIGSTOP)
        engine.step()
        failed = {update.request: update.error for update in engine.take_updates() if update.error is not None}
        assert set(failed) == set(running)
        assert all("within 1 s" in str(error) for error in failed.values())
        executor.step_seconds = 20.0
        [logits] = executor.run([Batch(0, 0, np.ones((1, 2), np.int64), np.zeros(1, np.int64))])
        executor.step_seconds = 1.0
        os.kill(executor.processes[1], signal.SIGSTOP)
        with pytest.raises(ServerFault, match="no answer from rank 1 within 1 s"):
            logits[[0]]
        assert executor.lost()
    finally:
        executor.close()


@pytest.mark.usefixtures("gpus")
def test_a_group_that_ended_itself_is_lost_until_the_reset(graph: Path, tmp_path: Path) -> None:
    step = [Batch(0, 0, np.ones((1, 2), np.int64), np.zeros(1, np.int64))]
    executor = TensorRtRankExecutor(_manifest(graph, tmp_path, 1, 2), CAPACITIES, 6, worker=WORKER)
    try:
        os.kill(executor.processes[0], signal.SIGKILL)
        with pytest.raises(ServerFault, match="all 2 ranks were ended"):
            executor.run(step)
        assert executor.lost()
        executor.reset()
        assert not executor.lost()
        assert len(executor.run(step)[0]) == 1
    finally:
        executor.close()


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("device", "flavour", "capacities", "said"),
    [
        (3, "tensorrt", CAPACITIES, r"2 x 1 ranks need 2 GPUs on this host; it shows 1 from number 3 on"),
        (0, "tensorrt-rtx", CAPACITIES, r"2 tensor ranks on TensorRT for RTX.*set engine\.flavour: tensorrt"),
        (0, "tensorrt", (48,), r"rank 0 is on sm90; no engine for sm90\.48, only for sm90\.16"),
    ],
)
def test_what_does_not_fit_the_machine(
    graph: Path, tmp_path: Path, device: int, flavour: str, capacities: tuple[int, ...], said: str
) -> None:
    manifest = _manifest(graph, tmp_path, 2, 1, flavour)
    with pytest.raises(BadEnvironment, match=said):
        TensorRtRankExecutor(manifest, capacities, 6, device=device, worker=WORKER)


@pytest.mark.usefixtures("gpus")
def test_a_rank_that_cannot_load_is_a_fault_that_says_why(graph: Path, tmp_path: Path) -> None:
    """The real worker, on a machine where NVIDIA's libraries are not."""
    import ctypes

    try:
        ctypes.CDLL("libnccl.so.2")
    except OSError:
        with pytest.raises(ServerFault, match=r"rank \d failed: BadEnvironment: none of libnccl\.so\.2 loads"):
            TensorRtRankExecutor(_manifest(graph, tmp_path, 2, 1), CAPACITIES, 6)
    else:
        pytest.skip("NCCL is here")


@pytest.mark.parametrize(
    "text", ["", "{}", '{"flavour": "tensorrt", "tensor": 2, "pipeline": 1, "vocabulary": 4, "ranks": []}']
)
def test_a_damaged_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "engines.json").write_text(text)
    with pytest.raises(BadEnvironment, match="run `trireme build` again"):
        TensorRtRankExecutor(tmp_path / "engines.json", CAPACITIES, 6)
