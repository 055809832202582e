"""Spans of requests at a collector, which is a few lines here and OpenTelemetry's own encoding."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import pytest

from runtime.errors import BadEnvironment
from runtime.otlp import traces_url
from runtime.server.gateway_process import Doorway
from tests.conftest import wait_until
from tests.gateway.asking import FakeTriton, doors_of, gateway_ports, get, post

pytest.importorskip("opentelemetry.sdk", reason="the extra otlp is not installed")

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"


@dataclass
class Collector:
    """`answers` clear: it takes what comes and says nothing until it is set."""

    port: int = 0
    status: int = 200
    spans: list[Any] = field(default_factory=list)
    resources: list[Any] = field(default_factory=list)
    asked: threading.Event = field(default_factory=threading.Event)
    answers: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def collecting(**how: Any) -> Iterator[Collector]:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    found = Collector(**how)
    found.answers.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.asked.set()
            found.answers.wait(60)
            if self.path == "/v1/traces" and found.status == 200:
                for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                    found.resources.append(group.resource)
                    found.spans += [span for scope in group.scope_spans for span in scope.spans]
            self.send_response(found.status if self.path == "/v1/traces" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        found.port = server.server_address[1]
        yield found
    finally:
        found.answers.set()
        server.shutdown()
        server.server_close()
        thread.join(20)


def _spans(url: str, waiting: int = 2048) -> Any:
    from runtime.gateway.spans import OtlpSpans

    return OtlpSpans(traces_url(url), "m", waiting)


def _told(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def _counts(spans: Any) -> dict[str, int]:
    stem = 'trireme_gateway_spans_total{result="'
    found = [line.removeprefix(stem) for line in spans.lines() if line.startswith(stem)]
    return {line.partition('"')[0]: int(line.rpartition(" ")[2]) for line in found}


def test_each_request_is_a_span_of_its_clients_trace_without_texts() -> None:
    with collecting() as collector:
        spans = _spans(collector.url)
        door = doors_of(FakeTriton(generates=True), spans=spans).http
        asked = {"model": "m", "prompt": "a secret prompt", "n": 2}
        answer = post(door, "/v1/completions", asked, {"traceparent": SAMPLED})
        assert post(door, "/v1/completions", {"model": "m"}).status == 400
        assert get(door, "/healthz").status == 200
        post(door, "/v1/completions", {"model": "m", "prompt": "x"}, {"traceparent": UNSAMPLED})
        spans.close()
    assert _counts(spans) == {"sent": 2, "failed": 0, "dropped": 0}
    first, refused = collector.spans
    assert (first.trace_id.hex(), first.parent_span_id.hex(), first.name) == (TRACE, PARENT, "POST /v1/completions")
    assert (refused.parent_span_id, _told(refused)["http.response.status_code"]) == (b"", 400)
    told = _told(first)
    assert 0 < told.pop("trireme.first_byte_s") <= told.pop("trireme.duration_s")
    assert first.start_time_unix_nano < first.end_time_unix_nano
    assert told == {
        "http.request.method": "POST", "http.route": "/v1/completions", "http.response.status_code": 200,
        "http.request.body.size": len(json.dumps(asked)), "http.response.body.size": len(answer.body),
        "trireme.request_id": answer.headers["x-request-id"], "trireme.version": 3, "gen_ai.request.model": "m",
        "gen_ai.usage.input_tokens": 5, "gen_ai.usage.output_tokens": 6,
    }  # fmt: skip
    assert not any(b"secret" in span.SerializeToString() for span in collector.spans)
    assert {one.key: one.value.string_value for one in collector.resources[0].attributes}["service.name"]


class _Heard(FakeTriton):
    """Notes the trace that it is asked with."""

    async def infer(self, *given: Any) -> Any:
        from runtime.gateway.trip import TRIP

        found = await super().infer(*given)
        self.asked[-1] = TRIP.get().trace
        return found


def test_the_model_is_asked_as_a_child_of_the_span() -> None:
    with collecting() as collector:
        spans, triton = _spans(collector.url), _Heard()
        assert post(doors_of(triton, spans=spans).http, "/v1/embeddings", {"model": "m", "input": "x"}).status == 200
        spans.close()
    (span,) = collector.spans
    assert triton.asked[0].rpartition("-")[0] == f"00-{span.trace_id.hex()}-{span.span_id.hex()}"
    assert _told(span)["gen_ai.usage.input_tokens"] == 4


def test_a_collector_that_does_not_answer_holds_up_nobody_and_what_is_too_much_is_counted() -> None:
    with collecting() as collector:
        collector.answers.clear()
        spans = _spans(collector.url, waiting=4)
        door = doors_of(FakeTriton(), spans=spans).http
        for _ in range(4):
            assert get(door, "/v1/models").status == 200
        assert collector.asked.wait(20)  # these are with the sender, and four more may wait
        for _ in range(10):
            assert get(door, "/v1/models").status == 200
        assert _counts(spans) == {"sent": 0, "failed": 0, "dropped": 6}
        assert b'spans_total{result="dropped"} 6' in get(door, "/metrics").body
        collector.answers.set()
        spans.close()
        assert wait_until(lambda: _counts(spans)["sent"] == 8, 20)


def test_spans_that_the_collector_refuses_are_counted_and_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    def failed(number: int) -> bool:
        return wait_until(lambda: _counts(spans)["failed"] == number, 20)

    with collecting(status=400) as collector:
        spans = _spans(collector.url, waiting=1)
        door = doors_of(FakeTriton(), spans=spans).http
        for number in (1, 2):
            assert get(door, "/v1/models").status == 200
            assert failed(number)
        collector.status = 200
        assert get(door, "/v1/models").status == 200
        spans.close()
    assert _counts(spans) == {"sent": 1, "failed": 2, "dropped": 0}
    told = capfd.readouterr().err.splitlines()
    assert [line.rpartition("/v1/traces ")[2][:11] for line in told] == ["does not ta", "takes spans"]


def test_a_gateway_sends_spans_of_both_doors_and_of_each_request_of_a_stream() -> None:
    options = ("--grpc-port", "0", "--otlp-endpoint")
    with collecting() as collector:
        with gateway_ports("m", 9, 9, *options, collector.url) as ports:
            connection = http.client.HTTPConnection("127.0.0.1", ports["gateway"], timeout=20)
            connection.request("GET", "/v1/models", headers={"traceparent": SAMPLED})
            assert connection.getresponse().status == 200
            connection.close()
            address, plain = f"127.0.0.1:{ports['grpc']}", [("grpc.enable_http_proxy", 0)]
            with grpc.insecure_channel(address, plain) as channel:
                ask = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
                assert len(list(ask(iter([b"\x0a\x01m"]), timeout=20, metadata=[("traceparent", SAMPLED)]))) == 1
        found = {span.name.rpartition("/")[2]: span for span in collector.spans}
        assert set(found) == {"models", "ModelStreamInfer", "request"}  # SIGTERM sent what waited
        assert all(span.trace_id.hex() == TRACE for span in found.values())
        assert found["request"].parent_span_id == found["ModelStreamInfer"].span_id
        assert found["ModelStreamInfer"].parent_span_id.hex() == PARENT


def test_what_is_no_collector_or_not_installed_is_refused_by_name() -> None:
    for endpoint, said in (
        ("collector:4318", "give http://host:4318"), ("http://:4318", "give http://host:4318"),
        ("http://h:x", "give http://host:4318"), ("http://me:word@h", "OTEL_EXPORTER_OTLP_HEADERS"),
    ):  # fmt: skip
        with pytest.raises(BadEnvironment, match=said):
            Doorway(0, otlp_endpoint=endpoint).require_closed()
    with pytest.raises(BadEnvironment, match=r"pip install 'trireme\[otlp\]'"):
        traces_url("http://h:4318", needed=("opentelemetry.exporter.of.nobody",))
    assert traces_url("http://h:4318/") == "http://h:4318/v1/traces"
    assert traces_url("https://h/own/path") == "https://h/own/path"
