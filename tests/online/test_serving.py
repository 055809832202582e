"""Rollouts on a real Triton behind a real gateway, under requests that do not pause: none of them fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from online.rollout.drive import Journal, Rollout, begin
from online.rollout.policy import Metric, RolloutPolicy
from online.rollout.state import Phase, RolloutState
from online.serving import GatewayDoor, TritonVersions
from runtime.beside import FOLDER
from runtime.errors import InputError, NotProven, ServerFault, Unavailable
from runtime.server.launch import Exposure, Ports, TritonServer
from runtime.server.supervise import Supervisor
from runtime.settings import ServerSettings
from tests.conftest import wait_until
from tests.gateway.asking import gateway, post_json
from tests.online.served import BROKEN, FAILS_LATER, SECRET, WRONG, add_version

READY_S = 300
POLICY = RolloutPolicy(
    margins={Metric.ERRORS: 0.3}, shares=(0.2, 0.5), mirrored_requests=10, step_requests=5, soak_requests=10,
    most_requests=20_000,
)  # fmt: skip


@dataclass
class Served:
    """`answers`: status and version of each request of the traffic."""

    repository: Path
    server: TritonServer
    port: int
    said: list[str] = field(default_factory=list)
    answers: list[tuple[int, str]] = field(default_factory=list)
    published: dict[int, ServerSettings] = field(default_factory=dict)

    @property
    def door(self) -> GatewayDoor:
        return GatewayDoor(f"http://127.0.0.1:{self.port}", SECRET, self.repository, slo_s=60)

    @property
    def versions(self) -> TritonVersions:
        return TritonVersions(
            self.server.grpc_address, SECRET, self.repository, self.door,
            settings_of=self.published.get, report=self.said.append,
        )  # fmt: skip

    def publish(self, version: int, change: str = "pass") -> None:
        self.published[version] = add_version(self.repository, version, change)

    def ask(self, **headers: str) -> int:
        return post_json(self.port, "/v1/embeddings", {"model": "tiny", "input": "asked"}, **headers)[0]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Version 1 under its supervisor, as `trireme serve --model-control` has it."""
    folder = tmp_path_factory.mktemp("served")
    repository = folder / "repository"
    first = add_version(repository, 1)
    (folder / "secret").write_text(SECRET)
    stop = threading.Event()
    exposure = Exposure(control_secret=SECRET)
    with TritonServer(repository, Ports.free(), exposure=exposure) as server, closing(Supervisor(server)) as supervisor:
        supervisor.wait_ready(READY_S, stop)
        watching = threading.Thread(target=supervisor.watch, args=(stop, READY_S, print))
        watching.start()
        options = ("--control-secret-file", str(folder / "secret"), "--mirror-log", str(folder / "mirror.log"))
        try:
            with gateway("tiny", server.ports.http, server.ports.metrics, *options) as port:
                yield Served(repository, server, port, published={1: first})
        finally:
            stop.set()
            watching.join()


@contextmanager
def traffic(served: Served) -> Iterator[list[int]]:
    """Statuses of requests, two at a time, from the beginning of the block to its end."""
    stop, statuses = threading.Event(), list[int]()

    def ask() -> None:
        while not stop.is_set():
            statuses.append(served.ask())

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def roll_out(
    served: Served, folder: Path, until: Callable[[RolloutState], bool] = lambda state: False, limit: int = 3000
) -> RolloutState:
    """Goes on with the journal until the end, or until `until`: then it is left as a killed process leaves it."""
    pause = threading.Event()
    with Journal(folder / "rollout.json") as journal:
        rollout = Rollout(journal, served.door, served.versions)
        for _ in range(limit):
            state = rollout.step()
            if rollout.ended or until(state):
                return state
            pause.wait(0.05)
    raise AssertionError(f"it does not end: {state}")


def begun(folder: Path, old: int, new: int) -> None:
    with Journal(folder / "rollout.json") as journal:
        begin(journal, POLICY, old, new)


@pytest.mark.triton
def test_a_version_that_is_not_sound_never_serves(served: Served, tmp_path: Path) -> None:
    """Version 1 serves before and after: wrong numbers, no answers, no files."""
    main = served.door.shares()
    assert list(main.values()) == [1.0]
    (old,) = main
    with traffic(served) as statuses:
        for number, (change, said) in enumerate(
            {WRONG: "mean cosine", BROKEN: "does not answer its proof"}.items(), 11
        ):
            served.publish(number, change)
            with pytest.raises(NotProven, match=said):
                served.versions.load(number)
            assert served.ask(**{"x-trireme-version": str(number)}) == 404
        served.publish(13)
        (served.repository / "tiny" / "13" / "model.py").write_text("raise RuntimeError('no engine for this GPU')")
        begun(tmp_path, old, 13)
        state = roll_out(served, tmp_path)
        assert state.phase is Phase.ROLLED_BACK
        assert "no engine for this GPU" in state.decisions[-1].reason
        with pytest.raises(ServerFault, match="nobody knows"):
            served.versions.load(99)
    assert set(statuses) == {200}
    assert served.door.shares() == {old: 1.0}
    assert list((served.repository / FOLDER).iterdir()) == []


@pytest.mark.triton
def test_a_rollout_that_is_killed_goes_on_and_loses_no_request(served: Served, tmp_path: Path) -> None:
    (old,) = served.door.shares()
    served.publish(21)
    begun(tmp_path, old, 21)
    with traffic(served) as statuses:
        state = roll_out(served, tmp_path, until=lambda state: state.phase is Phase.CANARY)
        assert state.phase is Phase.CANARY
        assert served.ask(**{"x-trireme-version": "21"}) == 200, "the versions outlive who rolls them out"
        state = roll_out(served, tmp_path)
        assert state.phase is Phase.PROMOTED, state.decisions
    assert set(statuses) == {200}
    assert served.door.shares() == {21: 1.0}
    assert ServerSettings.load(served.repository).version == 21
    assert list((served.repository / FOLDER).iterdir()) == []
    assert wait_until(lambda: served.server.settings.version == 21, 60), "a restart comes back with it"


@pytest.mark.triton
def test_a_version_that_fails_its_clients_is_rolled_back(served: Served, tmp_path: Path) -> None:
    """It passes its proof, and fails what clients ask: nobody hears of it but the canary's share."""
    (old,) = served.door.shares()
    served.publish(31, FAILS_LATER)
    begun(tmp_path, old, 31)
    with traffic(served) as statuses:
        state = roll_out(served, tmp_path)
    assert state.phase is Phase.ROLLED_BACK
    assert "errors are worse" in state.decisions[-1].reason
    assert [decision.enters for decision in state.decisions] == [Phase.PROVEN, Phase.MIRRORED, Phase.ROLLED_BACK]
    assert set(statuses) == {200}, "it was found by copies alone"
    assert served.door.shares() == {old: 1.0}


@pytest.mark.triton
def test_a_door_says_what_it_was_not_given(served: Served) -> None:
    url = f"http://127.0.0.1:{served.port}"
    with pytest.raises(InputError, match="control secret"):
        GatewayDoor(url, "another-secret-than-that", served.repository).shares()
    with pytest.raises(ServerFault, match="version 77 does not answer"):
        served.door.route({77: 1.0}, None)
    with pytest.raises(Unavailable, match="does not answer"):
        GatewayDoor("http://127.0.0.1:9", SECRET, served.repository).counters()
    with pytest.raises(InputError, match="seconds"):
        GatewayDoor(url, SECRET, served.repository, slo_s=0)
