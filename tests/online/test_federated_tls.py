"""Federated rounds between machines: certificates, a coordinator that is away, and one that is killed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
import trustme

from online.federated import wire
from online.federated.client import FederatedClient, PartTaken
from online.federated.coordinator import Coordinator
from online.federated.door import listening
from online.federated.keeping import RoundFiles
from online.federated.tensors import TensorFile
from online.federated.tls import TlsIdentity
from runtime.errors import InputError, Unavailable
from runtime.ports import free_ports
from tests import ROOT
from tests.online.federated_world import (
    FIRST,
    SAMPLES,
    Clock,
    Mover,
    by_hand,
    clients,
    hello,
    identity_in,
    issue,
    offer,
    plan,
    require_same,
    running,
)

NAMES = tuple(SAMPLES)


def test_certificates_of_another_authority_are_refused_on_both_sides(tmp_path: Path, certificates: Path) -> None:
    strangers = tmp_path / "strangers"
    issue(strangers, ["amber", "coordinator"], trustme.CA(key_type=trustme.KeyType.ECDSA))
    of = plan(min_clients=1, max_share=1, rounds=1)
    coordinator = Coordinator(offer(of), RoundFiles(tmp_path / "rounds"), FIRST)
    with running(coordinator, certificates) as (address, _, _):
        known = TlsIdentity(strangers / "amber.pem", strangers / "amber.key", certificates / "ca.pem")
        unknown = TlsIdentity(certificates / "amber.pem", certificates / "amber.key", strangers / "ca.pem")
        for identity in (known, unknown):
            with pytest.raises(InputError, match="certificates of"):
                FederatedClient(address, identity, hello("amber"), Mover("amber")).run(20)
            with contextlib.closing(identity.channel(address)) as channel, pytest.raises(grpc.RpcError):
                channel.unary_unary(f"/{wire.SERVICE}/Join")(wire.said(hello("amber")), timeout=10)
        with contextlib.closing(grpc.insecure_channel(address)) as channel, pytest.raises(grpc.RpcError):
            channel.unary_unary(f"/{wire.SERVICE}/Join")(wire.said(hello("amber")), timeout=10)
        assert coordinator.rounds.present == {}
        threads, found = clients(address, certificates, [Mover("amber")])
        threads[0].join(60)
    assert found == {"amber": PartTaken(True, (1,), {})}


def test_a_name_that_is_no_files_name_is_refused(tmp_path: Path, certificates: Path) -> None:
    authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
    found = issue(tmp_path / "own", ["coordinator", "amber"], authority)
    odd = issue(tmp_path / "odd", ["x"], authority)["x"]
    made = authority.issue_cert("127.0.0.1", common_name="../amber", key_type=trustme.KeyType.ECDSA)
    made.cert_chain_pems[0].write_to_path(odd.chain)
    made.private_key_pem.write_to_path(odd.key)
    coordinator = Coordinator(offer(plan(min_clients=1, max_share=1, rounds=1)), RoundFiles(tmp_path / "r"), FIRST)
    with listening(coordinator, "127.0.0.1:0", found["coordinator"]) as port:
        with pytest.raises(InputError, match="names no client"):
            FederatedClient(f"127.0.0.1:{port}", odd, hello("amber"), Mover("amber")).run(20)
        with contextlib.closing(found["amber"].channel(f"127.0.0.1:{port}")) as channel:
            join = channel.unary_unary(f"/{wire.SERVICE}/Join")
            for message in (b"{}", b"\x80\x04pickle", wire.said(hello("amber"))[:-1]):
                with pytest.raises(grpc.RpcError) as refused:
                    join(message, timeout=10)
                assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert coordinator.rounds.present == {}


def test_a_coordinator_that_is_away_is_waited_for_and_no_longer(certificates: Path) -> None:
    clock = Clock()

    def sleep(seconds: float) -> None:
        clock.now += seconds

    (port,) = free_ports(1)
    client = FederatedClient(
        f"127.0.0.1:{port}", identity_in(certificates, "amber"), hello("amber"), Mover("amber"), patience_s=60,
        sleep=sleep, monotonic=clock,
    )  # fmt: skip
    with pytest.raises(Unavailable, match="does not answer"):
        client.run()
    assert 60 < clock.now < 120


def _process(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.online.federated_world", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def _read_until(process: subprocess.Popen[str], word: str, lines: int = 60) -> str:
    assert process.stdout is not None
    seen = ""
    for _ in range(lines):
        line = process.stdout.readline()
        seen += line
        if word in line or not line:
            break
    assert word in seen, seen
    return seen


def test_a_coordinator_killed_between_processes_comes_to_the_same_weights(tmp_path: Path, certificates: Path) -> None:
    """Three processes over 127.0.0.1: kill -9 of the coordinator after its second round; another one goes on from
    there, and so do the clients."""
    (port,) = free_ports(1)
    folder = tmp_path / "rounds"
    start = ["coordinator", str(certificates), str(port), str(folder)]
    processes = [_process(*start)]
    try:
        processes += [_process("client", str(certificates), name, f"127.0.0.1:{port}") for name in NAMES[:2]]
        _read_until(processes[0], "round 2 of 4")
        processes[0].kill()
        processes[0].wait(10)
        complete = RoundFiles(folder).load()
        assert complete is not None
        assert complete.complete >= 2
        processes.append(_process(*start))
        outputs = [process.communicate(timeout=90)[0] for process in processes[1:]]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait(10)
    assert [process.returncode for process in processes[1:]] == [0, 0, 0], outputs
    files = RoundFiles(folder)
    state = files.load()
    assert state is not None
    assert [record.number for record in state.history] == [0, 1, 2, 3]
    assert state.history[:2] == complete.history[:2]
    require_same(TensorFile(files.weights_file(state)), by_hand(NAMES[:2], plan()))
