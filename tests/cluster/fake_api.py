"""A small Kubernetes API server for tests: the HTTP side. What it stores is in `fake_cluster`.

It speaks what the client under test uses: discovery, get, list and watch with resourceVersion, selectors, 410,
server-side apply with dry run and conflicts, create, replace, delete, access reviews, logs, and websocket port-forward.
"""

from __future__ import annotations

import json
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.cluster.fake_cluster import FakeCluster, Refusal
from tests.cluster.fake_port_forward import serve_port_forward

VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet, or each answer would wait for a delayed acknowledgement
    cluster: FakeCluster
    server: Server

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self) -> None:
        try:
            self._route()
        except Refusal as refusal:
            self._send(refusal.code, refusal.status())
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815 - names of http.server

    def _route(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = yaml.safe_load(self.rfile.read(length)) if length else {}
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if "/".join(parts) == "apis/authorization.k8s.io/v1/selfsubjectaccessreviews":
            self._send(201, self.cluster.review(body))
            return
        version, rest = (parts[1], parts[2:]) if parts[0] == "api" else ("/".join(parts[1:3]), parts[3:])
        if not rest:
            self._send(200, self.cluster.discover(version))
            return
        namespace = None
        if rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        plural, name, subresource = [*rest, None, None][:3]
        assert plural is not None
        verb = VERBS[self.command]
        if verb == "get" and name is None:
            verb = "watch" if query.get("watch") == "true" else "list"
        resource = plural if subresource is None else f"{plural}/{subresource}"
        self.cluster.requests.append((verb, resource, name))
        if subresource == "portforward":
            self.cluster.check_right("get", resource, namespace)
            self.cluster.check_right("create", resource, namespace)
            serve_port_forward(self, self.cluster, str(namespace), str(name), int(query["ports"]))
            return
        self.cluster.check_right(verb, resource, namespace, name)
        if subresource == "log":
            self._send_text(self.cluster.log(str(namespace), str(name), query))
        elif verb == "watch":
            self._watch(version, plural, namespace, query)
        else:
            self._send(*self.cluster.handle(verb, version, plural, namespace, name, query, body))

    def _send(self, code: int, item: Any) -> None:
        warning = self.cluster.warnings.get(str(item.get("kind"))) if self.command in ("POST", "PATCH") else None
        self._send_text(json.dumps(item), code, "application/json", warning)

    def _send_text(self, text: str, code: int = 200, kind: str = "text/plain", warning: str | None = None) -> None:
        data = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        if warning is not None:
            quoted = warning.replace("\\", "\\\\").replace('"', '\\"')
            self.send_header("Warning", f'299 - "{quoted}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _watch(self, version: str, plural: str, namespace: str | None, query: dict[str, str]) -> None:
        events = self.cluster.watch(version, plural, namespace, query)  # raises before anything is sent
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        for event in events:
            line = json.dumps(event).encode() + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, address: Any) -> None:
        """A client that hangs up, as one that ends a watch does, is no fault; anything else shows its stack."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, address)


@contextmanager
def serving(cluster: FakeCluster, certificate: Path | None = None) -> Iterator[str]:
    """The cluster behind a free port of loopback; yields its URL. With a certificate (and key in one file), by TLS."""
    server = Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"cluster": cluster}))
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http{'s' if certificate else ''}://127.0.0.1:{server.server_address[1]}"
    finally:
        cluster.close()
        server.shutdown()
        thread.join()
        server.server_close()


def write_kubeconfig(path: Path, url: str, namespace: str = "prod", authority: Path | None = None) -> Path:
    """A kubeconfig with one context for this server."""
    trust = {"certificate-authority": str(authority)} if authority else {}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "fake",
        "clusters": [{"name": "fake", "cluster": {"server": url, **trust}}],
        "users": [{"name": "tester", "user": {"token": "t0ken"}}],
        "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "tester", "namespace": namespace}}],
    }
    path.write_text(yaml.safe_dump(config))
    return path
