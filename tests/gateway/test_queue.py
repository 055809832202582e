"""Who waits for an encoder behind the gateway, how many and how long: before a real Triton, which bounds neither."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from builders import pipeline
from runtime.server.supervise import ready_server
from tests.conftest import tiny_spec
from tests.gateway.asking import gateway_ports, post_json

pytestmark = pytest.mark.triton
TEXT = "open a file, and read what is in it"


@pytest.fixture(scope="module")
def port(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """One request waits and one computes."""
    spec = tiny_spec(tiny_bert, serving={"max_batch_size": 1, "queue_size": 1, "length_buckets": [64]})
    built = pipeline.build(spec, "cpu", tmp_path_factory.mktemp("queue"), "repository")
    assert built.entry is not None
    with (
        ready_server(built.entry.repository) as server,
        gateway_ports("tiny", server.ports.http, server.ports.metrics) as found,
    ):
        yield found["gateway"]


def _infer(port: int, **parameters: int) -> tuple[int, str]:
    item = {"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": [TEXT]}
    status, answer = post_json(port, "/v2/models/tiny/infer", {"inputs": [item], "parameters": parameters})
    return status, answer.get("error", "")


def test_a_full_queue_is_429_and_nobody_is_lost(port: int) -> None:
    with ThreadPoolExecutor(16) as pool:
        told = Counter(one.result() for one in [pool.submit(_infer, port) for _ in range(200)])
    assert set(told) == {(200, ""), (429, "2 requests wait or run already; try again later")}, told
    assert _infer(port) == (200, "")


def test_a_request_has_the_time_that_it_brings(port: int) -> None:
    assert _infer(port, timeout=60_000_000) == (200, "")
    assert _infer(port, timeout=1) == (504, "no answer within the request's own timeout, 1 us")
    assert _infer(port, timeout=-1) == (400, "parameter 'timeout' is -1; send 0 or more")
