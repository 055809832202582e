"""Port-forward: the library's websocket against the fake server, and a local port in front of it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.api import Cluster
from cluster.errors import ClusterError
from cluster.kinds import PODS
from cluster.port_forward import PortForward
from runtime.ports import free_ports
from tests.cluster.fake_api import serving, write_kubeconfig
from tests.cluster.fake_cluster import FakeCluster

POD_PORT = 8001
PATIENCE_S = 20


class Echo:
    """What a pod serves here: says back what it hears, in upper case, and ends when the other end does."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self.listener.getsockname()[:2]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            while block := client.recv(1 << 16):
                if block == b"bye":
                    return
                client.sendall(block.upper())


@pytest.fixture
def fake() -> FakeCluster:
    cluster = FakeCluster()
    cluster.store(("v1", "pods", "prod", "pod-a"), {"metadata": {}})
    return cluster


@pytest.fixture
def echo(fake: FakeCluster) -> Iterator[Echo]:
    found = Echo()
    fake.addresses["pod-a", POD_PORT] = found.address
    yield found
    found.listener.close()


def dial(forward: PortForward) -> socket.socket:
    host, _, port = forward.address.partition(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE_S)


def said(client: socket.socket, size: int) -> bytes:
    """Exactly so many bytes, or fewer when the other end is done."""
    found = b""
    while len(found) < size and (block := client.recv(size - len(found))):
        found += block
    return found


def test_several_connections_at_once(cluster: Cluster, echo: Echo) -> None:
    with PortForward(cluster, "prod", lambda: "pod-a", POD_PORT) as forward:

        def talk(number: int) -> bytes:
            with dial(forward) as client:
                for _ in range(3):
                    client.sendall(b"hello %d;" % number)
                return said(client, 24)

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(talk, range(4))) == [b"HELLO %d;" % number * 3 for number in range(4)]


def test_much_data_in_both_directions(cluster: Cluster, echo: Echo) -> None:
    payload = bytes(range(97, 123)) * 80_000  # 2 MB, over many frames
    with PortForward(cluster, "prod", lambda: "pod-a", POD_PORT) as forward, dial(forward) as client:
        sender = threading.Thread(target=client.sendall, args=(payload,))
        sender.start()
        assert said(client, len(payload)) == payload.upper()
        sender.join()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_much_data_over_tls(fake: FakeCluster, echo: Echo, tmp_path: Path) -> None:
    """TLS holds bytes back that `poll` does not see, and may refuse to write for now."""
    payload = bytes(range(97, 123)) * 80_000
    certificate = make_certificate(tmp_path)
    with (
        serving(fake, certificate) as url,
        Cluster.connect(write_kubeconfig(tmp_path / "kubeconfig", url, authority=certificate)) as cluster,
        PortForward(cluster, "prod", lambda: "pod-a", POD_PORT) as forward,
        dial(forward) as client,
    ):
        sender = threading.Thread(target=client.sendall, args=(payload,))
        sender.start()
        assert said(client, len(payload)) == payload.upper()
        sender.join()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_certificate_that_is_not_trusted(fake: FakeCluster, echo: Echo, tmp_path: Path) -> None:
    with (
        serving(fake, make_certificate(tmp_path)) as url,
        Cluster.connect(write_kubeconfig(tmp_path / "kubeconfig", url)) as cluster,
    ):
        with pytest.raises(ClusterError, match="certificate verify failed"):
            PortForward(cluster, "prod", lambda: "pod-a", POD_PORT)
        with pytest.raises(ClusterError, match=r"certificate verify failed.*certificates"):
            cluster.get(PODS, "prod", "pod-a")


def make_certificate(folder: Path) -> Path:
    """Certificate and key of 127.0.0.1 in one file, signed by itself."""
    target = folder / "server.pem"
    name = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *name]
    subprocess.run(
        [*command, "-keyout", target, "-out", folder / "part.pem"], check=True, capture_output=True, timeout=60
    )
    target.write_text(target.read_text() + (folder / "part.pem").read_text())
    return target


def test_either_end_may_close(cluster: Cluster, echo: Echo) -> None:
    with PortForward(cluster, "prod", lambda: "pod-a", POD_PORT) as forward:
        with dial(forward) as client:
            client.sendall(b"bye")
            assert client.recv(1) == b""
        with dial(forward) as client:
            client.sendall(b"last words")
            client.shutdown(socket.SHUT_WR)
            assert said(client, 10) == b"LAST WORDS", "what was asked for still comes after the client's last byte"


def test_a_port_that_nothing_listens_on(cluster: Cluster) -> None:
    told: list[str] = []
    with PortForward(cluster, "prod", lambda: "pod-a", 9999, report=told.append) as forward, dial(forward) as client:
        assert client.recv(1) == b""
    assert told == ["port 9999: error forwarding port 9999 to pod pod-a: connection refused"]


@pytest.mark.parametrize("verb", ["get", "create"])
def test_missing_rights(cluster: Cluster, fake: FakeCluster, echo: Echo, verb: str) -> None:
    fake.denied.add((verb, "pods/portforward"))
    with pytest.raises(
        ClusterError, match=r"no right to get pods/portforward pod-a, create pods/portforward pod-a"
    ) as caught:
        PortForward(cluster, "prod", lambda: "pod-a", POD_PORT)
    assert caught.value.code == 403


def test_a_pod_that_is_not_there(cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match='pods "gone" not found') as caught:
        PortForward(cluster, "prod", lambda: "gone", POD_PORT)
    assert caught.value.code == 404


def test_no_cluster(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    with (
        Cluster.connect(write_kubeconfig(tmp_path / "kubeconfig", url)) as cluster,
        pytest.raises(ClusterError, match="refused"),
    ):
        PortForward(cluster, "prod", lambda: "pod-a", POD_PORT)


def test_a_local_port_in_use(cluster: Cluster, echo: Echo) -> None:
    with pytest.raises(ClusterError, match=f"local port {echo.address[1]}: .*another --local-port"):
        PortForward(cluster, "prod", lambda: "pod-a", POD_PORT, echo.address[1])


def test_a_pod_that_was_replaced(cluster: Cluster, fake: FakeCluster, echo: Echo) -> None:
    """Each connection asks anew which pod serves."""
    pods = ["pod-a"]
    with PortForward(cluster, "prod", lambda: pods[-1], POD_PORT) as forward:
        fake.remove(("v1", "pods", "prod", "pod-a"))
        fake.store(("v1", "pods", "prod", "pod-b"), {"metadata": {}})
        fake.addresses["pod-b", POD_PORT] = echo.address
        pods.append("pod-b")
        with dial(forward) as client:
            client.sendall(b"hello")
            assert said(client, 5) == b"HELLO"


def test_close_ends_open_connections(cluster: Cluster, echo: Echo) -> None:
    forward = PortForward(cluster, "prod", lambda: "pod-a", POD_PORT)
    with dial(forward) as client:
        client.sendall(b"hello")
        assert said(client, 5) == b"HELLO"
        forward.close()
        forward.close()
        assert client.recv(1) == b""
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("port forward")]
