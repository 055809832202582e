"""Keeps one server answering rightly: readiness by a true inference and the version's proof, repair by a new start.

Triton 2.51 neither starts a dead Python stub again nor ends the streams that it held, and its own health checks stay
green. So whatever is wrong, it is ended at once, which tells every client that waits, and started again. That a version
answers says nothing of what: it counts only when it has been proven (see `runtime.proof.proving`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from runtime.errors import BadEnvironment, NotProven, ProofOverdue, ServerFault
from runtime.server.health import Health
from runtime.server.launch import Ports, TritonServer
from runtime.server.probing import PROBE_TIMEOUT_S, Failure, Probe, failure_of
from runtime.server.progress import ServerProgress
from runtime.server.server_proof import ServerProof
from runtime.server.staging import StagedVersions
from runtime.server.stubs import LOADING_SETTLED_S, SETTLED_S
from runtime.server.supervision import STANDSTILL_S, Act, Action, Event, Supervision

_UNLOADED_WITHIN_S = 10.0  # of the answer of another version, or of its end: the stubs of the one that goes
_LOOK_S = 0.1  # between two looks at whether something has died, and at being asked to stop


@dataclass(frozen=True)
class ProbePace:
    """`interval_s` between probes; `standstill_s`: so long may nothing be done while work waits."""

    interval_s: float = 2.0
    timeout_s: float = PROBE_TIMEOUT_S
    standstill_s: float = STANDSTILL_S


class _Probed(NamedTuple):
    failure: Failure | None


class Supervisor:
    """Watches one server. `versions`: those that may be loaded into it while it runs; `health` hears how it is,
    `report` of the proof. `beside` is called several times a second, for a process that lives beside the server."""

    def __init__(
        self,
        server: TritonServer,
        versions: StagedVersions | None = None,
        health: Health | None = None,
        pace: ProbePace | None = None,
        report: Callable[[str], None] = lambda message: None,
        beside: Callable[[], None] = lambda: None,
    ) -> None:
        self._server, self._versions, self._report = server, versions, report
        self._beside = beside
        self._stopped = threading.Event()
        self._health, self._pace = health or Health(), pace or ProbePace()
        self._prober = ThreadPoolExecutor(1, "probe")
        self._probing: Future[Failure | None] | None = None
        self._due = self._loading_until = 0.0
        # By whoever holds the secret, who tells us nothing of it.
        self._loads_unannounced = versions is None and server.exposure.control_secret is not None
        self._open()

    def _open(self) -> None:
        self._client = Probe(self._server.grpc_address, self._server.probe_id, self._pace.timeout_s)
        self._progress = ServerProgress(self._server.metrics_address, self._server.settings.ensemble)
        given_up = self._stopped.is_set
        self._proof = ServerProof(self._server, self._versions, self._client.client, self._report, given_up)

    def _turn(self) -> None:
        self._health.turned()
        self._beside()

    def close(self) -> None:
        """Does not wait for a probe that is under way; a proof is given up."""
        self._stopped.set()
        self._prober.submit(self._client.close)
        self._prober.shutdown(wait=False)

    def wait_ready(self, timeout_s: float, asked_to_stop: threading.Event, again: bool = False) -> None:
        """Returns when the version is proven, or when asked to stop. The one gate of every start.

        A server that starts `again` may have its queue filled by those who wait for it, so that no probe gets in: then
        it is enough that their work is done. The same files were proven on this machine before; they are again with the
        first probe that gets in. Raises ServerFault when the server dies or is not ready in time, NotProven with the
        figures when it answers otherwise than the reference.
        """
        end = time.monotonic() + timeout_s
        reason = "no probe was made"
        while time.monotonic() < end and not asked_to_stop.wait(_LOOK_S):
            self._turn()
            self._server.adopt()
            self._server.require_alive(LOADING_SETTLED_S)
            probed = self._probed()
            if probed is None:
                continue
            if probed.failure is None or (again and probed.failure.moving):
                return
            if probed.failure.wrong:
                raise NotProven(probed.failure.reason)
            reason = probed.failure.reason
        if asked_to_stop.is_set():
            return
        raise ServerFault(f"Triton is not ready after {timeout_s:.0f} s ({reason})\nLog:\n{self._server.log_tail()}")

    def probe(self) -> Failure | None:
        """One real inference; None when it is sound, and of a proven version."""
        answer = self._client.ask(self._server.settings.ensemble)
        failure = answer if isinstance(answer, Failure) else self._unproven(answer)
        if failure is not None and failure.busy:
            seen = self._progress.look()
            return replace(failure, moving=seen.moved, recovering=failure.recovering or seen.recovering)
        return failure

    def _unproven(self, version: int) -> Failure | None:
        """A version that was loaded beside the one of the start, and is now proven, is the server's from here on."""
        from tritonclient.utils import InferenceServerException

        try:
            self._proof.accept(version)
        except NotProven as error:
            return Failure(str(error), wrong=True)
        except ProofOverdue as error:
            return Failure(str(error), busy=True)
        except InferenceServerException as error:
            return failure_of(error)
        if self._staged() is None:  # else a stub may belong to a version that does not serve yet, and may not work
            self._server.adopt()
        return None

    def _staged(self) -> int | None:
        return self._versions.staged() if self._versions is not None else None

    def watch(self, asked_to_stop: threading.Event, start_timeout_s: float, report: Callable[[str], None]) -> None:
        """Repairs what breaks, until asked to stop. Raises ServerFault when repairs do not help."""
        plan = Supervision(time.monotonic(), self._pace.standstill_s)
        found: tuple[Event, str] | None = None
        while True:
            if found is None:
                found = (Event.ASKED_TO_STOP, "") if asked_to_stop.wait(_LOOK_S) else self._look()
                self._turn()
                continue
            action = plan.hear(found[0], time.monotonic(), found[1])
            found = None
            if action.act is Act.STOP:
                return
            if action.act is Act.GIVE_UP:
                raise ServerFault(action.reason)
            if action.act is Act.REPAIR:
                report(f"{action.reason.splitlines()[0]}; repair {plan.repairs} since the start")
                found = self._repair(action, asked_to_stop, start_timeout_s)
                if found[0] is Event.REPAIRED:
                    report(f"serving again; Triton is process {self._server.pid}")

    def _look(self) -> tuple[Event, str] | None:
        """What has happened since the last look."""
        now = time.monotonic()
        if self._staged() is not None or self._loads_unannounced:
            self._loading_until = now + _UNLOADED_WITHIN_S
        died = self._server.dead(LOADING_SETTLED_S if now < self._loading_until else SETTLED_S)
        if died is not None:
            return Event.DIED, died
        if time.monotonic() < self._due:
            return None
        probed = self._probed()
        if probed is None:
            return None
        failure = probed.failure
        self._due = time.monotonic() + self._pace.interval_s
        self._health.observed(failure)
        if failure is None:
            return Event.ANSWERED, ""
        if failure.wrong:
            return Event.WRONG, failure.reason
        if failure.moving:
            return Event.MOVING, failure.reason
        if failure.recovering:
            return Event.RECOVERING, failure.reason
        if failure.busy:
            return Event.BUSY, failure.reason
        return Event.FAILED, f"inferences failed ({failure.reason.strip().splitlines()[0]})"

    def _probed(self) -> _Probed | None:
        """What a probe found; None while it is under way, for a server that dies meanwhile is not waited for."""
        if self._probing is None:
            self._probing = self._prober.submit(self.probe)
            wait([self._probing], _LOOK_S)
        if not self._probing.done():
            return None
        failure = self._probing.result()
        self._probing = None
        return _Probed(failure)

    def _repair(self, action: Action, asked_to_stop: threading.Event, start_timeout_s: float) -> tuple[Event, str]:
        """Back to the version before, where one was loaded that does not work; else a new start of all."""
        if self._versions is not None and self._staged() is not None and self._server.dead() is None:
            self._proof.forget()
            self._versions.discard(action.reason)
            self._client.load(self._server.settings.load_order, self._server.control_headers)
            return Event.REPAIRED, ""
        self._health.restarting(action.reason)
        self._turn()  # the gateway hears it before the time that ending the server takes
        self._server.kill()
        self._forget_probe()
        if self._versions is not None:
            self._versions.discard(action.reason)
        end = time.monotonic() + action.pause_s
        while time.monotonic() < end and not asked_to_stop.wait(_LOOK_S):
            self._turn()
        try:
            if not asked_to_stop.is_set():
                self._server.start_again()
                self.wait_ready(start_timeout_s, asked_to_stop, again=True)
        except NotProven:
            raise  # files that are proven nowhere: another start gives the same
        except (ServerFault, BadEnvironment) as error:
            return Event.NOT_REPAIRED, str(error)
        if asked_to_stop.is_set():
            return Event.ASKED_TO_STOP, ""
        self._health.observed(None)
        return Event.REPAIRED, ""

    def _forget_probe(self) -> None:
        """What it asked of the server of before fails now. The old channel would wait before it connects again."""
        if self._probing is not None:
            wait([self._probing], 2 * self._pace.timeout_s)
            self._probing = None
        self._client.close()
        self._open()


@contextmanager
def ready_server(repository: Path, timeout_s: float = 120) -> Iterator[TritonServer]:
    """A server on free ports that is proven (`server.proven` has the figures); it ends with the block.

    Raises as `TritonServer` and `Supervisor.wait_ready` do.
    """
    with TritonServer(repository, Ports.free()) as server:
        with closing(Supervisor(server)) as supervisor:
            supervisor.wait_ready(timeout_s, threading.Event())
        yield server
