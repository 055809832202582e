"""One rank on a GPU: `python -m runtime.tensorrt.rank_worker RANK RANKS MEETING FD PARENT`. **Not run on GPUs yet.**

Commands are those of `worker`: (name, arguments) on a socket. Ranks meet through NCCL alone; the one who starts them
passes its ids on, so MEETING is not used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.ranks.program import EngineProgram, PassedValue, RankGrid
from runtime.ranks.worker import die_with_parent, serve
from runtime.step import Batch, Copy, Logits
from runtime.tensorrt.cuda import Cuda, load_runtime, pin_device
from runtime.tensorrt.engine import Port
from runtime.tensorrt.executor import Flavour, load_engines
from runtime.tensorrt.nccl import Communicator, Move, load_nccl, unique_id
from runtime.tensorrt.steps import DeviceSteps, at


@dataclass(frozen=True)
class Libraries:
    """What a rank stands on."""

    cuda: Callable[[], Any] = load_runtime
    nccl: Callable[[], Any] = load_nccl
    engines: Callable[[Sequence[Path], Flavour], tuple[Any, list[Any]]] = load_engines
    pin: Callable[[int], None] = pin_device


class EngineWorker:
    """Runs one rank's engines. Everything it holds goes with the process."""

    def __init__(self, rank: int, libraries: Libraries) -> None:
        self._rank, self._libraries = rank, libraries
        self._nccl: Any = None
        self._world: Communicator | None = None

    def identify(self, layout: RankGrid, device: int) -> tuple[bytes, bytes]:
        """Ids for the communicator of all ranks and for that of the stage; empty where another rank makes them.

        `device` is the GPU's number on this machine.
        """
        self._libraries.pin(device)
        if layout.ranks > 1:
            self._nccl = self._libraries.nccl()
        first = self._rank % layout.tensor == 0
        return (
            unique_id(self._nccl) if self._rank == 0 and layout.pipeline > 1 else b"",
            unique_id(self._nccl) if first and layout.tensor > 1 else b"",
        )

    def load(self, program: EngineProgram) -> int:
        """Bytes of one position of a sequence in the caches of this rank. All ranks at the same time."""
        layout = program.layout
        self._cuda = Cuda(self._libraries.cuda())
        place = self._rank % layout.tensor
        group = Communicator(self._nccl, program.group, layout.tensor, place) if layout.tensor > 1 else None
        if layout.pipeline > 1:
            self._world = Communicator(self._nccl, program.world, layout.ranks, self._rank)
        trt, engines = self._libraries.engines(program.files, program.flavour)
        self._program = program
        self._steps = DeviceSteps(
            trt,
            self._cuda,
            engines,
            program.capacities,
            program.rows,
            received=[_port(item) for item in program.received],
            sent=[_port(item) for item in program.sent],
            communicator=None if group is None else group.capsule,
        )
        self._answers = bool(self._steps.vocabulary) and place == 0
        return self._steps.pools[0].position_bytes

    def run_batch(self, batch: Batch) -> NDArray[np.float32] | None:
        """The rows' largest logits and their tokens, [rows, 2], from the first rank of the last stage.

        The others return as soon as everything is on the stream, so that stages work on different batches.
        """
        self._steps.stage(batch)
        if self._world is not None and self._program.received:
            self._world.receive(self._moves(self._program.received, batch), self._cuda.stream)
        self._steps.compute(batch)
        if self._world is not None and self._program.sent:
            self._world.send(self._moves(self._program.sent, batch), self._cuda.stream)
        if not self._answers:
            return None
        self._steps.bring_top(batch)
        self._steps.wait()
        return self._steps.top(batch)

    def fetch(self, pool: int, first: int, rows: Sequence[int]) -> Logits:
        return self._steps.fetch(pool, first, rows)

    def copy_rows(self, copies: Sequence[Copy]) -> None:
        self._steps.copy(copies)

    def _moves(self, passed: Sequence[PassedValue], batch: Batch) -> list[Move]:
        tensor, capacity = self._program.layout.tensor, self._program.capacities[batch.pool]
        return [
            Move(
                self._steps.address(item.name),
                _port(item).nbytes(at(batch), capacity),
                item.stage * tensor + self._rank % tensor,
            )
            for item in passed
        ]


def _port(item: PassedValue) -> Port:
    return Port(item.name, item.dims, item.itemsize)


def main() -> None:
    rank, _, _, descriptor, parent = sys.argv[1:6]
    die_with_parent(int(parent))
    serve(EngineWorker(int(rank), Libraries()), Connection(int(descriptor)))
    os._exit(0)  # NCCL's threads may wait for ranks that have gone already


if __name__ == "__main__":
    main()
