"""The websocket port-forward of the fake API server: v4.channel.k8s.io, frames by wsproto, the pod is a local port."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import socket
import threading
from http.server import BaseHTTPRequestHandler

from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection
from wsproto.utilities import LocalProtocolError

from tests.cluster.fake_cluster import FakeCluster

_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455
_DATA, _ERROR = b"\x00", b"\x01"


def serve_port_forward(
    handler: BaseHTTPRequestHandler, cluster: FakeCluster, namespace: str, pod: str, port: int
) -> None:
    """Channel 0 carries the bytes, channel 1 an error; each begins with the port as two bytes, little end first."""
    address = cluster.pod_address(namespace, pod, port)  # raises before the handshake for a pod that is not there
    key = handler.headers["Sec-WebSocket-Key"]
    handler.send_response(101)
    handler.send_header("Upgrade", "websocket")
    handler.send_header("Connection", "Upgrade")
    handler.send_header("Sec-WebSocket-Protocol", "v4.channel.k8s.io")
    accept = base64.b64encode(hashlib.sha1(f"{key}{_GUID}".encode()).digest()).decode()
    handler.send_header("Sec-WebSocket-Accept", accept)
    handler.end_headers()
    handler.wfile.flush()
    handler.close_connection = True
    websocket, out = Connection(ConnectionType.SERVER), handler.connection

    def send(channel: bytes, data: bytes) -> None:
        out.sendall(websocket.send(BytesMessage(channel + data)))

    for channel in (_DATA, _ERROR):
        send(channel, port.to_bytes(2, "little"))
    try:
        if address is None:
            raise ConnectionRefusedError
        pod_side = socket.create_connection(address)
    except ConnectionRefusedError:
        send(_ERROR, f"error forwarding port {port} to pod {pod}: connection refused".encode())
        return
    with pod_side:
        downward = threading.Thread(target=_downward, args=(pod_side, out, websocket))
        downward.start()
        with contextlib.suppress(OSError):  # either end is gone
            _upward(websocket, out, pod_side)
        shut(pod_side)
        downward.join()


def _downward(pod_side: socket.socket, out: socket.socket, websocket: Connection) -> None:
    """From the pod, by a thread of its own as in the real server: neither direction waits for the other."""
    try:
        while data := pod_side.recv(1 << 16):
            out.sendall(websocket.send(BytesMessage(_DATA + data)))
        out.sendall(websocket.send(CloseConnection(1000)))
    except (OSError, LocalProtocolError):
        pass  # the other end has closed already
    shut(out)


def _upward(websocket: Connection, out: socket.socket, pod_side: socket.socket) -> None:
    begun = False  # large frames come in several events, and only the first has the channel
    while received := out.recv(1 << 16):
        websocket.receive_data(received)
        for event in websocket.events():
            if isinstance(event, CloseConnection):
                return
            if isinstance(event, BytesMessage):
                pod_side.sendall(bytes(event.data)[0 if begun else 1 :])
                begun = not event.message_finished


def shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
