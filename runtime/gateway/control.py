"""`/control/versions`: how traffic is split between versions, seen and set by who holds the control secret."""

from __future__ import annotations

import hmac
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import orjson
from msgspec import Meta

from runtime.gateway.bodies import read_json
from runtime.gateway.counters import heading, histogram_lines
from runtime.gateway.exchange import Exchange
from runtime.gateway.limits import DoorLimits
from runtime.gateway.refused import Refused
from runtime.gateway.versions import Neighbour, Place, ServedVersions, Tally
from runtime.settings import ADMIN_HEADER

Port = Annotated[int, Meta(ge=1, le=65535)]
ModelName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,200}$")]
Slow = Annotated[float, Meta(gt=0, le=3600)]
Weight = Annotated[float, Meta(ge=0, le=1e6)]
VersionNumber = Annotated[str, Meta(pattern=r"^[1-9][0-9]{0,17}$")]


class Beside(msgspec.Struct, forbid_unknown_fields=True):
    """A server on loopback that somebody started, by its two ports; without them the main server, where somebody loaded
    the version under this model's name."""

    http_port: Port | None = None
    metrics_port: Port | None = None
    model: ModelName | None = None
    repository: str | None = None

    def place(self, version: str) -> Place:
        """Raises Refused for what names no place."""
        if self.http_port is not None and self.metrics_port is not None:
            return Place((self.http_port, self.metrics_port), self.model)
        if self.http_port is None and self.metrics_port is None and self.model is not None:
            return Place(None, self.model)
        raise Refused(400, f"version {version}: give http_port and metrics_port, or without them a model")


class TrafficRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Replaces what was set before. ServedVersions without a weight get nothing but what is pinned to them."""

    weights: dict[VersionNumber, Weight]
    versions: dict[VersionNumber, Beside] = {}
    mirror: VersionNumber | None = None
    slow_s: Slow | None = None  # a request that takes longer counts as slow


_REQUEST = msgspec.json.Decoder(TrafficRequest)


@dataclass(frozen=True)
class VersionControl:
    """Routes name `look` and `set`. Both ask for the secret before anything is read."""

    versions: ServedVersions
    secret: bytes
    limits: DoorLimits

    async def look(self, exchange: Exchange) -> None:
        self._require_secret(exchange)
        await self.versions.look(anew=True)
        await exchange.answer(orjson.dumps(state(self.versions)))

    async def set(self, exchange: Exchange) -> None:
        self._require_secret(exchange)
        asked = read_json(await exchange.body(), _REQUEST, self.limits.depth)
        beside = [
            Neighbour(int(number), one.place(number), None if one.repository is None else Path(one.repository))
            for number, one in asked.versions.items()
        ]
        weights = {int(number): weight for number, weight in asked.weights.items()}
        mirror = None if asked.mirror is None else int(asked.mirror)
        await self.versions.set(beside, weights, mirror, asked.slow_s)
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
        "slow_s": traffic.lanes[0].slow_s,
        "leaving": _by_version(versions),
        "versions": {
            str(lane.version): {
                "main": lane.place is None, "weight": weight, "share": weight / total,
                "served": _told(lane.served), "dealt": _told(lane.dealt), "mirrored": _told(lane.mirrored),
                "scores": lane.scores,
            }
            # The main one last: it may have got the version of one beside it just now.
            for lane, weight in reversed(list(zip(traffic.lanes, traffic.weights, strict=True)))
        },
    }  # fmt: skip


def _by_version(versions: ServedVersions) -> Counter[str]:
    """Requests that run yet on what is named no more; a version may be leaving from two places."""
    running: Counter[str] = Counter()
    for lane in versions.leaving:
        running[str(lane.version)] += lane.running
    return running


def _told(tally: Tally) -> dict[str, Any]:
    seconds = tally.seconds
    return {
        "requests": tally.requests, "errors": tally.errors, "slow": tally.slow, "seconds_sum": seconds.total,
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
        for role, tally in (("served", lane.served), ("dealt", lane.dealt), ("mirrored", lane.mirrored))
    ]
    for name, said in (
        ("requests", "Requests by version; dealt: of those served, by chance; mirrored: copies"),
        ("errors", "Of these, 5xx"),
        ("slow", "Of these, over the limit that was set"),
    ):
        lines += heading(f"{stem}_{name}_total", "counter", said)
        lines += [f"{stem}_{name}_total{{{labels}}} {getattr(one, name)}" for labels, one in tallies]
    lines += heading(f"{stem}_seconds", "histogram", "Whole requests by version")
    for labels, one in tallies:
        lines += histogram_lines(f"{stem}_seconds", labels, one.seconds)
    lines += heading("trireme_gateway_mirror_total", "counter", "Copies by what became of them")
    results = ("same", "different", "dropped")
    return lines + [f'trireme_gateway_mirror_total{{result="{one}"}} {getattr(mirror, one)}' for one in results]
