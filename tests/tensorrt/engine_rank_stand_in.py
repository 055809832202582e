"""`runtime.tensorrt.rank_worker` without GPUs: ranks' programs for engines, gloo for NCCL. Takes the same arguments.

An "engine" is the `ranks.json` of the partition; its pieces and collectives are what TensorRT would have compiled.
"""

# ruff: noqa: N802 - functions have the names of what they stand in for

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from ctypes import CFUNCTYPE, c_char_p, c_int
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from builders.artifacts import TensorSpec
from builders.graph import describe
from runtime.ranks.program import RankProgram, RunGraph
from runtime.ranks.stored import load_programs
from runtime.ranks.worker import _open, die_with_parent, serve
from runtime.tensorrt import nccl
from runtime.tensorrt.rank_worker import EngineWorker, Libraries
from tests.tensorrt.cuda_stand_in import StandIn
from tests.tensorrt.tensorrt_stand_in import MODULES, Arrays, StandInEngine, Tensor


class RankModel:
    """One rank's pieces, with collectives over the group of the communicator that the context was given."""

    def __init__(self, program: RankProgram, graph: Path, groups: dict[int, Any]) -> None:
        """`graph` is the rank's whole graph: its pieces do not tell shapes."""
        self._program, self._groups = program, groups
        pieces = {at: step for at, step in enumerate(program.steps) if isinstance(step, RunGraph)}
        self._sessions = {at: _open(step, program) for at, step in pieces.items()}
        given, made, _ = describe(graph)
        self.inputs = {item.name: _tensor(item) for item in given}
        self.outputs = {item.name: _tensor(item) for item in made}

    def run(self, feeds: Arrays, communicator: Any) -> Arrays:
        values = dict(feeds)
        for index, step in enumerate(self._program.steps):
            if isinstance(step, RunGraph):
                found = self._sessions[index].run(list(step.outputs), {name: values[name] for name in step.inputs})
                values.update(zip(step.outputs, found, strict=True))
                continue
            group, array = self._groups[_handle(communicator)], torch.from_numpy(np.array(values[step.source]))
            if step.operation == "all_gather":
                parts = [torch.empty_like(array) for _ in range(step.ranks)]
                dist.all_gather(parts, array, group=group)
                array = torch.cat(parts)
            else:
                assert step.operation == "all_reduce", step.operation
                dist.all_reduce(array, group=group)
            values[step.target] = array.numpy()
        return {name: values[name] for name in self.outputs}


class StandInNccl:
    """Sends and receives are collected until the group ends, as NCCL does."""

    def __init__(self, rank: int, cuda: StandIn) -> None:
        self.groups: dict[int, Any] = {}
        self._rank, self._cuda, self._moves = rank, cuda, []
        named = {name: CFUNCTYPE(c_int, *types)(getattr(self, f"_{name}")) for name, types in nccl.SIGNATURES.items()}
        self.library = SimpleNamespace(**named, ncclGetErrorString=lambda status: b"a fault")

    def _ncclGetUniqueId(self, identity: Any) -> int:
        identity.contents.internal[0] = 1 + self._rank
        return 0

    def _ncclCommInitRank(self, handle: Any, ranks: int, identity: nccl.UniqueId, place: int) -> int:
        world = dist.get_world_size()
        named: list[Any] = [None] * world
        dist.all_gather_object(named, identity.internal[0])
        first = self._rank - place
        if set(named[first : first + ranks]) != {1 + first}:  # the id of the group's first rank, on all of them
            return 5
        groups = [dist.new_group(list(range(at, at + ranks))) for at in range(0, world, ranks)]
        handle[0] = len(self.groups) + 1
        self.groups[handle[0]] = groups[first // ranks]
        return 0

    def _ncclSend(self, address: int, count: int, kind: int, peer: int, handle: int, stream: int) -> int:
        self._moves.append((dist.isend, address, count, peer))
        return 0

    def _ncclRecv(self, address: int, count: int, kind: int, peer: int, handle: int, stream: int) -> int:
        self._moves.append((dist.irecv, address, count, peer))
        return 0

    def _ncclGroupStart(self) -> int:
        return 0

    def _ncclGroupEnd(self) -> int:
        moves, self._moves = self._moves, []

        def work() -> None:
            waiting = [
                move(torch.from_numpy(self._cuda.array(address, (count,), np.uint8)), peer)
                for move, address, count, peer in moves
            ]
            for item in waiting:
                item.wait()

        self._cuda.submit(work)
        return 0


def _tensor(item: TensorSpec) -> Tensor:
    return Tensor(tuple(dim if isinstance(dim, int) else -1 for dim in item.dims), np.dtype(item.dtype))


def _handle(capsule: Any) -> int:
    read: Callable[..., Any] = ctypes.pythonapi.PyCapsule_GetPointer
    read.restype, read.argtypes = ctypes.c_void_p, (ctypes.py_object, c_char_p)  # type: ignore[attr-defined]
    return int(read(capsule, b"ncclComm_t"))


def main() -> None:
    rank, ranks, meeting, descriptor, parent = sys.argv[1:6]
    die_with_parent(int(parent))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=int(rank), world_size=int(ranks))
    cuda = StandIn(eager=True)  # a peer may wait for what is on the stream
    communication = StandInNccl(int(rank), cuda)

    def engines(files: Sequence[Path], flavour: str) -> tuple[Any, list[Any]]:
        stored = load_programs(files[0])
        stage, place = divmod(int(rank), stored.layout.tensor)
        graph = files[0].parent / f"stage{stage}.rank{place}.onnx"
        model = RankModel(stored.programs[int(rank)], graph, communication.groups)
        capacities = [int(file.parent.name) for file in files]
        return MODULES[flavour], [StandInEngine(model, cuda, capacity) for capacity in capacities]

    libraries = Libraries(
        cuda=lambda: cuda.library, nccl=lambda: communication.library, engines=engines, pin=lambda device: None
    )
    serve(EngineWorker(int(rank), libraries), Connection(int(descriptor)))
    os._exit(0)


if __name__ == "__main__":
    main()
