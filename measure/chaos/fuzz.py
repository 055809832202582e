"""Requests that nobody should send, over HTTP and gRPC: each is refused, soon, and nothing ends by them."""

from __future__ import annotations

import gzip
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

_METHOD = "/inference.GRPCInferenceService/ModelInfer"
_WAIT_S = 30.0
SLOW_S = 1.0  # to refuse what comes whole and at once; the gateway waits longer for what comes in pieces
_SLOW_CLIENT_S = 45.0  # beyond the gateway's own limits, of 10 s for a head and 30 s for a body
_JSON = b"application/json"


@dataclass
class Fuzzed:
    """`told`: what came back, by kind; `slowest_s`: of one that came whole."""

    told: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    slowest: str = ""

    @property
    def text(self) -> str:
        return f"{sum(self.told.values()):,} requests: {json.dumps(dict(sorted(self.told.items())))}"

    @property
    def faults(self) -> list[str]:
        answered = [f"fuzz was answered: {name}" for name in self.told if name.endswith((": OK", ": open"))]
        answered += [f"fuzz was answered: {name}" for name in self.told if name.rpartition(": ")[2][:1] in ("2", "5")]
        late = self.slowest_s > SLOW_S
        return [*answered, *([f"{self.slowest} took {self.slowest_s:.1f} s to be refused"] if late else [])]


def fuzz(port: int, grpc_address: str, model: str, count: int, chance: random.Random, slow_clients: int = 40) -> Fuzzed:
    """`count` over HTTP, as many over gRPC, and a few clients beside them that never come to an end."""
    import grpc

    found = Fuzzed()
    slow = [threading.Thread(target=_slow_client, args=(port, at, found)) for at in range(slow_clients)]
    for thread in slow:
        thread.start()
    makers = _makers(model, chance)
    with grpc.insecure_channel(grpc_address, [("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_unary(_METHOD)
        for number in range(count):
            name = list(makers)[number % len(makers)]
            data, began = makers[name](), time.monotonic()
            found.told[f"{name}: {_sent(port, data)}"] += 1
            _late(found, name, time.monotonic() - began)
            squeezed = grpc.Compression.Gzip if number % 50 == 49 else None
            message = bytes(chance.randint(1, 1 << 24)) if squeezed else chance.randbytes(chance.randint(0, 3000))
            began = time.monotonic()
            try:
                ask(message, timeout=_WAIT_S, compression=squeezed)
                found.told["grpc: OK"] += 1
            except grpc.RpcError as error:
                found.told[f"grpc: {error.code().name}"] += 1
            _late(found, "grpc", time.monotonic() - began)
    for thread in slow:
        thread.join(2 * _SLOW_CLIENT_S)
    return found


def _late(found: Fuzzed, name: str, seconds: float) -> None:
    if seconds > found.slowest_s:
        found.slowest_s, found.slowest = seconds, name


def _makers(model: str, chance: random.Random) -> dict[str, Callable[[], bytes]]:
    """Bodies by kind, none of them a request that could be answered."""
    sound = _json(model, "x")
    long = b"x" * 5_000_000
    return {
        "junk": lambda: chance.randbytes(chance.randint(1, 2000)),
        "form": lambda: _post(b"application/x-www-form-urlencoded", b"a=" + long[: chance.randint(1, len(long))]),
        "deep": lambda: _post(_JSON, b"[" * chance.randint(40, 200_000)),
        "cut": lambda: _post(_JSON, sound)[: -chance.randint(1, len(sound))],
        "both lengths": lambda: _head(b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n") + b"0\r\n\r\n",
        "two lengths": lambda: _head(b"Content-Length: 3\r\nContent-Length: 4\r\n") + b"abcd",
        "json": lambda: _post(_JSON, _json(model, chance.random())),
        "not a number": lambda: _post(_JSON, b'{"model": "%s", "input": NaN}' % model.encode()),
        "not unicode": lambda: _post(_JSON, sound.replace(b"x", b"\xff\xfe")),
        "unknown key": lambda: _post(_JSON, _json(model, "x", key=chance.random())),
        "flipped": lambda: _post(_JSON, _flipped(sound, chance)),
        "gzip": lambda: _post(_JSON, gzip.compress(b" " * chance.randint(1, 1 << 20)), b"Content-Encoding: gzip\r\n"),
        "many headers": lambda: _head(b"".join(b"H%d: 1\r\n" % at for at in range(chance.randint(101, 3000)))),
        "long header": lambda: _head(b"X: " + long[: chance.randint(1 << 15, 1 << 20)] + b"\r\n"),
        "control in header": lambda: _head(b"X: a\x00b\r\nContent-Length: 0\r\n"),
        "small chunks": lambda: _head(b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n")
        + b"1\r\n \r\n" * chance.randint(5000, 50_000),
        "trailer": lambda: _head(b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n")
        + b"2\r\n{}\r\n0\r\nX: " + long[: chance.randint(1 << 19, 1 << 20)],
        "other path": lambda: b"POST /v2/repository/models/%d/unload HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
        % chance.randint(0, 9),
    }  # fmt: skip


def _json(model: str, given: object, **more: object) -> bytes:
    return json.dumps({"model": model, "input": given, **more}).encode()


def _flipped(sound: bytes, chance: random.Random) -> bytes:
    """With a quote turned into what no JSON has there."""
    places = [at for at, byte in enumerate(sound) if byte == ord('"')]
    at = chance.choice(places)
    return sound[:at] + bytes([chance.choice(b"\x01'`[{")]) + sound[at + 1 :]


def _head(headers: bytes) -> bytes:
    return b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n"


def _post(kind: bytes, body: bytes, more: bytes = b"") -> bytes:
    return _head(b"Content-Type: %s\r\nContent-Length: %d\r\n%s" % (kind, len(body), more)) + body


def _sent(port: int, data: bytes) -> str:
    """The status, or how the connection ended. Nothing more is sent, so what is cut off gets an end at once."""
    with socket.create_connection(("127.0.0.1", port), timeout=_WAIT_S) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it was refused before it had come whole; the answer may be there
        try:
            found = connection.recv(64)
        except TimeoutError:
            return "open"
        except OSError:
            return "closed"
    return found[9:12].decode(errors="replace") if found.startswith(b"HTTP/1.1 ") else "closed"


def _slow_client(port: int, number: int, found: Fuzzed) -> None:
    """A byte of a head, or of a body, now and then: ended by the gateway's limits, or still open after them."""
    kind, end = ("slow head", "slow body")[number % 2], time.monotonic() + _SLOW_CLIENT_S
    told = "open"
    with socket.create_connection(("127.0.0.1", port), timeout=_WAIT_S) as connection:
        connection.settimeout(1.0)
        try:
            connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\n" if kind == "slow head" else
                               _head(b"Content-Type: application/json\r\nContent-Length: 10000\r\n"))  # fmt: skip
            while time.monotonic() < end:
                connection.sendall(b"a")
                try:
                    data = connection.recv(64)
                except TimeoutError:
                    continue
                told = data[9:12].decode(errors="replace") if data.startswith(b"HTTP/1.1 ") else "closed"
                break
        except OSError:
            told = "closed"
    found.told[f"{kind}: {told}"] += 1  # one operation of a Counter under the interpreter's lock
