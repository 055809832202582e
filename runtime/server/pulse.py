"""Whether a gateway answers at all: a process that hangs does not die, and its clients wait in its socket."""

from __future__ import annotations

import http.client
import ssl
from concurrent.futures import Future, ThreadPoolExecutor

_EVERY_S = 2.0
_MOST_MISSED = 2  # in a row


class Pulse:
    """Asks /healthz, beside the loop that looks. Only silence counts: whoever refuses a connection lives.

    `address`: where the gateway listens; `deadline_s`: of one question.
    """

    def __init__(self, address: tuple[str, int], tls: bool, deadline_s: float) -> None:
        host, port = address
        self._host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self._port, self._tls, self._deadline_s = port, tls, deadline_s
        self._asker = ThreadPoolExecutor(1, "pulse")
        self._asked: Future[bool] | None = None
        self._due = 0.0
        self._missed = 0
        self.felt = False  # since it was started

    def lost(self, now: float) -> bool:
        """Whether it has been silent for too long. Called several times a second; never waits."""
        if self._asked is None:
            if now >= self._due:
                self._asked = self._asker.submit(self._ask)
            return False
        if self._asked.done():
            answered, self._asked, self._due = self._asked.result(), None, now + _EVERY_S
            self.felt = self.felt or answered
            self._missed = 0 if answered else self._missed + 1
        return self._missed >= _MOST_MISSED

    def forget(self) -> None:
        """Another process is about to start."""
        self.felt, self._missed = False, 0

    def close(self) -> None:
        self._asker.shutdown(wait=False)

    def _ask(self) -> bool:
        connection: http.client.HTTPConnection
        if self._tls:  # on this machine, and its name stands in no certificate
            context = ssl._create_unverified_context()
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=self._deadline_s, context=context)
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=self._deadline_s)
        try:
            connection.request("GET", "/healthz")
            connection.getresponse().read()
        except TimeoutError:
            return False
        except (OSError, http.client.HTTPException):
            return True  # it was there to break off; or it is gone, which its process id says
        finally:
            connection.close()
        return True
