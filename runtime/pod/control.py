"""Health over HTTP for a kubelet: asking costs no process and no inference.

/ready   200 while a real inference of a proven version succeeded lately, or the server was seen to work on others'
         requests, the gateway before it answers, and nobody asked it to stop; 503 with the reason otherwise, for
         example while it starts again
/live    200 while the launcher's own loop turns: it restarts the server itself, and exits when that does not help

Whoever holds the control secret may also ask for a model version to be laid out beside the one that serves
(POST /versions/<n>), for it to be given up again (DELETE), and which one has answered (GET). The answer names the
version that is to be loaded, and its models in order; for GET, the one that is served, what is laid out beside it, and
why the one that is asked for was given up, if it was.
"""

from __future__ import annotations

import hmac
import json
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from runtime.errors import BadEnvironment
from runtime.pod.versions import Versions
from runtime.server.health import Health
from runtime.settings import ADMIN_HEADER

_REQUEST_S = 5.0
_VERSIONS = "/versions/"


@dataclass(frozen=True)
class Control:
    """What the holder of the secret may ask for."""

    secret: str
    versions: Versions

    def answer(self, method: str, path: str, secret: str) -> tuple[int, str]:
        """Status and body for a request to stage (POST), to give up (DELETE) or to look (GET)."""
        if not hmac.compare_digest(secret.encode(), self.secret.encode()):
            return 403, "restricted to who holds the control secret"
        number = path.removeprefix(_VERSIONS)
        if not number.isdecimal():
            return 404, "no such path"
        try:
            if method == "POST":
                found = self.versions.stage(int(number))
            elif method == "DELETE":
                found = self.versions.discard()
            else:
                found = self.versions.state()[0]
            staged = self.versions.staged()
        except (BadEnvironment, OSError) as error:
            return 409, str(error)
        refused = self.versions.refusal(int(number))
        said = {"version": found.version, "models": found.load_order, "staged": staged, "refused": refused}
        return 200, json.dumps(said)


class HealthServer:
    """Serves one `Health` until `close`, and `control` where it is opened. Raises OSError when the port is taken."""

    def __init__(self, health: Health, address: str, port: int, control: Control | None = None) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = _REQUEST_S  # a client that sends nothing holds a thread no longer

            def do_GET(self) -> None:
                if self.path.startswith(_VERSIONS):
                    self._control()
                    return
                checks = {"/ready": health.reachable, "/live": health.live}
                check = checks.get(self.path)
                reason = "no such path" if check is None else check()
                self._send(404 if check is None else 503 if reason else 200, reason or "ok")

            def _control(self) -> None:
                if control is None:
                    self._send(403, "versions cannot be changed: no control secret, or a replica of several hosts")
                else:
                    secret = self.headers.get(ADMIN_HEADER, "")
                    self._send(*control.answer(self.command, self.path, secret))

            do_POST = do_DELETE = _control  # noqa: N815 - names of http.server

            def _send(self, status: int, text: str) -> None:
                body = f"{text}\n".encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/plain; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                """A probe every few seconds is not news."""

        self._server = ThreadingHTTPServer((address, port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> HealthServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
