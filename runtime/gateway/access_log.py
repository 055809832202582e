"""One line of JSON for each request: who, what, how long. Never a prompt, a query string, a key or an answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import orjson

from runtime.gateway.trip import Trip

_TOGETHER_S = 0.2  # lines are written so often; a write for each would cost a tenth of the gateway's time
PROBED = ("/healthz", "/readyz")  # a probe every few seconds is not news while all is well
STANDARD_ERROR = Path("-")
_LARGEST = 64 << 20  # then the file becomes FILE.1, and the one that was there goes


class Logged(Protocol):
    """A request that has ended. `trace`: the client's W3C trace, empty where it sent none."""

    id: str
    caller: str
    label: str
    status: int
    bytes_in: int
    bytes_out: int
    trip: Trip

    @property
    def trace(self) -> str: ...

    @property
    def address(self) -> str: ...

    @property
    def method(self) -> str: ...


class LineFile:
    """Lines of JSON. `file` None: nothing is written; `-`: standard error, which somebody else rotates; `mode`: of one
    that is made. A disk that is full costs lines, not answers."""

    def __init__(self, file: Path | None, largest: int = _LARGEST, mode: int = 0o666) -> None:
        self._file, self._largest, self._mode = file, largest, mode
        self._stream: BinaryIO | None = None
        self._size = 0
        self._lines: list[bytes] = []
        if file is not None:
            self._open(file)

    def _open(self, file: Path) -> None:
        if file == STANDARD_ERROR:
            self._stream = open(2, "ab", buffering=0, closefd=False)  # noqa: SIM115 - as long as this lives
            return
        opener = partial(os.open, mode=self._mode)
        self._stream = open(file, "ab", buffering=0, opener=opener)  # noqa: SIM115 - as long as this lives
        self._size = self._stream.tell()

    @property
    def is_open(self) -> bool:
        return self._stream is not None

    def write(self, line: dict[str, Any]) -> None:
        if self._stream is None:
            return
        self._lines.append(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        if len(self._lines) == 1:
            asyncio.get_running_loop().call_later(_TOGETHER_S, self.flush)

    def flush(self) -> None:
        if self._stream is None or self._file is None or not self._lines:
            return
        text = b"".join(self._lines)
        self._lines.clear()
        with contextlib.suppress(OSError):
            self._size += self._stream.write(text) or 0
            if self._size > self._largest and self._file != STANDARD_ERROR:
                self._stream.close()
                self._file.replace(self._file.with_name(f"{self._file.name}.1"))
                self._open(self._file)

    def close(self) -> None:
        self.flush()
        if self._stream is not None:
            self._stream.close()


class AccessLog(LineFile):
    """One line a request; none for a probe while all is well."""

    def ended(self, request: Logged, seconds: float) -> None:
        if self.is_open and not (request.label in PROBED and request.status == 200):
            self.write(
                {
                    "time": datetime.now(UTC), "id": request.id, "caller": request.caller, "address": request.address,
                    "method": request.method, "route": request.label, "status": request.status,
                    "ms": round(1e3 * seconds, 2), "bytes_in": request.bytes_in, "bytes_out": request.bytes_out,
                    **({"trace": request.trace} if request.trace else {}),
                }
            )  # fmt: skip
