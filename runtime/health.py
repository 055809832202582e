"""Health over HTTP for a kubelet: asking costs no process and no inference.

/ready   200 while a real inference succeeded lately and nobody asked the server to stop
/live    200 while the launcher's own loop turns
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from runtime.supervisor import Failure

READY_WITHIN_S = 15.0  # a few intervals of the supervisor's probe, each with its timeout
# A full queue refuses the probe too. Were the pod taken out for it, its load would fall on the others, one by one.
BUSY_WITHIN_S = 60.0
LIVE_WITHIN_S = 240.0  # a repair loads every model again, and may take a minute for each
_REQUEST_S = 5.0


class Health:
    """What the launcher knows, read by many threads. Times are of the monotonic clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._served = float("-inf")
        self._turned = self._clock()
        self._failure: Failure | None = Failure("starting")
        self._draining = False

    def observed(self, failure: Failure | None) -> None:
        """The result of a probe; None is a success. That there is one shows that the loop turns."""
        with self._lock:
            self._turned = self._clock()
            self._failure = failure
            if failure is None:
                self._served = self._turned

    def drain(self) -> None:
        """From here on never ready again."""
        with self._lock:
            self._draining = True

    def ready(self) -> str | None:
        """None when ready, else the reason."""
        with self._lock:
            if self._draining:
                return "draining"
            busy = self._failure is not None and self._failure.busy
            if self._clock() - self._served <= (BUSY_WITHIN_S if busy else READY_WITHIN_S):
                return None
            return self._failure.reason if self._failure else "no inference has succeeded lately"

    def live(self) -> str | None:
        """None when alive, else the reason."""
        with self._lock:
            age = self._clock() - self._turned
        return None if age <= LIVE_WITHIN_S else f"the supervisor has not turned for {age:.0f} s"


class HealthServer:
    """Serves one `Health` until `close`. Raises OSError when the port is taken."""

    def __init__(self, health: Health, address: str, port: int) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = _REQUEST_S  # a client that sends nothing holds a thread no longer

            def do_GET(self) -> None:
                checks = {"/ready": health.ready, "/live": health.live}
                check = checks.get(self.path)
                reason = "no such path" if check is None else check()
                body = f"{reason or 'ok'}\n".encode()
                self.send_response(404 if check is None else 503 if reason else 200)
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
