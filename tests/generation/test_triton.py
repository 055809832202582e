"""Generation behind a real Triton: many streams, clients that leave, too many requests, bad ones, HTTP."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient import grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from runtime.generation.engine import generate
from runtime.generation.interface import INPUTS
from runtime.generation.request import SamplingParams
from runtime.server.launch import Ports, TritonServer
from tests.generation.setup import prompts, real_engine, write_repository

pytestmark = pytest.mark.triton
pytest_plugins = ("tests.generation.fixtures",)

PATIENCE_S = 60
SLOTS, QUEUE, LONGEST = 4, 32, 4096
INTERVAL_S = 0.05
TRITON_TYPE = {tensor.name: tensor.data_type.removeprefix("TYPE_").replace("STRING", "BYTES") for tensor in INPUTS}
NUMPY_TYPE = {"BYTES": np.object_, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_}


@pytest.fixture(scope="module")
def server(decoder_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    settings = {
        "executor": "openvino", "slots": SLOTS, "queue_size": QUEUE, "capacities": (LONGEST,), "end_ids": (),
        "stream_interval_s": INTERVAL_S,
    }  # fmt: skip
    root = write_repository(tmp_path_factory.mktemp("repository"), decoder_graph, **settings)
    with TritonServer(root, Ports.free()) as running, triton_grpc.InferenceServerClient(running.grpc_address) as client:

        def ready() -> bool:
            running.require_alive()
            try:
                return bool(client.is_model_ready("tiny"))
            except InferenceServerException:
                return False

        assert _wait(ready), running.log_tail()
        yield running


def _wait(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def _inputs(**values: Any) -> list[triton_grpc.InferInput]:
    items = []
    for name, value in values.items():
        kind = TRITON_TYPE[name]
        array = np.array([value if isinstance(value, list) else [value]], NUMPY_TYPE[kind])
        item = triton_grpc.InferInput(name, list(array.shape), kind)
        item.set_data_from_numpy(array)
        items.append(item)
    return items


class Streams:
    """One gRPC stream with any number of requests on it; what comes back lands in a queue."""

    def __init__(self, server: TritonServer) -> None:
        self._client = triton_grpc.InferenceServerClient(server.grpc_address)
        self.arrived: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()
        self.open = 0  # requests without an end
        self._client.start_stream(lambda result, error: self.arrived.put((result, error)))

    def ask(self, number: int = 0, **values: Any) -> None:
        self.open += 1
        self._client.async_stream_infer("tiny", _inputs(stream=True, **values), request_id=str(number))

    def take(self) -> tuple[int, dict[str, list[Any]]]:
        """The next response: whose it is, and its outputs. Raises what the server said."""
        result, error = self.arrived.get(timeout=PATIENCE_S)
        if error is not None:
            self.open -= 1
            raise error
        response = result.get_response()
        outputs = {item.name: result.as_numpy(item.name).ravel().tolist() for item in response.outputs}
        self.open -= "finish_reason" in outputs
        return int(response.id), outputs

    def collect(self, count: int) -> dict[int, dict[str, list[Any]]]:
        """Everything for `count` requests, joined."""
        joined: dict[int, dict[str, list[Any]]] = {}
        ended = 0
        while ended < count:
            number, outputs = self.take()
            for name, values in outputs.items():
                joined.setdefault(number, {}).setdefault(name, []).extend(values)
            ended += "finish_reason" in outputs
        return joined

    def leave(self) -> None:
        # Triton 2.51 can crash on a cancellation that meets the end of its stream.
        self._client.stop_stream(cancel_requests=self.open > 0)
        self._client.close()


@contextmanager
def _streams(server: TritonServer) -> Iterator[Streams]:
    opened = Streams(server)
    try:
        yield opened
    finally:
        opened.leave()


def _metric(server: TritonServer, name: str) -> float:
    text = urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=10).read().decode()
    lines = [line for line in text.splitlines() if line.startswith(f"trireme_generation_{name}{{")]
    return float(lines[0].rpartition(" ")[2]) if lines else 0.0


def _post(server: TritonServer, path: str, body: dict[str, Any]) -> tuple[int, str]:
    request = urllib.request.Request(
        f"http://{server.http_address}/v2/models/tiny/{path}",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_32_streams_get_what_each_would_get_alone(server: TritonServer, decoder_graph: Path) -> None:
    asked = prompts(32)
    alone = generate(real_engine(decoder_graph, (64,), 1), asked, SamplingParams(max_tokens=24))
    clients = [Streams(server) for _ in asked]
    for number, (client, prompt) in enumerate(zip(clients, asked, strict=True)):
        client.ask(number, input_ids=prompt.tolist(), max_tokens=24, return_log_probs=True)
    for number, client in enumerate(clients):
        got = client.collect(1)[number]
        assert got["output_ids"] == alone[number]
        assert len(got["output_log_probs"]) == 24
        assert got["finish_reason"] == [b"length"]
        assert (got["prompt_tokens"], got["completion_tokens"]) == ([len(asked[number])], [24])
        client.leave()


def test_tokens_that_come_close_together_travel_together(server: TritonServer) -> None:
    with _streams(server) as client:
        started = time.monotonic()
        client.ask(1, input_ids=[5, 6, 9], max_tokens=600)
        sizes, finished = [], False
        while not finished:
            _, outputs = client.take()
            sizes.append(len(outputs["output_ids"]))
            finished = "finish_reason" in outputs
        elapsed = time.monotonic() - started
    assert sum(sizes) == 600
    assert len(sizes) <= elapsed / INTERVAL_S + 2


def test_text_in_text_out_with_stop_words(server: TritonServer) -> None:
    with _streams(server) as client:
        client.ask(1, text_input=b"open a file", max_tokens=30)
        whole = b"".join(client.collect(1)[1]["text_output"]).decode()
        stop = whole[6:9]
        client.ask(2, text_input=b"open a file", max_tokens=30, stop_words=[b"not there", stop.encode()])
        got = client.collect(1)[2]
    assert b"".join(got["text_output"]).decode() == whole[: whole.index(stop)]
    assert got["finish_reason"] == [b"stop"]


def test_one_response_where_no_stream_is_asked(server: TritonServer) -> None:
    status, body = _post(server, "generate", {"text_input": "open a file", "max_tokens": 7})
    answer = json.loads(body)
    assert status == 200
    assert (answer["prompt_tokens"], answer["completion_tokens"], answer["finish_reason"]) == (5, 7, "length")
    status, body = _post(server, "generate_stream", {"text_input": "open a file", "max_tokens": 7, "stream": True})
    parts = [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line.startswith("data: ")]
    assert status == 200
    assert "".join(part["text_output"] for part in parts) == answer["text_output"]
    assert parts[-1]["finish_reason"] == "length"


def test_a_client_that_cancels_frees_its_row(server: TritonServer) -> None:
    before = _metric(server, "output_tokens_total")
    client = Streams(server)
    for number in range(2 * SLOTS):  # half of them still wait
        client.ask(number, input_ids=[5, 6, 7], max_tokens=LONGEST - 10)
    client.take()
    client.leave()
    with _streams(server) as other:  # had the rows not been freed, this would wait for all of them
        other.ask(1, input_ids=[5], max_tokens=2)
        other.collect(1)
    assert _wait(lambda: _metric(server, "output_tokens_total") > before)
    assert _metric(server, "output_tokens_total") - before < SLOTS * (LONGEST - 10)
    assert _wait(lambda: _metric(server, "running") + _metric(server, "waiting") == 0)


def test_a_client_that_is_killed_frees_its_row(server: TritonServer) -> None:
    code = (
        "import sys, time; from tests.generation.test_triton import *\n"
        "class Server: grpc_address = sys.argv[1]\n"
        "client = Streams(Server)\n"
        f"client.ask(1, input_ids=[5, 6, 8], max_tokens={LONGEST - 10})\n"
        "client.take(); print('streaming', flush=True); time.sleep(600)"
    )
    before = _metric(server, "steps_total")
    process = subprocess.Popen([sys.executable, "-c", code, server.grpc_address], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "streaming\n"
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process.stdout.close()
    assert _wait(lambda: _metric(server, "steps_total") > before)
    assert _wait(lambda: _metric(server, "running") == 0)
    assert _metric(server, "steps_total") - before < LONGEST - 10
    with _streams(server) as client:
        client.ask(1, input_ids=[5], max_tokens=2)
        assert client.collect(1)[1]["completion_tokens"] == [2]


def test_too_many_requests_are_unavailable_and_the_others_go_on(server: TritonServer) -> None:
    with _streams(server) as client:
        for number in range(SLOTS + QUEUE + 10):
            client.ask(number, input_ids=[5, 6, 7, number], max_tokens=LONGEST - 10)

        said = []
        while len(said) < 10:  # the others answer meanwhile
            try:
                client.take()
            except InferenceServerException as error:
                said.append(str(error))
        assert set(said) == {f"UNAVAILABLE: {QUEUE} requests wait already; try again later"}
        # Over HTTP, Triton 2.51 gives 400 for whatever error a model sends; the reason is there.
        assert f"{QUEUE} requests wait already" in _post(server, "generate", {"text_input": "x"})[1]
    assert _wait(lambda: _post(server, "generate", {"text_input": "x", "max_tokens": 2})[0] == 200)


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "send one of text_input and input_ids"),
    ({"text_input": b"x", "input_ids": [1]}, "send one of text_input and input_ids"),
    ({"text_input": b""}, "text_input is empty"),
    ({"text_input": b"\xff"}, "byte 0 is not valid UTF-8"),
    ({"input_ids": [5, 999]}, "input_ids holds 999; token ids of this model are 0 to 383"),
    ({"input_ids": [1] * (LONGEST + 1)}, f"this model takes at most {LONGEST}"),
    ({"text_input": b"x", "max_tokens": 0}, "max_tokens is 0; expected 1 or more"),
    ({"text_input": b"x", "max_tokens": -4}, "max_tokens is -4"),
    ({"text_input": b"x", "max_tokens": 5000}, "this model has room for"),
    ({"text_input": b"x", "temperature": float("nan")}, "temperature is nan"),
    ({"text_input": b"x", "top_p": 0.0}, "top_p is 0.0"),
    ({"text_input": b"x", "stop_words": [b"\xfe"]}, r"stop_words\[0\]: byte 0 is not valid UTF-8"),
]


def test_bad_requests_are_told_why_while_others_stream(server: TritonServer) -> None:
    with _streams(server) as running:
        running.ask(1, input_ids=[9, 9, 9], max_tokens=LONGEST - 10)
        running.take()
        for values, said in BAD:
            with _streams(server) as client:
                client.ask(1, **values)
                with pytest.raises(InferenceServerException, match=f"INVALID_ARGUMENT: .*{said}"):
                    client.take()
        status, body = _post(server, "generate", {"text_input": "x", "max_token": 3})
        assert (status, "unknown parameter max_token; did you mean max_tokens?" in body) == (400, True)
        assert running.take()[0] == 1


def test_metrics_are_plausible(server: TritonServer) -> None:
    with _streams(server) as client:
        for number in range(3):
            client.ask(number, text_input=b"open a file for reading", max_tokens=8)
        client.collect(3)

    def counted() -> bool:
        return _metric(server, "time_to_first_token_seconds_count") >= 3 and _metric(server, "reused_tokens_total") > 0

    assert _wait(counted)
    assert _metric(server, "slots") == SLOTS
    assert _metric(server, "inter_token_seconds_count") >= 21
