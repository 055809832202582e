"""A port of this machine that leads to a port of a pod, through the API server.

One websocket carries one connection: the server opens the pod's port anew for each. The client library makes the
websocket; what flows through it is carried here. The library's own carrier stops for good when both ends send much at
once, and its example replaces `socket.create_connection` for the whole process.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cluster.api import Cluster
from cluster.errors import ClusterError
from cluster.kinds import PODS
from cluster.refusal import Operation, no_rights, read_status, refused
from cluster.rights import PORT_FORWARD

if TYPE_CHECKING:
    from websocket import ABNF, WebSocket

LOOPBACK = "127.0.0.1"
_PROTOCOL = "v4.channel.k8s.io"  # one binary channel for data, one for errors, per port
_DATA = 0
_BLOCK, _ROOM = 1 << 16, 1 << 20
_QUIET_S = 5.0  # after a client has sent its last byte: how long the pod may pause before the connection is closed
_POLL_S = 0.2
_READ_S = 30.0  # for the rest of a frame that has begun


class PortForward:
    """Forwards connections until closed. `address` is host:port on this machine.

    `choose` names the pod for a new connection, so that a pod that was replaced meanwhile is no obstacle. What goes
    wrong with one connection is told to `report` and ends that connection alone.
    """

    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        choose: Callable[[], str],
        pod_port: int,
        local_port: int = 0,
        report: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Raises ClusterError when the port is not allowed or the local one is in use."""
        self._cluster, self._namespace, self._choose, self._pod_port = cluster, namespace, choose, pod_port
        self._report, self._closed = report, threading.Event()
        self._listener = _listen(local_port)
        try:
            self._connect().shutdown()  # a refusal is told now, and not to the first connection
        except BaseException:
            self._listener.close()
            raise
        self._connections: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept, name="port forward", daemon=True)
        self._acceptor.start()

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        """Ends the listener and every connection. May be called twice."""
        self._closed.set()
        self._acceptor.join()
        for thread in self._connections:
            thread.join()
        self._listener.close()

    def __enter__(self) -> PortForward:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            thread = threading.Thread(target=self._serve, args=(client,), name="port forward, connection", daemon=True)
            self._connections = [*(other for other in self._connections if other.is_alive()), thread]
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                websocket = self._connect()
            except ClusterError as error:
                self._report(str(error))
                return
            try:
                error_text = Tunnel(client, websocket).carry(self._closed.is_set)
            finally:
                websocket.shutdown()
            if error_text:
                self._report(f"port {self._pod_port}: {error_text}")

    def _connect(self) -> WebSocket:
        """The library's websocket: its credentials, TLS and proxy. Raises ClusterError, mostly for rights and pods."""
        from kubernetes.stream.ws_client import create_websocket, get_websocket_url
        from websocket import WebSocketException

        pod, api = self._choose(), self._cluster.api
        action = Operation("get", PODS, self._namespace, pod, "portforward")
        path = PODS.path(self._namespace, pod, "portforward")
        query = [("ports", str(self._pod_port))]
        try:
            _, url, headers, *_ = api.param_serialize(
                "GET", path, query_params=query, header_params={}, auth_settings=["BearerToken"]
            )
            headers = {**headers, "sec-websocket-protocol": _PROTOCOL}
            return create_websocket(api.configuration, get_websocket_url(url), headers)
        except (WebSocketException, OSError) as error:
            raise _refused(error, action) from error


class Tunnel:
    """One connection: bytes of a client as frames of a websocket, and back.

    One thread for both directions, because a TLS connection is not to be read and written by two. It never waits for
    one direction while the other could move, so that two ends that both talk much do not stop each other.
    """

    def __init__(self, client: socket.socket, websocket: WebSocket) -> None:
        client.setblocking(False)
        websocket.settimeout(_READ_S)
        self._client, self._websocket = client, websocket
        self._upward, self._downward = b"", b""  # frames not sent yet; bytes for the client
        self._speaking = self._listening = True  # the client has not ended; the pod has not
        self._begun: set[int] = set()
        self._channel, self._error = _DATA, ""

    def carry(self, stopped: Callable[[], bool]) -> str:
        """Returns when either end is done or `stopped`: what the pod's node said of an error, else nothing.

        The protocol knows no half-closed connection: after the client's last byte the pod may still answer, until it
        pauses.
        """
        heard = time.monotonic()
        with contextlib.suppress(OSError):  # an end that is gone
            while not stopped() and (self._listening or self._downward):
                if not self._speaking and time.monotonic() - heard > _QUIET_S:
                    break
                client, pod = self._ready()
                if pod & ~select.POLLOUT:
                    heard = time.monotonic()
                    self._hear()
                if pod & select.POLLOUT and self._upward:
                    self._upward = self._upward[self._send() :]
                if client & ~select.POLLOUT:
                    self._listen()
                if client & select.POLLOUT and self._downward:
                    self._downward = self._downward[self._client.send(self._downward) :]
        return self._error

    def _ready(self) -> tuple[int, int]:
        """What client and pod are ready for. An end whose reader is slow is not read from."""
        waiting, ends = select.poll(), (self._client.fileno(), self._websocket.fileno())
        wanted = (
            select.POLLIN * (self._speaking and len(self._upward) < _ROOM) | select.POLLOUT * bool(self._downward),
            self._listening * (select.POLLIN * (len(self._downward) < _ROOM) | select.POLLOUT * bool(self._upward)),
        )
        for end, events in zip(ends, wanted, strict=True):
            if events:
                waiting.register(end, events)
        found = dict(waiting.poll(_POLL_S * 1000))
        return found.get(ends[0], 0), found.get(ends[1], 0)

    def _listen(self) -> None:
        from websocket import ABNF

        block = self._client.recv(_BLOCK)
        self._speaking = bool(block)
        if block:
            self._upward += ABNF.create_frame(bytes([_DATA]) + block, ABNF.OPCODE_BINARY).format()

    def _send(self) -> int:
        connection = self._websocket.sock
        connection.settimeout(0)
        try:
            return int(connection.send(self._upward))
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return 0
        finally:
            connection.settimeout(_READ_S)

    def _hear(self) -> None:
        """Every frame that is there; TLS may hold some that `poll` does not see."""
        from websocket import WebSocketException

        try:
            self._take(self._websocket.recv_frame())
            while (
                self._listening and isinstance(self._websocket.sock, ssl.SSLSocket) and self._websocket.sock.pending()
            ):
                self._take(self._websocket.recv_frame())
        except (WebSocketException, OSError):
            self._listening = False

    def _take(self, frame: ABNF) -> None:
        """Channel 0 is the port's bytes, channel 1 its error; the first frame of each is the port's number."""
        from websocket import ABNF

        if frame.opcode == ABNF.OPCODE_PING:
            self._upward += ABNF.create_frame(frame.data, ABNF.OPCODE_PONG).format()
        elif frame.opcode == ABNF.OPCODE_CLOSE:
            self._listening = False
        elif frame.opcode in (ABNF.OPCODE_BINARY, ABNF.OPCODE_CONT):
            data = frame.data
            if frame.opcode == ABNF.OPCODE_BINARY:
                self._channel, data = data[0], data[1:]
                if self._channel not in self._begun:
                    self._begun.add(self._channel)
                    return
            if self._channel == _DATA:
                self._downward += data
            else:
                self._error, self._listening = self._error + data.decode(errors="replace"), False


def _listen(port: int) -> socket.socket:
    try:
        listener = socket.create_server((LOOPBACK, port))
    except OSError as error:
        raise ClusterError(
            f"local port {port}",
            got=error.strerror,
            expected="a free port",
            fix="give another --local-port, or 0 for any",
        ) from error
    listener.settimeout(_POLL_S)
    return listener


def _refused(error: Exception, action: Operation) -> ClusterError:
    """The answer to a handshake that was no success, or no answer at all."""
    code = int(getattr(error, "status_code", 0) or 0)
    if code == 403:
        both = [Operation(verb, PODS, action.namespace, action.name, "portforward") for verb in PORT_FORWARD]
        return no_rights(both, "these credentials")
    if code:
        return refused(action, code, read_status(getattr(error, "resp_body", None) or b""))
    return ClusterError(
        str(action),
        got=str(error),
        expected="a websocket to the pod",
        fix="check that the cluster and the pod run, and that no proxy on the way refuses websockets",
    )
