"""What is done to a service under load: processes killed or stopped, a full queue, a full disk."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median

from measure.chaos.load import ASK_S, SteadyLoad
from measure.chaos.service import StruckService

RECOVERY_S = 120.0
BETWEEN_S = 3.0
STOPPED_S = 3.0
_FULL_S = 5.0
_MANY, _SLOWLY_S = 3, 32.0
_CROWD = 400  # requests at once


@dataclass
class Blow:
    """One kind. `back_s`: after each, until a request that was sent later succeeded; None where none did."""

    name: str
    back_s: list[float | None] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)  # of the run
    note: str = ""
    fault: str = ""

    @property
    def text(self) -> str:
        back = [one for one in self.back_s if one is not None]
        found = self.note or "never answering again"
        if back and not self.note:
            felt = f"median {median(back):.1f} s, max {max(back):.1f} s"
            found = f"{len(self.back_s)} times; answering again after: {felt}"
        return f"{self.name:<18} {found}"

    @property
    def faults(self) -> list[str]:
        lost = sum(one is None for one in self.back_s)
        found = [f"{self.name}: not answering again within {RECOVERY_S:.0f} s, {lost} times"] if lost else []
        return [*found, *([f"{self.name}: {self.fault}"] if self.fault else [])]


def kill(service: StruckService, load: SteadyLoad, name: str, part: str, rounds: int) -> Blow:
    """With SIGKILL, the youngest of its kind, when the service is ready. Slowly where there are many: a service that
    needs more repairs than twenty within ten minutes gives up, as it should."""
    blow = Blow(f"{name} killed")
    pause_s = _SLOWLY_S if rounds > _MANY else BETWEEN_S
    for _ in range(rounds):
        service.await_ready(RECOVERY_S)
        pids = service.pids(part)
        if not pids:
            blow.back_s.append(None)
            continue
        blow.at_s.append(time.monotonic() - load.began)
        sent = time.monotonic()
        os.kill(pids[-1], signal.SIGKILL)
        # What a server still had in hand may be answered after its death is asked for; another process is not.
        blow.back_s.append(_await(load, sent + 0.2, partial(_another, service, part, pids)))
        time.sleep(pause_s)
    return blow


def stop(service: StruckService, load: SteadyLoad, name: str, part: str) -> Blow:
    """For STOPPED_S, as by a machine that swaps: nobody has died, so what waits is answered afterwards."""
    blow = Blow(f"{name} stopped")
    pids = service.pids(part)
    if not pids:
        return Blow(blow.name, fault="there is no such process")
    blow.at_s.append(time.monotonic() - load.began)
    os.kill(pids[-1], signal.SIGSTOP)
    try:
        time.sleep(STOPPED_S)
    finally:
        goes_on = time.monotonic()
        os.kill(pids[-1], signal.SIGCONT)
    blow.back_s.append(_await(load, goes_on, lambda: True))
    time.sleep(BETWEEN_S)
    return blow


def crowd(service: StruckService, load: SteadyLoad, path: str, fields: dict[str, object]) -> Blow:
    """More requests at once than the queue has places: each gets an answer, and who is refused is told when to come
    again."""
    told: Counter[str] = Counter()
    lock = threading.Lock()
    gate = threading.Barrier(_CROWD)

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=ASK_S)
        try:
            connection.connect()
            gate.wait(ASK_S)
            connection.request("POST", path, json.dumps(fields), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            told_when = answer.status not in (429, 503) or answer.headers.get("Retry-After")
            found = str(answer.status) if told_when else f"{answer.status} without Retry-After"
        except (OSError, http.client.HTTPException, threading.BrokenBarrierError) as error:
            found = f"connection: {type(error).__name__}"
        finally:
            connection.close()
        with lock:
            told[found] += 1

    blow = Blow("full queue", at_s=[time.monotonic() - load.began])
    threads = [threading.Thread(target=ask) for _ in range(_CROWD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * ASK_S)
    blow.back_s.append(_await(load, time.monotonic(), lambda: True))
    blow.note = f"{_CROWD} at once: {json.dumps(dict(sorted(told.items())))}"
    if wrong := [found for found in told if found not in ("200", "429", "503", "504")]:
        blow.fault = f"answered with {', '.join(wrong)}"
    elif set(told) == {"200"}:
        blow.fault = "nobody was refused: the queue was not full"
    time.sleep(BETWEEN_S)
    return blow


def fill_disk(service: StruckService, load: SteadyLoad) -> Blow:
    """No room for logs: requests do not ask for any."""
    blow = Blow("full disk", at_s=[time.monotonic() - load.began])
    if service.disk is None:
        return Blow(blow.name, note="not tried: this machine lets nobody make a disk of their own (unshare --mount)")
    before, rubbish = load.causes.copy(), service.seen_disk() / "rubbish"
    try:
        _write_until_full(rubbish)
        time.sleep(_FULL_S)
        found = load.causes - before
    finally:
        rubbish.unlink(missing_ok=True)
    blow.back_s.append(_await(load, time.monotonic(), lambda: True))
    blow.note = f"for {_FULL_S:.0f} s: {json.dumps(dict(sorted(found.items())))}"
    if set(found) != {"200"}:
        blow.fault = "requests failed"
    return blow


def _write_until_full(file: os.PathLike[str]) -> None:
    with open(file, "wb", buffering=0) as rubbish:
        for size in (1 << 20, 4096, 1):
            try:
                while rubbish.write(b"x" * size):
                    pass
            except OSError:
                continue


def _another(service: StruckService, part: str, known: list[int]) -> bool:
    return any(pid not in known for pid in service.pids(part))


def _await(load: SteadyLoad, since: float, also: Callable[[], bool]) -> float | None:
    """Seconds from `since` until a request that was sent later has succeeded, and `also` holds."""
    while (waited := time.monotonic() - since) < RECOVERY_S:
        if load.answered > since and also():
            return waited
        time.sleep(0.02)
    return None
