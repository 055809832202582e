"""TensorRT on several GPUs: tensor x pipeline processes, one for each GPU. **Not run on GPUs yet.**

The driver sends a step's tokens to every rank. Tensor ranks meet inside their engines, in the collectives of the graph;
activations pass from stage to stage on the GPUs' streams; the last stage returns the top tokens, and logits of single
rows when somebody asks. The batches of a step share no row, so stages work on different ones at the same time.

A rank that fails takes its process with it, and `reset` brings a new group: an error on a GPU spoils nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from runtime.errors import BadEnvironment
from runtime.gpu import visible_targets
from runtime.ranks.group import RankGroup
from runtime.ranks.hosts import Hosts, ranks_here
from runtime.ranks.process import GPU_WORKER
from runtime.ranks.program import EngineProgram, PassedValue
from runtime.ranks.step_group import STEP_SECONDS, RankGroupHolder
from runtime.step import Batch, Copy, Logits
from runtime.tensorrt.logits import DeviceLogits
from runtime.tensorrt.rank_manifest import EngineManifest, Passed, load_manifest

_START_SECONDS = 600.0  # engines of many gigabytes


class TensorRtRankExecutor(RankGroupHolder):
    """`manifest` is the `engines.json` beside the engines; the ranks take GPUs from `device` on.

    Raises BadEnvironment or ServerFault.
    """

    every = False

    def __init__(
        self,
        manifest: Path,
        capacities: Sequence[int],
        rows: int,
        *,
        device: int = 0,
        worker: str = GPU_WORKER,
        step_seconds: float = STEP_SECONDS,
        hosts: Hosts | None = None,
    ) -> None:
        stored = load_manifest(manifest)
        _require_multi_device(stored)
        self._here = ranks_here(hosts, stored.layout.ranks)
        self._targets = _require_engines(stored, capacities, device, self._here)
        super().__init__(step_seconds, hosts)
        self._stored, self._folder, self._device = stored, manifest.parent, device
        self._capacities, self._rows, self._worker = tuple(capacities), rows, worker
        self.vocabulary, self.stages = stored.vocabulary, stored.pipeline
        self._maker = stored.layout.stage(stored.pipeline - 1).start
        self._calls = 0
        try:
            position_bytes = self._start()
        except BaseException:
            self.close()
            raise
        weights = sum(self._file(rank, self._capacities[0]).stat().st_size for rank in range(stored.layout.ranks))
        self.call_cost = weights // max(position_bytes, 1)

    def reset(self) -> None:
        self._start()

    def run(self, batches: Sequence[Batch]) -> list[Logits]:
        self._calls += 1
        ranks = self._stored.layout.ranks
        commands = [[("run_batch", (batch,))] * ranks for batch in batches]
        answers = self.running.call(commands, seconds=self.step_seconds)
        logits = [self._logits(batch, answer[self._maker]) for batch, answer in zip(batches, answers, strict=True)]
        return cast("list[Logits]", logits)  # arrays in all that samplers do with them

    def copy(self, copies: Sequence[Copy]) -> None:
        if copies:
            command = ("copy_rows", (list(copies),))
            self.running.call([[command] * self._stored.layout.ranks], seconds=self.step_seconds)

    def _start(self) -> int:
        """A new group with its engines loaded. Bytes of one position in the caches of all ranks."""
        self.end_group()
        self._calls += 1
        layout = self._stored.layout
        group = RankGroup(layout.ranks, start_seconds=_START_SECONDS, gathering=self._gathering, worker=self._worker)
        try:
            asked = [("identify", (layout, self._device + rank % self._here)) for rank in range(layout.ranks)]
            [ids] = group.call([asked], seconds=_START_SECONDS)
            programs = [self._program(rank, ids) for rank in range(layout.ranks)]
            [sizes] = group.call([[("load", (program,)) for program in programs]], seconds=_START_SECONDS)
        except BaseException:
            group.close()
            raise
        self._group = group
        return sum(sizes)

    def _program(self, rank: int, ids: Sequence[tuple[bytes, bytes]]) -> EngineProgram:
        layout, own = self._stored.layout, self._stored.ranks[rank]
        return EngineProgram(
            layout=layout,
            flavour=self._stored.flavour,
            files=tuple(self._file(rank, capacity) for capacity in self._capacities),
            capacities=self._capacities,
            rows=self._rows,
            received=_passed(own.received),
            sent=_passed(own.sent),
            world=ids[0][0],
            group=ids[layout.stage(rank // layout.tensor).start][1],
        )

    def _file(self, rank: int, capacity: int) -> Path:
        return self._folder / self._stored.ranks[rank].files[f"{self._targets[rank]}.{capacity}"]

    def _logits(self, batch: Batch, top: Any) -> DeviceLogits:
        call = self._calls

        def fetch(rows: Sequence[int]) -> Logits:
            if call != self._calls:
                raise RuntimeError("logits are valid until the next run")
            command = ("fetch", (batch.pool, batch.first, list(rows)))
            logits: Logits = self.running.call_one(self._maker, command, seconds=self.step_seconds)
            return logits

        return DeviceLogits(top, self.vocabulary, fetch)


def _passed(stored: Sequence[Passed]) -> tuple[PassedValue, ...]:
    return tuple(PassedValue(item.name, item.stage, item.dims, item.itemsize) for item in stored)


def _require_multi_device(stored: EngineManifest) -> None:
    if stored.flavour == "tensorrt-rtx" and stored.tensor > 1:
        raise BadEnvironment(
            f"{stored.tensor} tensor ranks on TensorRT for RTX, which runs on one GPU; set engine.flavour: tensorrt, "
            "or use pipeline stages"
        )


def _require_engines(stored: EngineManifest, capacities: Sequence[int], device: int, here: int) -> list[str]:
    """The targets of the ranks' GPUs, `here` of them on this host. Those of other hosts are taken for the same: an
    engine does not load on another.
    """
    targets = visible_targets()[device : device + here]
    if len(targets) < here:
        raise BadEnvironment(
            f"{stored.tensor} x {stored.pipeline} ranks need {here} GPUs on this host; it shows {len(targets)} from "
            f"number {device} on; give the pod more, or use fewer ranks"
        )
    targets = targets * (stored.layout.ranks // here)
    for rank, target in enumerate(targets):
        files = stored.ranks[rank].files
        missing = [f"{target}.{capacity}" for capacity in capacities if f"{target}.{capacity}" not in files]
        if missing:
            raise BadEnvironment(
                f"rank {rank} is on {target}; no engine for {', '.join(missing)}, only for {', '.join(sorted(files))}; "
                "add the target to engine.targets and build again"
            )
    return targets
