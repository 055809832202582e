"""Encoder ranks on CPU: a group of processes that comes back by itself when one of them dies."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.backoff import pause_s
from runtime.errors import ServerFault, Unavailable
from runtime.graph import Tensors
from runtime.ranks.group import RankGroup, RankStep
from runtime.ranks.step_group import STEP_SECONDS, start_group
from runtime.ranks.stored import load_programs
from runtime.told import STARTS_AGAIN

_POLL_SECONDS = 0.2
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0


class RankExecutor:
    """Runs batches on tensor x pipeline ranks. Stages work on different batches at the same time.

    A keeper thread owns the group: the kernel ends the ranks with the thread that started them. While there is no
    group, `run_all` raises Unavailable at once.
    """

    def __init__(self, manifest: Path, *, threads: int) -> None:
        """`threads` is shared out to the ranks. Raises BadEnvironment or ServerFault when they do not start."""
        stored = load_programs(manifest)
        self._stored = stored.with_threads(max(1, threads // stored.layout.ranks))
        self._output = stored.outputs[0]
        self._maker = stored.maker(self._output)
        self._running = threading.Lock()  # held by whoever uses or replaces the group
        self._group: RankGroup | None = None
        self._started, self._closing = threading.Event(), threading.Event()
        self._first_fault: list[ServerFault] = []  # at most one: what the constructor raises
        self._keeper = threading.Thread(target=self._keep, name="rank-keeper", daemon=True)
        self._keeper.start()
        self._started.wait()
        if self._first_fault:
            self._keeper.join()
            raise self._first_fault[0]

    @property
    def description(self) -> str:
        import onnxruntime

        layout = self._stored.layout
        return f"ONNX Runtime {onnxruntime.__version__}, {layout.tensor} x {layout.pipeline} ranks"

    @property
    def processes(self) -> list[int]:
        """Process ids, by rank; none while the group is being replaced."""
        group = self._group
        return group.processes if group is not None else []

    @property
    def lanes(self) -> int:
        """Stages of a pipeline work on a batch each."""
        return self._stored.layout.pipeline

    def run_all(self, batches: Sequence[Tensors], wide: int = 0) -> list[NDArray[np.float32]]:
        """The first output of the graph for each batch. Raises Unavailable when a rank fails, dies or is late."""
        return [output for some in (*([each] for each in batches[:wide]), batches[wide:]) for output in self._run(some)]

    def _run(self, batches: Sequence[Tensors]) -> list[NDArray[np.float32]]:
        with self._running:
            if self._group is None:
                raise Unavailable(f"the rank group {STARTS_AGAIN}; try again shortly")
            try:
                results = self._group.run_steps([self._step(batch) for batch in batches], seconds=STEP_SECONDS)
            except ServerFault as fault:
                _log(str(fault))
                self._group = None  # it has ended itself; the keeper starts another
                raise Unavailable(f"a rank of the model has failed; the group {STARTS_AGAIN}") from fault
        return [np.asarray(step[self._maker][self._output], np.float32) for step in results]

    def close(self) -> None:
        """Ends the ranks. May be called twice."""
        self._closing.set()
        self._keeper.join()

    def _step(self, batch: Tensors) -> list[RankStep]:
        return [
            (
                {name: batch[name] for name in program.inputs if name in batch},
                (self._output,) if rank == self._maker else (),
            )
            for rank, program in enumerate(self._stored.programs)
        ]

    def _keep(self) -> None:
        """Until closed: start a group, watch it, end what is left of it, begin again."""
        failures = 0
        while not self._closing.is_set():
            try:
                group = self._start()
            except Exception as error:  # noqa: BLE001 - no memory, no files, no place for them: the keeper must go on
                fault = error if isinstance(error, ServerFault) else ServerFault(f"the ranks do not start: {error}")
                if not self._started.is_set():
                    self._first_fault.append(fault)
                    self._started.set()
                    return
                failures += 1
                pause = pause_s(failures, _FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
                _log(f"the rank group does not start ({fault}); next try in {pause:.1f} s")
                self._closing.wait(pause)
                continue
            failures = 0
            self._started.set()
            self._watch(group)

    def _start(self) -> RankGroup:
        group = start_group(self._stored)
        with self._running:
            self._group = group
        return group

    def _watch(self, group: RankGroup) -> None:
        """Returns when the group has ended, a rank of it has died, or the executor is closing."""
        while self._group is group and not self._closing.is_set():
            if group.wait_for_death(_POLL_SECONDS):
                break
        with self._running:  # a running step sees the death by itself, and lets go
            if self._group is group and not self._closing.is_set():
                _log("a rank has died; the group is starting again")
            self._group = None
            group.close()


def _log(message: str) -> None:
    print(f"ranks: {message}", file=sys.stderr, flush=True)
