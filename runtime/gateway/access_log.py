"""One line of JSON for each request: who, what, how long. Never a prompt, a query string, a key or an answer."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import orjson

from runtime.gateway.exchange import Exchange

_TOGETHER_S = 0.2  # lines are written so often; a write for each would cost a tenth of the gateway's time
_LARGEST = 64 << 20  # then the file becomes FILE.1, and the one that was there goes


class AccessLog:
    """`file` None: nothing is written. A disk that is full costs lines, not answers."""

    def __init__(self, file: Path | None, largest: int = _LARGEST) -> None:
        self._file, self._largest = file, largest
        self._stream: BinaryIO | None = None
        self._size = 0
        self._lines: list[bytes] = []
        if file is not None:
            self._open(file)

    def _open(self, file: Path) -> None:
        self._stream = file.open("ab", buffering=0)
        self._size = self._stream.tell()

    def write(self, exchange: Exchange, seconds: float) -> None:
        if self._stream is None or self._file is None:
            return
        line = {
            "time": datetime.now(UTC), "id": exchange.id, "caller": exchange.caller, "address": exchange.address,
            "method": exchange.scope["method"], "route": exchange.label, "status": exchange.status,
            "ms": round(1e3 * seconds, 2), "bytes_in": exchange.bytes_in, "bytes_out": exchange.bytes_out,
        }  # fmt: skip
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
            if self._size > self._largest:
                self._stream.close()
                self._file.replace(self._file.with_name(f"{self._file.name}.1"))
                self._open(self._file)

    def close(self) -> None:
        self.flush()
        if self._stream is not None:
            self._stream.close()
