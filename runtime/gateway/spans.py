"""A span for each request, by OpenTelemetry to a collector: who asked by its trace, which route and model, how long.

Never a prompt, an answer, a key or an address. Nothing waits for the collector: ended spans stand in a queue that is
bounded, and a thread sends them. OpenTelemetry is loaded when a collector is named.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from runtime.gateway.access_log import PROBED, Logged
from runtime.gateway.counters import heading
from runtime.gateway.trip import Trip

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, Span

WAITING = 2048  # spans, which may wait for the collector
_BATCH = 128  # more at once would hold the interpreter's lock for long
_TURN_MS = 1000
_SEND_S = 5.0  # of a batch, with what is tried again
_CLOSE_S = 3.0  # at the end, for those that wait
_SERVICE = "trireme-gateway"


class Spans(Protocol):
    """Hears of every request, on the event loop."""

    def begun(self, trip: Trip) -> None:
        """Makes the trip's trace one whose parent, for who is asked next, is this request."""

    def ended(self, request: Logged, seconds: float) -> None: ...

    def lines(self) -> list[str]:
        """Prometheus text."""

    def close(self) -> None: ...


@dataclass
class SpanCounts:
    """`handed`: those that the sending thread has taken. Each is written by one thread alone."""

    sent: int = 0
    failed: int = 0
    handed: int = 0
    taken: int = 0
    dropped: int = 0

    @property
    def waiting(self) -> int:
        return self.taken - self.handed


class OtlpSpans:
    """Sends to one collector until it is closed. A trace that its client says is not sampled is not sent either."""

    def __init__(self, url: str, model: str, waiting: int = WAITING) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # a line for each try; ours are for changes
        self._model, self.counts = model, SpanCounts()
        exporter = _Counting(OTLPSpanExporter(url, timeout=_SEND_S), self.counts, url)
        # The queue of the SDK's own would drop in silence, so it is never let to be full.
        batches = BatchSpanProcessor(
            exporter, max_queue_size=waiting + _BATCH, schedule_delay_millis=_TURN_MS,
            max_export_batch_size=min(_BATCH, waiting),
        )  # fmt: skip
        resource = Resource.create({"service.name": _SERVICE})  # OTEL_SERVICE_NAME goes before
        self._provider = TracerProvider(ParentBased(ALWAYS_ON), resource, shutdown_on_exit=False)
        self._provider.add_span_processor(_Bounded(batches, self.counts, waiting))
        self._tracer = self._provider.get_tracer("trireme.gateway")
        self._context = TraceContextTextMapPropagator()

    def begun(self, trip: Trip) -> None:
        from opentelemetry.trace import SpanKind

        parent = self._context.extract({"traceparent": trip.trace} if trip.trace else {})
        # Its name is known when its route is.
        trip.span = self._tracer.start_span("request", parent, SpanKind.SERVER)
        own = trip.span.get_span_context()
        trip.trace = f"00-{own.trace_id:032x}-{own.span_id:016x}-{own.trace_flags:02x}"

    def ended(self, request: Logged, seconds: float) -> None:
        from opentelemetry.trace import StatusCode

        trip, span = request.trip, request.trip.span
        if span is None or not span.is_recording() or (request.label in PROBED and request.status == 200):
            return
        span.update_name(f"{request.method} {request.label}")
        told: dict[str, Any] = {
            "http.request.method": request.method, "http.route": request.label,
            "http.response.status_code": request.status, "http.request.body.size": request.bytes_in,
            "http.response.body.size": request.bytes_out, "trireme.request_id": request.id,
            "trireme.duration_s": seconds,
        }  # fmt: skip
        if trip.answered:
            told["trireme.first_byte_s"] = trip.answered - trip.started
        if trip.lane is not None:
            told |= {"gen_ai.request.model": self._model, "trireme.version": trip.lane.version}
        for name, count in (("input", trip.tokens_in), ("output", trip.tokens_out)):
            if count is not None:
                told[f"gen_ai.usage.{name}_tokens"] = count
        span.set_attributes(told)
        if request.status >= 500:
            span.set_status(StatusCode.ERROR)
        span.end()

    def lines(self) -> list[str]:
        name, counts = "trireme_gateway_spans_total", self.counts
        told = {"sent": counts.sent, "failed": counts.failed, "dropped": counts.dropped}
        found = heading(name, "counter", "Spans of requests; dropped: the queue to the collector was full")
        found += [f'{name}{{result="{result}"}} {count}' for result, count in told.items()]
        name = "trireme_gateway_spans_waiting"
        return [*found, *heading(name, "gauge", "Spans that wait for the collector"), f"{name} {counts.waiting}"]

    def close(self) -> None:
        """Sends what waits, for a moment; a collector that is away does not hold up an end."""
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(_CLOSE_S)


class _Bounded:
    """The SDK's processor of batches behind a door that shuts when so many wait. Its methods are the SDK's."""

    def __init__(self, batches: Any, counts: SpanCounts, most: int) -> None:
        self._batches, self._counts, self._most = batches, counts, most

    def on_start(self, span: Span, parent_context: Any = None) -> None:
        self._batches.on_start(span, parent_context)

    def _on_ending(self, span: Span) -> None:
        self._batches._on_ending(span)

    def on_end(self, span: ReadableSpan) -> None:
        if self._counts.waiting >= self._most:
            self._counts.dropped += 1
            return
        self._counts.taken += 1
        self._batches.on_end(span)

    def shutdown(self) -> None:
        self._batches.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return bool(self._batches.force_flush(timeout_millis))


class _Counting:
    """The SDK's exporter, counted; one line says that the collector is away, and one that it is back."""

    def __init__(self, exporter: Any, counts: SpanCounts, url: str) -> None:
        self._exporter, self._counts, self._url = exporter, counts, url
        self._away = False

    def export(self, spans: Sequence[ReadableSpan]) -> Any:
        from opentelemetry.sdk.trace.export import SpanExportResult

        self._counts.handed += len(spans)
        result = self._exporter.export(spans)
        sound = result is SpanExportResult.SUCCESS
        if sound:
            self._counts.sent += len(spans)
        else:
            self._counts.failed += len(spans)
        if sound is self._away:
            self._away = not sound
            word = "takes spans again" if sound else "does not take spans; requests are served as ever"
            print(f"gateway: {self._url} {word}", file=sys.stderr, flush=True)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return bool(self._exporter.force_flush(timeout_millis))
