"""`/control/versions`: how traffic is split between versions, seen and set by who holds the control secret."""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import orjson
from msgspec import Meta

from runtime.errors import BadEnvironment
from runtime.gateway.bodies import read_json
from runtime.gateway.counters import heading, histogram_lines
from runtime.gateway.exchange import Exchange
from runtime.gateway.limits import DoorLimits
from runtime.gateway.refused import Refused
from runtime.gateway.versions import Neighbour, ServedVersions, Tally
from runtime.settings import ADMIN_HEADER

Port = Annotated[int, Meta(ge=1, le=65535)]
Weight = Annotated[float, Meta(ge=0, le=1e6)]
VersionNumber = Annotated[str, Meta(pattern=r"^[1-9][0-9]{0,17}$")]


class Beside(msgspec.Struct, forbid_unknown_fields=True):
    """A server on loopback that somebody started."""

    http_port: Port
    metrics_port: Port
    repository: str | None = None


class TrafficRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Replaces what was set before. ServedVersions without a weight get nothing but what is pinned to them."""

    weights: dict[VersionNumber, Weight]
    versions: dict[VersionNumber, Beside] = {}
    mirror: VersionNumber | None = None


_REQUEST = msgspec.json.Decoder(TrafficRequest)


def read_secret(file: Path) -> bytes:
    """Raises BadEnvironment for one that can be guessed, or cannot be sent."""
    try:
        text = file.read_text().strip()
    except (OSError, ValueError) as error:
        raise BadEnvironment(f"--control-secret-file {file} cannot be read: {error}") from error
    if not re.fullmatch(r"[A-Za-z0-9_-]{16,256}", text):
        raise BadEnvironment(f"--control-secret-file {file}: a control secret has at least 16 letters, digits, - or _")
    return text.encode()


@dataclass(frozen=True)
class VersionControl:
    """Routes name `look` and `set`. Both ask for the secret before anything is read."""

    versions: ServedVersions
    secret: bytes
    limits: DoorLimits

    async def look(self, exchange: Exchange) -> None:
        self._require_secret(exchange)
        await self.versions.look()
        await exchange.answer(orjson.dumps(state(self.versions)))

    async def set(self, exchange: Exchange) -> None:
        self._require_secret(exchange)
        asked = read_json(await exchange.body(), _REQUEST, self.limits.depth)
        beside = [
            Neighbour(
                int(number), one.http_port, one.metrics_port, None if one.repository is None else Path(one.repository)
            )
            for number, one in asked.versions.items()
        ]
        weights = {int(number): weight for number, weight in asked.weights.items()}
        await self.versions.set(beside, weights, None if asked.mirror is None else int(asked.mirror))
        await exchange.answer(orjson.dumps(state(self.versions)))

    def _require_secret(self, exchange: Exchange) -> None:
        given = exchange.headers.get(ADMIN_HEADER.encode(), b"")
        if not hmac.compare_digest(given, self.secret):
            raise Refused(403, "restricted to who holds the control secret", close=True)


def state(versions: ServedVersions) -> dict[str, Any]:
    """What is set, and what became of the requests since each version was named."""
    traffic, mirror = versions.traffic, versions.mirror
    total = sum(traffic.weights)
    return {
        "set": traffic.number,
        "mirror": None if traffic.mirror is None else str(traffic.mirror.version),
        "mirror_dropped": mirror.dropped,
        "mirror_same": mirror.same,
        "mirror_different": mirror.different,
        "versions": {
            str(lane.version): {
                "main": lane.ports is None, "weight": weight, "share": weight / total,
                "served": _told(lane.served), "mirrored": _told(lane.mirrored),
            }
            for lane, weight in zip(traffic.lanes, traffic.weights, strict=True)
        },
    }  # fmt: skip


def _told(tally: Tally) -> dict[str, Any]:
    seconds = tally.seconds
    return {
        "requests": tally.requests, "errors": tally.errors, "seconds_sum": seconds.total,
        "seconds_bounds": seconds.bounds, "seconds_counts": seconds.counts,
    }  # fmt: skip


def version_lines(versions: ServedVersions) -> list[str]:
    """The same as Prometheus text."""
    traffic, mirror, stem = versions.traffic, versions.mirror, "trireme_gateway_version"
    lines = heading(f"{stem}_weight", "gauge", "How traffic is split between versions")
    lines += [
        f'{stem}_weight{{version="{lane.version}"}} {weight:g}'
        for lane, weight in zip(traffic.lanes, traffic.weights, strict=True)
    ]
    tallies = [
        (f'version="{lane.version}",role="{role}"', tally)
        for lane in traffic.lanes
        for role, tally in (("served", lane.served), ("mirrored", lane.mirrored))
    ]
    for name, said in (("requests", "Requests by version; mirrored: copies"), ("errors", "Of these, 5xx")):
        lines += heading(f"{stem}_{name}_total", "counter", said)
        lines += [f"{stem}_{name}_total{{{labels}}} {getattr(one, name)}" for labels, one in tallies]
    lines += heading(f"{stem}_seconds", "histogram", "Whole requests by version")
    for labels, one in tallies:
        lines += histogram_lines(f"{stem}_seconds", labels, one.seconds)
    lines += heading("trireme_gateway_mirror_total", "counter", "Copies by what became of them")
    results = ("same", "different", "dropped")
    return lines + [f'trireme_gateway_mirror_total{{result="{one}"}} {getattr(mirror, one)}' for one in results]
