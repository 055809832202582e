"""The commands about a cluster, as a user types them, against the fake API server."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from builders.commands import cluster as commands
from builders.errors import InputError
from cluster.errors import ClusterError, RolloutError
from tests import ROOT
from tests.cluster.deploy_objects import config_map, connected, deployment
from tests.cluster.fake_cluster import FakeCluster

Run = Callable[..., Result]


@pytest.fixture
def app() -> typer.Typer:
    found = typer.Typer()
    for command in (commands.deploy, commands.diff, commands.undo, commands.load_version):
        found.command()(command)
    found.command("status")(commands.cluster_status)
    return found


@pytest.fixture
def run(fake: FakeCluster, tmp_path: Path, app: typer.Typer) -> Iterator[Run]:
    """A command with the kubeconfig of a fake cluster; what a command raises comes through."""

    def invoke(*arguments: str) -> Result:
        options = ["--kubeconfig", str(tmp_path / "kubeconfig")]
        if arguments[0] in ("deploy", "undo") and "--timeout-s" not in arguments:
            options += ["--timeout-s", "30"]
        return CliRunner().invoke(app, [*arguments, *options], catch_exceptions=False)

    with connected(fake, tmp_path):
        yield invoke


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def to_file(*documents: dict[str, Any]) -> str:
        for item in documents:
            item["metadata"]["labels"] = {"app.kubernetes.io/instance": "demo"}
        path = tmp_path / "set.yaml"
        path.write_text(yaml.safe_dump_all(documents))
        return str(path)

    return to_file


def test_deploy_status_diff_and_undo(run: Run, write: Callable[..., str], fake: FakeCluster) -> None:
    first = write(deployment(), config_map())
    done = run("deploy", first)
    assert (
        "demo: revision 1 is ready, 2 of 2 objects changed\n  Deployment prod/server: 2 pods are available"
        in done.stdout
    )
    assert "Deployment prod/server: 2 pods are available" in done.stderr, "without a terminal, a line for each change"
    assert run("diff", first).stdout == "nothing would change\n"
    second = write(deployment("better"))
    assert "+      - image: better" in run("diff", second).stdout
    record = json.loads(run("deploy", second, "--json").stdout)
    assert (record["revision"]["number"], record["revision"]["outcome"]) == (2, "ready")
    assert record["deleted"] == ["ConfigMap prod/settings"]
    assert "revision 3 is ready" in run("undo", second).stdout
    shown = run("status", second).stdout
    assert shown.startswith("Deployment prod/server: done, 2 pods are available\nrevision 1, ")
    assert shown.endswith("ready, restores revision 1\n")
    assert json.loads(run("status", second, "--json").stdout)["workloads"][0]["ready"] == 2


def test_a_dry_run_changes_nothing(run: Run, write: Callable[..., str], fake: FakeCluster) -> None:
    before = set(fake.objects)
    target = write(deployment(), config_map())
    assert run("deploy", target, "--dry-run", "server").stdout == (
        "created   ConfigMap prod/settings\ncreated   Deployment prod/server\n"
    )
    rows = json.loads(run("deploy", target, "--dry-run", "server", "--json").stdout)
    assert [row["change"] for row in rows] == ["created", "created"]
    assert set(fake.objects) == before


def test_a_failure_is_shown_and_undone(run: Run, write: Callable[..., str], fake: FakeCluster) -> None:
    run("deploy", write(deployment()))
    fake.images["bad"] = "slow"
    with pytest.raises(RolloutError, match=r"not ready within 1 s[\s\S]*undone: revision 1 is back as revision 3"):
        run("deploy", write(deployment("bad")), "--undo-on-failure", "--timeout-s", "1")


def test_status_names_the_problem(run: Run, write: Callable[..., str], fake: FakeCluster) -> None:
    fake.images["bad"] = "missing"
    target = write(deployment("bad"))
    with pytest.raises(RolloutError):
        run("deploy", target, "--timeout-s", "1")
    assert "check the image's name and tag" in run("status", target).stdout


def test_a_set_without_a_name(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "nameless.yaml"
    path.write_text(yaml.safe_dump(config_map()))
    with pytest.raises(InputError, match="give --name"):
        run("deploy", str(path))
    assert "demo: revision 1 is ready" in run("deploy", str(path), "--name", "demo").stdout


def test_nothing_was_deployed(run: Run, write: Callable[..., str]) -> None:
    target = write(config_map())
    with pytest.raises(ClusterError, match="an earlier set to go back to"):
        run("undo", target)
    with pytest.raises(InputError, match="NAME/KEY"):
        run("load-version", target, "--version", "2", "--control-secret", "plain")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_port_forward_until_a_signal(
    fake: FakeCluster, tmp_path: Path, run: Run, write: Callable[..., str], number: signal.Signals
) -> None:
    """Also where a script has started it in the background, with SIGINT ignored."""
    target = write(deployment(replicas=1))
    run("deploy", target)
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import typer; "
        "from builders.commands.cluster import port_forward; typer.run(port_forward)"
    )
    command = [sys.executable, "-c", program, target, "--kubeconfig", str(tmp_path / "kubeconfig")]
    with socket.create_server(("127.0.0.1", 0)) as pod:
        pod.settimeout(20)
        for _, item in fake.find("v1", "pods"):
            fake.addresses[item["metadata"]["name"], 8080] = pod.getsockname()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            try:
                assert process.stdout is not None
                told = process.stdout.readline()
                address, _, rest = told.partition(" -> ")
                assert rest.startswith("port 8080 of Deployment prod/server"), told
                host, _, port = address.partition(":")
                with socket.create_connection((host, int(port)), timeout=20) as client:
                    client.sendall(b"hello")
                    assert _first_words(pod) == b"hello"
                process.send_signal(number)
                assert process.wait(timeout=20) == 0
            finally:
                process.kill()  # else the end of `with` waits for ever


def _first_words(pod: socket.socket) -> bytes:
    """The command asks first whether it may; that connection reaches the pod or does not, and says nothing."""
    for _ in range(2):
        with pod.accept()[0] as served:
            served.settimeout(20)
            said = served.recv(5)
            if said:
                return said
    return b""


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl renders the overlay")
def test_a_preset_as_it_is_rendered(run: Run, fake: FakeCluster, tmp_path: Path) -> None:
    """The server takes every object of the preset's overlay, in an order that works, and a second time none changes."""
    from builders.manifests.overlay import RENDERED, write_manifests
    from builders.spec import load_spec

    written = write_manifests(load_spec("minilm"), "cpu", tmp_path / "overlay")
    documents = list(yaml.safe_load_all((written.directory / RENDERED).read_text()))
    for item in documents:
        kind = str(item["kind"])
        plural = kind.lower() + ("ies" if kind.endswith("y") else "s")
        plural = plural.replace("yies", "ies")
        if kind not in {known for known, _ in fake.kinds.values()}:
            fake.kinds[item["apiVersion"], plural] = (kind, kind not in ("Namespace", "PriorityClass"))
    dry = json.loads(run("deploy", "minilm", "--dry-run", "server", "--json").stdout)
    assert dry[0] == {"object": f"Namespace {written.namespace}", "change": "created"}
    assert {row["change"] for row in dry[1:]} == {"unchecked"}
    record = json.loads(run("deploy", "minilm", "--json", "--timeout-s", "10").stdout)
    assert len(record["objects"]) == len(documents)
    assert {item["state"] for item in record["workloads"]} == {"done"}
    again = json.loads(run("deploy", "minilm", "--json", "--timeout-s", "10").stdout)
    assert {row["change"] for row in again["objects"]} == {"unchanged", "kept"}, "the Namespace is there now"
