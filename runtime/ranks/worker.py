"""One rank: `python -m runtime.ranks.worker RANK RANKS MEETING FD PARENT`.

Commands arrive on a socket as (name, arguments); each is answered with ("done", result) or ("failed", text).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.ranks import wire
from runtime.ranks.program import Communicate, RankGrid, RankProgram, RunGraph
from runtime.rows import CacheShape, Pools
from runtime.session import open_session

if TYPE_CHECKING:
    import onnxruntime

    from runtime.step import Copy

_PR_SET_PDEATHSIG = 1
_TIMEOUT = timedelta(seconds=120)  # of one collective; the group itself gives up far earlier
_DTYPES = ("float32", "float16", "int64", "int32", "bool", "float64", "int8", "uint8")
_HEADER = 10  # dtype, rank, up to eight sizes

Arrays = dict[str, NDArray[Any]]


def die_with_parent(parent: int) -> None:
    """Before anything slow: a group whose owner was killed must not live on."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


class Worker:
    """Runs one rank's program, step by step."""

    def __init__(self, rank: int, ranks: int, meeting: str) -> None:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        self._rank, self._dist = rank, dist
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=_TIMEOUT)
        self._group: Any = None
        self._program: RankProgram | None = None
        self._sessions: dict[int, onnxruntime.InferenceSession] = {}
        self._states: Arrays = {}

    def load(self, program: RankProgram | None, layout: RankGrid) -> None:
        """Every process takes part, idle ones too: groups of ranks are made by all of them together."""
        groups = [self._dist.new_group(list(layout.stage(stage))) for stage in range(layout.pipeline)]
        self._layout, self._program, self._states, self._sessions = layout, program, {}, {}
        if program is None:
            return
        self._stage = self._rank // layout.tensor
        self._group = groups[self._stage]
        for index, step in enumerate(program.steps):
            if isinstance(step, RunGraph):
                self._sessions[index] = _open(step, program)

    def forget(self) -> None:
        """Drops the states: the next step begins new sequences."""
        self._states = {}

    def run(self, feeds: Arrays, fetch: tuple[str, ...]) -> Arrays:
        """One step. `feeds` may leave out states once there are any."""
        program = self._program
        assert program is not None
        values = self._step(program, {**self._states, **feeds}, {})
        self._states = {given: values[made] for made, given in program.states}
        return {name: values[name] for name in fetch if name in program.outputs}

    def reserve(self, shape: CacheShape, capacities: tuple[int, ...], rows: int) -> None:
        """Memory for the states of `rows` sequences in each pool. All states of a program have the same shape."""
        assert self._program is not None
        self._pools = Pools({given: shape for _, given in self._program.states}, capacities, rows)

    def copy_rows(self, copies: list[Copy]) -> None:
        self._pools.copy(copies)

    def run_rows(self, feeds: Arrays, fetch: tuple[str, ...], pool: int, first: int, rows: int) -> Arrays:
        """One step of the sequences in these rows. Their states are changed where they lie."""
        program = self._program
        assert program is not None
        states = self._pools.view(pool, first, rows)
        values = self._step(program, {**states, **feeds}, {made: states[given] for made, given in program.states})
        return {name: values[name] for name in fetch if name in program.outputs}

    def _step(self, program: RankProgram, values: Arrays, places: Arrays) -> Arrays:
        """All values of a step, from those given; what `places` names is written there."""
        for transfer in program.received:
            values[transfer.value] = self._receive(self._peer(transfer.stage))
        for index, step in enumerate(program.steps):
            if isinstance(step, RunGraph):
                values.update(_run(self._sessions[index], step, values, places))
            else:
                values[step.target] = self._communicate(step, values[step.source])
        for transfer in program.sent:
            self._send(values[transfer.value], self._peer(transfer.stage))
        return values

    def _communicate(self, step: Communicate, array: NDArray[Any]) -> NDArray[Any]:
        import torch

        present = self._dist.get_world_size(self._group)
        if step.ranks != present:
            raise ValueError(f"{step.operation} of {step.source} is for {step.ranks} ranks, the stage has {present}")
        tensor = torch.from_numpy(np.array(array, order="C"))  # a copy: the piece may still use its own
        if step.operation == "all_reduce":
            self._dist.all_reduce(tensor, group=self._group)
            return tensor.numpy()
        if step.operation == "all_gather":
            parts = [torch.empty_like(tensor) for _ in range(present)]
            self._dist.all_gather(parts, tensor, group=self._group)
            return torch.cat(parts).numpy()
        raise ValueError(f"unknown collective {step.operation}")

    def _peer(self, stage: int) -> int:
        return stage * self._layout.tensor + self._rank % self._layout.tensor

    def _send(self, array: NDArray[Any], peer: int) -> None:
        import torch

        header = np.zeros(_HEADER, np.int64)
        header[:2] = _DTYPES.index(array.dtype.name), array.ndim
        header[2 : 2 + array.ndim] = array.shape
        self._dist.send(torch.from_numpy(header), peer)
        payload = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8).copy()
        self._dist.send(torch.from_numpy(payload), peer)

    def _receive(self, peer: int) -> NDArray[Any]:
        import torch

        header = torch.zeros(_HEADER, dtype=torch.int64)
        self._dist.recv(header, peer)
        kind, rank, *sizes = header.tolist()
        dtype, shape = np.dtype(_DTYPES[kind]), sizes[:rank]
        payload = torch.empty(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, dtype=torch.uint8)
        self._dist.recv(payload, peer)
        return payload.numpy().view(dtype).reshape(shape)


def _open(step: RunGraph, program: RankProgram) -> onnxruntime.InferenceSession:
    folder = ("session.model_external_initializers_file_folder_path", program.folder)
    return open_session(step.model, threads=program.threads, entries=[folder, *program.session])


def _run(session: onnxruntime.InferenceSession, step: RunGraph, values: Arrays, places: Arrays) -> Arrays:
    """Outputs of one piece."""
    feeds = {name: values[name] for name in step.inputs}
    placed = [name for name in step.outputs if name in places]
    if not placed:
        return dict(zip(step.outputs, session.run(list(step.outputs), feeds), strict=True))
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, np.ascontiguousarray(array))
    for name in step.outputs:
        if name in places:
            array = places[name]
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        else:
            binding.bind_output(name, "cpu")
    session.run_with_iobinding(binding)
    made = dict(zip(step.outputs, binding.get_outputs(), strict=True))
    return {name: places[name] if name in places else made[name].numpy() for name in step.outputs}


def serve(worker: object, connection: Connection) -> None:
    """Answers commands, which are the worker's methods, until the other end closes."""
    connection.send_bytes(wire.encode(("done", None)))
    while True:
        try:
            name, arguments = wire.decode(bytearray(connection.recv_bytes()))
        except EOFError:
            return
        try:
            if name.startswith("_"):
                raise ValueError(f"no such command: {name}")
            answer = wire.encode(("done", getattr(worker, name)(*arguments)))
        except Exception as error:  # noqa: BLE001 - whatever went wrong, the group must hear of it and end
            answer = wire.encode(("failed", f"{type(error).__name__}: {error}"))
        connection.send_bytes(answer)


def main() -> None:
    rank, ranks, meeting, descriptor, parent = sys.argv[1:6]
    die_with_parent(int(parent))
    serve(Worker(int(rank), int(ranks), meeting), Connection(int(descriptor)))
    os._exit(0)  # gloo's threads may wait for ranks that have gone already


if __name__ == "__main__":
    main()
