"""ServedVersions of the model beside each other: which requests go to which, and what became of them.

The main server is always there. Others stand beside it, started or loaded and proven by whoever rolls them out: on
servers of their own on loopback, named with their ports, or on the main server, under a model's name of their own. What
is set is checked as a whole and then holds as a whole, from one request to the next;
a gateway that starts again knows of none, so that everything goes to the main server.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from runtime.errors import ServingError
from runtime.gateway.counters import BOUNDS_S
from runtime.gateway.mirror import Mirror
from runtime.gateway.refused import Refused
from runtime.gateway.trip import NO_TRIP, TRIP, as_one_text
from runtime.gateway.triton import Blob, Facts, Triton, unpack_texts
from runtime.gateway.upstream import UpstreamGone
from runtime.generation.metrics import Histogram
from runtime.token_rows import holds_ids

_MOST = 8  # versions beside the main one
_MOST_HEARD = 2048  # texts of one call
SCORES = 11  # a rating from 0 to 1 counts in tenths


@dataclass(frozen=True)
class Place:
    """Where a version is asked: a server by its ports of HTTP and metrics, None for the main server; a model by its
    name there, None for the name that all versions have."""

    ports: tuple[int, int] | None = None
    model: str | None = None


@dataclass
class Tally:
    """Of whole requests. `errors`: those that failed for the server's sake, 5xx; `slow`: over what was set."""

    requests: int = 0
    errors: int = 0
    slow: int = 0
    seconds: Histogram = field(default_factory=lambda: Histogram(BOUNDS_S))

    def ended(self, status: int, seconds: float, slow_s: float | None) -> None:
        self.requests += 1
        self.errors += status >= 500
        self.slow += slow_s is not None and seconds > slow_s
        self.seconds.add(seconds)


@dataclass(eq=False)
class Lane:
    """One version on one server. `dealt`: of those that are served, the ones that chance sent here, and nobody asked
    for; `mirrored`: of copies, whose answers nobody got; `scores`: of ratings, by tenths."""

    triton: Triton
    version: int  # of the main server: as it was last seen
    repository: Path | None
    place: Place | None = None  # None: the main server, under the model's own name
    slow_s: float | None = None
    served: Tally = field(default_factory=Tally)
    dealt: Tally = field(default_factory=Tally)
    mirrored: Tally = field(default_factory=Tally)
    scores: list[int] = field(default_factory=lambda: [0] * SCORES)
    running: int = 0  # requests that have come here and have not ended

    def left(self) -> None:
        self.running -= 1

    def ended(self, status: int, seconds: float, pinned: bool) -> None:
        self.served.ended(status, seconds, self.slow_s)
        if not pinned:
            self.dealt.ended(status, seconds, self.slow_s)

    def copied(self, status: int, seconds: float) -> None:
        self.mirrored.ended(status, seconds, self.slow_s)

    def rated(self, score: float) -> None:
        """From 0 to 1; 1 is best."""
        self.scores[round(score * (SCORES - 1))] += 1

    def count_slow_from(self, seconds: float | None) -> None:
        """By another limit, what was counted says nothing."""
        if seconds != self.slow_s:
            self.slow_s = seconds
            self.served.slow = self.dealt.slow = self.mirrored.slow = 0


@dataclass(frozen=True)
class Neighbour:
    """A version that stands beside the main one. `repository`: holds its tokenizer and chat template."""

    version: int
    place: Place
    repository: Path | None


@dataclass(frozen=True)
class Traffic:
    """How requests are split. Never changed: replaced."""

    lanes: tuple[Lane, ...]
    weights: tuple[float, ...]
    mirror: Lane | None = None
    number: int = 0  # how often it was set

    def pick(self, at: float) -> Lane:
        """`at`: from 0 up to 1."""
        if len(self.lanes) == 1:
            return self.lanes[0]
        place = at * sum(self.weights)
        for lane, weight in zip(self.lanes, self.weights, strict=True):
            if weight and place < weight:
                return lane
            place -= weight
        return next(lane for lane, weight in zip(self.lanes, self.weights, strict=True) if weight)


class ServedVersions:
    """The model's server as handlers see it: each request goes to one version, from its first question on."""

    def __init__(
        self,
        main: Triton,
        repository: Path | None,
        connect: Callable[[Place], Triton],
        mirror: Mirror,
        chance: Callable[[], float] = random.random,
        opens: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        """`opens`: whether answers of the main server may be used; None: always."""
        self._main = Lane(main, 0, repository)
        self._connect, self._mirror, self._chance, self._opens = connect, mirror, chance, opens
        self.traffic = Traffic((self._main,), (1.0,))
        self._setting = asyncio.Lock()
        self._gone: list[Lane] = []  # which get no requests any more

    @property
    def leaving(self) -> list[Lane]:
        """That are named no more, and still answer what they were asked."""
        self._gone = [lane for lane in self._gone if lane.running]
        return self._gone

    @property
    def model(self) -> str:
        return self._main.triton.model

    @property
    def mirror(self) -> Mirror:
        return self._mirror

    def repository(self, version: int) -> Path | None:
        """Where the files of a version lie."""
        lanes = [lane for lane in self.traffic.lanes if lane.version == version]
        return lanes[0].repository if lanes else self._main.repository

    async def _lane(self) -> Lane:
        """Of the request that asks. Raises Refused for a version that is not here."""
        trip = TRIP.get()
        if isinstance(trip.lane, Lane):
            return trip.lane
        lane = self.traffic.pick(self._chance()) if not trip.pinned else await self._pinned(trip.pinned)
        if trip is not NO_TRIP:
            trip.lane = lane
            lane.running += 1
        return lane

    async def _inferring(self) -> Lane:
        lane = await self._lane()
        here = lane.place is None or lane.place.ports is None
        if here and self._opens is not None and not await self._opens():
            raise Refused(503, "the model's server starts, and is not proven yet")
        TRIP.get().inferred = True
        return lane

    async def _pinned(self, version: str) -> Lane:
        await self._facts_of(self._main)
        for lane in self.traffic.lanes:
            if str(lane.version) == version:
                return lane
        known = ", ".join(str(lane.version) for lane in self.traffic.lanes)
        raise Refused(404, f"version {version[:16]!r} does not serve; {known} does")

    async def _facts_of(self, lane: Lane) -> Facts:
        facts = await lane.triton.facts()
        if lane is self._main:
            lane.version = facts.version
        return facts

    # What handlers ask.
    async def facts(self) -> Facts:
        return await self._facts_of(await self._lane())

    async def infer(
        self, inputs: Sequence[Blob], outputs: Sequence[str], request_id: str, parameters: Mapping[str, Any]
    ) -> dict[str, Blob]:
        lane, mirror = await self._inferring(), self.traffic.mirror
        found = await lane.triton.infer(inputs, outputs, request_id, parameters)
        if mirror is not None and mirror is not lane:
            again = mirror.triton.infer(inputs, outputs, request_id, parameters)
            self._mirror.infer(again, mirror.copied, found, request_id, (lane.version, mirror.version))
        if (counts := found.get("token_count")) is not None:
            TRIP.get().spent(counts.total())
        if (heard := TRIP.get().heard) is not None and (texts := _texts(inputs)):
            heard.append((texts, _numbers(found)))
        return found

    async def generate(self, fields: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        lane, mirror = await self._inferring(), self.traffic.mirror
        texts: list[str] = []
        heard = TRIP.get().heard if "text_input" in fields else None
        async with aclosing(lane.triton.generate(fields)) as pieces:
            async for piece in pieces:
                if mirror is not None or heard is not None:
                    texts.append(str(piece.get("text_output", "")))
                if "completion_tokens" in piece:
                    TRIP.get().spent(int(piece["prompt_tokens"]), int(piece["completion_tokens"]))
                yield piece
        if mirror is not None and mirror is not lane:
            again, versions = mirror.triton.generate(fields), (lane.version, mirror.version)
            self._mirror.generate(again, mirror.copied, "".join(texts), TRIP.get().id, versions)
        if heard is not None:
            heard.append((str(fields["text_input"]), "".join(texts)))

    async def ready(self) -> bool:
        return await (await self._lane()).triton.ready()

    async def look(self, anew: bool = False) -> None:
        """So that the main server's version is known, where it answers; `anew`: it may have another one by now."""
        if anew:
            self._main.triton.forget()
        with contextlib.suppress(UpstreamGone, ServingError):
            await self._facts_of(self._main)

    async def main_ready(self) -> bool:
        return await self._main.triton.ready()

    async def metrics_page(self) -> bytes:
        """The main server's: two pages of one form cannot be joined."""
        return await self._main.triton.metrics_page()

    def forget(self) -> None:
        lane = TRIP.get().lane
        (lane if isinstance(lane, Lane) else self._main).triton.forget()

    # What whoever rolls out asks.
    async def set(
        self, candidates: Sequence[Neighbour], weights: Mapping[int, float], mirror: int | None,
        slow_s: float | None = None,
    ) -> None:  # fmt: skip
        """All of it, or nothing. Raises Refused for a version that does not answer as itself."""
        async with self._setting:
            self._main.triton.forget()  # another version may have taken its place
            main = await self._facts_of(self._main)
            lanes = [self._main, *[await self._opened(candidate, main) for candidate in candidates]]
            by_version = {lane.version: lane for lane in lanes}
            if len(by_version) != len(lanes) or len(lanes) > _MOST + 1:
                raise Refused(409, f"versions {[lane.version for lane in lanes]}: each once, and at most {_MOST} more")
            unknown = [
                version for version in (*weights, *([] if mirror is None else [mirror])) if version not in by_version
            ]
            if unknown:
                raise Refused(409, f"version {unknown[0]} does not serve; {sorted(by_version)} do")
            shares = tuple(float(weights.get(lane.version, 0.0)) for lane in lanes)
            if not sum(shares) > 0:
                raise Refused(409, "no version has a weight above 0")
            to = None if mirror is None else by_version[mirror]
            for lane in lanes:
                lane.count_slow_from(slow_s)
            self._gone = [*self.leaving, *(lane for lane in self.traffic.lanes if lane not in lanes)]
            self.traffic = Traffic(tuple(lanes), shares, to, self.traffic.number + 1)

    async def _opened(self, candidate: Neighbour, main: Facts) -> Lane:
        """A lane that is there already goes on counting."""
        place = candidate.place
        known = (lane for lane in self.traffic.lanes if lane.place == place and lane.version == candidate.version)
        lane = next(known, None) or Lane(self._connect(place), candidate.version, candidate.repository, place)
        lane.repository = candidate.repository
        lane.triton.forget()
        try:
            facts = await lane.triton.facts()
        except (UpstreamGone, ServingError) as error:
            raise Refused(409, f"version {candidate.version} does not answer {_where(place)}") from error
        if facts.version != candidate.version:
            raise Refused(409, f"{_where(place)}: version {facts.version} serves, not {candidate.version}")
        if (facts.inputs, facts.outputs) != (main.inputs, main.outputs):
            raise Refused(409, f"version {candidate.version} has other inputs or outputs than version {main.version}")
        return lane


def _where(place: Place) -> str:
    port = "on the main server" if place.ports is None else f"on port {place.ports[0]}"
    return port if place.model is None else f"{port} as {place.model}"


def _texts(inputs: Sequence[Blob]) -> str:
    """Of the first input that is text. Rows of token ids are none: nobody can read them again as what was asked."""
    for one in inputs:
        if one.datatype == "BYTES":
            rows = unpack_texts(one.data, _MOST_HEARD)
            return as_one_text([row.decode(errors="replace") for row in rows if not holds_ids(row)])
    return ""


def _numbers(found: Mapping[str, Blob]) -> str:
    """The first output of numbers with fractions, a list for each text."""
    for one in found.values():
        if one.datatype == "FP32":
            return orjson.dumps(one.array(), option=orjson.OPT_SERIALIZE_NUMPY).decode()
    return ""
