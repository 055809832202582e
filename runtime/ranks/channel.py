"""Messages to and from a process, each within a limit of time, in whatever pieces they come.

The bytes are those of `multiprocessing.connection.Connection`, which the other end uses: a length, then the message.
That class waits for the rest of a message as long as it takes: a process that is stopped in the middle of one, or that
reads no more, would hold its owner for ever. The limits are of whole messages, so that nobody gains by sending slowly.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections import deque

_SHORT, _LONG = struct.Struct("!i"), struct.Struct("!Q")
_LONGEST_SHORT = 0x7FFFFFFF
_FOLLOWS = -1  # in place of a short length: a long one follows


class Channel:
    """One end of a stream socket, which it owns. Never reads beyond the message that it is at, so that the socket can
    be handed on between two.
    """

    def __init__(self, end: socket.socket, *, longest: int | None = None) -> None:
        """`longest`: most bytes of a message that is accepted, for as long as the other end may be anybody."""
        end.setblocking(False)
        self._end, self.longest = end, longest
        self._outgoing: deque[memoryview] = deque()
        self._head = True  # the next bytes are a length
        self._begin(_SHORT.size)

    def fileno(self) -> int:
        return self._end.fileno()

    @property
    def unsent(self) -> bool:
        return bool(self._outgoing)

    def put(self, message: bytes) -> None:
        """Sends as much as the other end takes at once; `write` sends the rest."""
        size = len(message)
        head = _SHORT.pack(size) if size <= _LONGEST_SHORT else _SHORT.pack(_FOLLOWS) + _LONG.pack(size)
        parts = [head + message] if size <= 1 << 14 else [head, message]
        self._outgoing += [memoryview(part) for part in parts]
        self.write()

    def write(self) -> None:
        """Raises OSError when the other end is gone."""
        with contextlib.suppress(BlockingIOError):
            while self._outgoing:
                sent = self._end.send(self._outgoing[0])
                self._outgoing[0] = self._outgoing[0][sent:]
                if not self._outgoing[0]:
                    self._outgoing.popleft()

    def take(self) -> bytearray | None:
        """The next message, as bytes, once all of it is there. Raises EOFError, and OSError."""
        while True:
            try:
                count = self._end.recv_into(memoryview(self._incoming)[self._filled :])
            except BlockingIOError:
                return None
            if not count:
                raise EOFError("the other end has closed")
            self._filled += count
            if self._filled < len(self._incoming):
                continue
            if not self._head:
                message, self._head = self._incoming, True
                self._begin(_SHORT.size)
                return message
            self._read_length()

    def send_bytes(self, message: bytes, *, until: float) -> None:
        """`until` is a moment of the monotonic clock. Raises TimeoutError, or another OSError."""
        self.put(message)
        while self.unsent:
            self._await(select.POLLOUT, until)
            self.write()

    def recv_bytes(self, *, until: float) -> bytes:
        """Raises TimeoutError, another OSError, or EOFError."""
        while (message := self.take()) is None:
            self._await(select.POLLIN, until)
        return bytes(message)

    def poll(self, seconds: float) -> bool:
        """Whether there is something to read, or the end, within `seconds`."""
        ready = select.poll()
        ready.register(self._end, select.POLLIN)
        return bool(ready.poll(seconds * 1e3))

    def end_after(self, silent_ms: int) -> None:
        """Ends the connection, which is TCP, when something sent has not been acknowledged for so long."""
        self._end.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, silent_ms)

    def detach(self) -> socket.socket:
        """The socket, blocking again, for another owner: the channel is of no more use."""
        self._end.setblocking(True)
        return self._end

    def close(self) -> None:
        """May be called twice."""
        with contextlib.suppress(OSError):
            self._end.close()

    def _await(self, event: int, until: float) -> None:
        ready = select.poll()
        ready.register(self._end, event)
        if not ready.poll(max(0.0, until - time.monotonic()) * 1e3):
            raise TimeoutError("the other end is too slow")

    def _begin(self, size: int) -> None:
        self._incoming, self._filled = bytearray(size), 0

    def _read_length(self) -> None:
        if len(self._incoming) == _SHORT.size:
            [size] = _SHORT.unpack(self._incoming)
            if size == _FOLLOWS:
                self._begin(_LONG.size)
                return
        else:
            [size] = _LONG.unpack(self._incoming)
        if size < 1 or (self.longest is not None and size > self.longest):
            raise OSError(f"a message of {size} bytes")
        self._head = False
        self._begin(size)
