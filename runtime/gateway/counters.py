"""What the gateway counts, as Prometheus text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from runtime.generation.metrics import Histogram

BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass
class DoorCounters:
    """Labels are of our own route table, so that there are few."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    seconds: dict[str, Histogram] = field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0
    running: int = 0

    def ended(self, route: str, status: int, seconds: float, bytes_in: int, bytes_out: int) -> None:
        self.requests[route, status] += 1
        if route not in self.seconds:
            self.seconds[route] = Histogram(BOUNDS_S)
        self.seconds[route].add(seconds)
        self.bytes_in += bytes_in
        self.bytes_out += bytes_out

    def page(self, held_bytes: int, draining: bool) -> bytes:
        stem = "trireme_gateway"
        said = "Requests that have ended, by route and status; 499: the client left"
        lines = heading(f"{stem}_requests_total", "counter", said)
        lines += [
            f'{stem}_requests_total{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self.requests.items())
        ]
        name = f"{stem}_request_seconds"
        lines += heading(name, "histogram", "Whole requests, from their head to the last byte")
        for route, seconds in sorted(self.seconds.items()):
            lines += histogram_lines(name, f'route="{route}"', seconds)
        for name, kind, said, value in (
            ("running", "gauge", "Requests that are being answered", self.running),
            ("held_bytes", "gauge", "Bytes of bodies that are held", held_bytes),
            ("draining", "gauge", "1 from SIGTERM on", int(draining)),
            ("received_bytes_total", "counter", "Bytes of bodies that came", self.bytes_in),
            ("sent_bytes_total", "counter", "Bytes of bodies that went out", self.bytes_out),
        ):
            lines += [*heading(f"{stem}_{name}", kind, said), f"{stem}_{name} {value}"]
        return "\n".join([*lines, ""]).encode()


def heading(name: str, kind: str, said: str) -> list[str]:
    return [f"# HELP {name} {said}", f"# TYPE {name} {kind}"]


def histogram_lines(name: str, labels: str, histogram: Histogram) -> list[str]:
    counts = histogram.cumulative
    bounds = (*map(str, histogram.bounds), "+Inf")
    lines = [f'{name}_bucket{{{labels},le="{le}"}} {count}' for le, count in zip(bounds, counts, strict=True)]
    return [*lines, f"{name}_sum{{{labels}}} {histogram.total:.6f}", f"{name}_count{{{labels}}} {counts[-1]}"]
