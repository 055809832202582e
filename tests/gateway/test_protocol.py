"""The process over raw sockets: what ends Triton ends nothing here, and nothing is waited for forever."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from runtime.gateway.limits import DoorLimits
from tests.gateway.asking import exchange_raw, gateway
from tests.gateway.killers import killers

KILLERS = killers("/v1/embeddings")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with gateway("m") as found:
        yield found


def _healthy(port: int) -> bool:
    return b"200 OK" in exchange_raw(port, b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")


@pytest.mark.parametrize("name", KILLERS)
def test_killers_are_refused_or_cut_off(port: int, name: str) -> None:
    answer = exchange_raw(port, *KILLERS[name])
    assert not answer or answer.startswith(b"HTTP/1.1 4"), answer[:200]
    assert answer.count(b"HTTP/1.1 ") <= 1, "a second request was answered"
    assert _healthy(port)


def test_others_are_answered_while_a_killer_is_read(port: int) -> None:
    """Nothing in it may hold the loop: a second client gets its answers all the while."""
    sender = threading.Thread(target=exchange_raw, args=(port, *KILLERS["chunks"]))
    sender.start()
    answers = [_healthy(port) for _ in range(5)]
    sender.join(60)
    assert all(answers)


def test_a_body_that_nobody_asked_for_is_not_received(port: int) -> None:
    """The answer is there before the body, and the connection ends with it."""
    head = b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n"
    answer = exchange_raw(port, head)
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"connection: close" in answer


def test_pipelined_requests_are_answered_in_their_order(port: int) -> None:
    answer = exchange_raw(
        port,
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    )
    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.index(b"ok\n") < answer.index(b'"object":"list"')


def test_an_answer_comes_as_one_piece(port: int) -> None:
    """Two pieces are two packets, and wake whoever waits twice."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for _ in range(20):
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
            head, _, body = connection.recv(1 << 16).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert body.endswith(b"}]}")


def test_head_is_get_without_its_body(port: int) -> None:
    head, _, body = exchange_raw(port, b"HEAD /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").partition(
        b"\r\n\r\n"
    )
    assert head.startswith(b"HTTP/1.1 200")
    assert b"content-length: " in head
    assert not body


def test_an_idle_connection_is_closed_whatever_lines_it_sends() -> None:
    """An empty line begins no request."""
    with (
        gateway("m", 9, 9, "--keep-alive-s", "0.5") as port,
        socket.create_connection(("127.0.0.1", port), timeout=20) as connection,
    ):
        for _ in range(2):
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        connection.sendall(b"\r\n")
        assert connection.recv(1000) == b""


def test_the_second_of_two_heads_that_come_together_is_bounded_too(port: int) -> None:
    small = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    large = b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (40 << 10) + b"\r\n\r\n"
    assert b"HTTP/1.1 431" in exchange_raw(port, small + large)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET /healthz HTT",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nX-Slow: ",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{",
    ],
)
def test_slow_heads_and_bodies_are_given_up(said: bytes) -> None:
    with gateway("m", 9, 9, "--head-s", "0.5", "--body-s", "0.5") as port:
        answer = exchange_raw(port, said)
        assert answer.startswith(b"HTTP/1.1 408")
        assert _healthy(port)


def test_a_trickle_does_not_move_the_deadline() -> None:
    with (
        gateway("m", 9, 9, "--head-s", "0.5") as port,
        socket.create_connection(("127.0.0.1", port), timeout=20) as connection,
    ):
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        sent = 0
        try:
            while sent < 100_000:
                connection.sendall(b"X-A: b\r\n")
                sent += 1
                time.sleep(0.02)  # the trickle is what is tested
        except ConnectionError:
            pass
        assert sent < 1000


def test_what_is_only_declared_takes_no_room_from_others() -> None:
    request = b'{"model": "m", "input": "x"}'
    as_json = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
    with gateway("m", 9, 9, "--bytes-in-flight", "1000") as port:
        held = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(4)]
        for one in held:
            one.sendall(as_json % 900 + b"Expect: 100-continue\r\n\r\n")
            assert one.recv(1000).startswith(b"HTTP/1.1 100")  # it reads
        answer = exchange_raw(port, as_json % len(request) + b"Connection: close\r\n\r\n" + request)
        assert answer.startswith(b"HTTP/1.1 503"), "there is no model's server"
        for one in held:
            one.close()


def test_connections_of_one_address_are_bounded() -> None:
    most = 3
    with gateway("m", 9, 9, "--connections-per-address", str(most)) as port:
        held = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(most)]
        for one in held:  # answered: the gateway knows of them
            one.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert one.recv(1000).startswith(b"HTTP/1.1 200")
        assert not exchange_raw(port, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        held.pop().close()
        assert _wait_healthy(port)
        for one in held:
            one.close()


def _wait_healthy(port: int) -> bool:
    """The gateway hears of a closed connection a moment later."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if exchange_raw(port, b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"):
            return True
    return False


def test_limits_have_room_for_what_they_bound() -> None:
    limits = DoorLimits()
    assert limits.bytes_in_flight > limits.body_bytes
    assert limits.requests >= limits.requests_per_key
