"""One served model under load, from its first answer to its last, and what was done to it between."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from builders.spec import load_spec
from measure.chaos.blows import BETWEEN_S, Blow
from measure.chaos.fuzz import Fuzzed
from measure.chaos.load import SteadyLoad
from measure.chaos.service import Held, StruckService

_GROWN = 1.25  # of what was held before: a heap has holes after it was filled once
_GROWN_MB = 200
_GROWN_DESCRIPTORS = 64 + 8  # connections to Triton that the gateway keeps
_KNOWN_S = 180.0


@dataclass
class ChaosAct:
    """One service, and what was done to it."""

    name: str
    load: SteadyLoad
    before: Held
    after: Held | None = None
    blows: list[Blow] = field(default_factory=list)
    fuzzed: Fuzzed | None = None
    fuzz_s: tuple[float, float] | None = None  # of the run: from when to when
    faults: list[str] = field(default_factory=list)

    def struck(self, blow: Blow) -> None:
        self.blows.append(blow)
        self.faults += blow.faults
        print(f"{self.name:<10} {blow.text}", flush=True)


@contextmanager
def in_act(
    name: str, spec: Path, build_dir: Path, kind: type[SteadyLoad], users: int
) -> Iterator[tuple[ChaosAct, StruckService]]:
    service = StruckService(spec, build_dir)
    load = kind(service.port, load_spec(spec).name)
    try:
        load.start(users)
        load.await_known(_KNOWN_S)
        act = ChaosAct(name, load, service.held())
        yield act, service
        time.sleep(BETWEEN_S)
        act.after = service.held()
    finally:
        load.stop()
        code = service.close()
    act.faults += load.wrongs
    act.faults += [f"the service ended with {code}"] if code else []
    act.faults += _grown(act.before, act.after)
    print(f"{name:<10} requests {json.dumps(dict(load.causes.most_common()))}")
    print(f"{name:<10} held before: {act.before}; after: {act.after}", flush=True)


def _grown(before: Held, after: Held) -> list[str]:
    found = []
    if after.rss_mb > max(before.rss_mb * _GROWN, before.rss_mb + _GROWN_MB):
        found.append(f"memory grew from {before.rss_mb:.0f} to {after.rss_mb:.0f} MB")
    if after.descriptors > before.descriptors + _GROWN_DESCRIPTORS:
        found.append(f"descriptors grew from {before.descriptors} to {after.descriptors}")
    if after.shared > before.shared:
        found.append(f"files in /dev/shm grew from {before.shared} to {after.shared}")
    return found
