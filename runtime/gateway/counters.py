"""What the gateway counts, as Prometheus text."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass
class DoorCounters:
    """Labels are of our own route table, so that there are few."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    seconds: dict[str, list[int]] = field(default_factory=dict)
    seconds_sum: Counter[str] = field(default_factory=Counter)
    bytes_in: int = 0
    bytes_out: int = 0
    running: int = 0

    def ended(self, route: str, status: int, seconds: float, bytes_in: int, bytes_out: int) -> None:
        self.requests[route, status] += 1
        buckets = self.seconds.setdefault(route, [0] * (len(BOUNDS_S) + 1))
        buckets[bisect_left(BOUNDS_S, seconds)] += 1
        self.seconds_sum[route] += seconds  # type: ignore[assignment]  # a Counter adds what it is given
        self.bytes_in += bytes_in
        self.bytes_out += bytes_out

    def page(self, held_bytes: int, draining: bool) -> bytes:
        lines = _head(
            "requests_total", "counter", "Requests that have ended, by route and status; 499: the client left"
        )
        lines += [
            f'trireme_gateway_requests_total{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self.requests.items())
        ]
        lines += _head("request_seconds", "histogram", "Whole requests, from their head to the last byte")
        for route, buckets in sorted(self.seconds.items()):
            so_far = 0
            for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), buckets, strict=True):
                so_far += count
                lines.append(f'trireme_gateway_request_seconds_bucket{{route="{route}",le="{bound}"}} {so_far}')
            lines.append(f'trireme_gateway_request_seconds_sum{{route="{route}"}} {self.seconds_sum[route]:.6f}')
            lines.append(f'trireme_gateway_request_seconds_count{{route="{route}"}} {so_far}')
        for name, kind, said, value in (
            ("running", "gauge", "Requests that are being answered", self.running),
            ("held_bytes", "gauge", "Bytes of bodies that are held", held_bytes),
            ("draining", "gauge", "1 from SIGTERM on", int(draining)),
            ("received_bytes_total", "counter", "Bytes of bodies that came", self.bytes_in),
            ("sent_bytes_total", "counter", "Bytes of bodies that went out", self.bytes_out),
        ):
            lines += [*_head(name, kind, said), f"trireme_gateway_{name} {value}"]
        return "\n".join([*lines, ""]).encode()


def _head(name: str, kind: str, said: str) -> list[str]:
    return [f"# HELP trireme_gateway_{name} {said}", f"# TYPE trireme_gateway_{name} {kind}"]
