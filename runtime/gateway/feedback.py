"""`POST /v1/feedback`: what a caller says of an answer that it got, and texts of answers for whoever learns of them.

The gateway remembers whom it answered; where the rest is kept is the sink's business, which stands above it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

import msgspec
import orjson
from msgspec import Meta

from runtime.gateway.bodies import read_json
from runtime.gateway.counters import heading
from runtime.gateway.exchange import Exchange
from runtime.gateway.refused import Refused
from runtime.gateway.trip import Taken, Trip, as_one_text

LARGEST_BYTES = 64 * 1024
_REMEMBERED = 65_536  # answers: the oldest is forgotten first
_PREFIXES = ("chatcmpl-", "cmpl-", "rerank-", "score-", "classify-")  # of an answer's own `id`
Id = Annotated[str, Meta(min_length=1, max_length=128)]
Said = Annotated[str, Meta(min_length=1)]


class _About(msgspec.Struct, forbid_unknown_fields=True, tag_field="kind"):
    """`request_id`: the answer's `x-request-id`, or its `id`; `user`: who may ask for the row to be deleted."""

    request_id: Id
    user: Id | None = None


class RatingRequest(_About, tag="rating", kw_only=True):
    score: Annotated[float, Meta(ge=0, le=1)]


class CorrectionRequest(_About, tag="correction", kw_only=True):
    text: Said


class LabelRequest(_About, tag="label", kw_only=True):
    label: Id


class PairRequest(_About, tag="pair", kw_only=True):
    query: Said
    positive: Said
    negative: Said | None = None


_REQUEST = msgspec.json.Decoder(RatingRequest | CorrectionRequest | LabelRequest | PairRequest)


@dataclass(frozen=True)
class Remembered:
    """An answer: whose, and of which version."""

    id: str
    caller: str
    lane: Taken
    version: int  # the lane's, when it answered


class FeedbackSink(Protocol):
    """Where feedback goes. Called on the event loop, which no call may hold up."""

    async def add(self, about: Remembered, said: dict[str, Any]) -> bool:
        """Whether it is new; on the disk when this returns. Raises Refused, Unavailable."""

    def wants(self, request_id: str) -> bool:
        """Whether the texts of this request are to be sampled."""

    def sample(self, about: Remembered, prompt: str, answer: str) -> None:
        """Never waits: what is too much is dropped."""

    def counts(self) -> dict[str, int]:
        """Samples by what became of them."""

    def close(self) -> None: ...


@dataclass
class Feedback:
    """`sink` None: nothing is taken, and nothing remembered."""

    sink: FeedbackSink | None
    depth: int
    most: int = _REMEMBERED
    results: Counter[str] = field(default_factory=Counter)
    _answers: OrderedDict[str, Remembered] = field(default_factory=OrderedDict)

    async def __call__(self, exchange: Exchange) -> None:
        if self.sink is None:
            raise Refused(404, "feedback is not taken here: the gateway has no --feedback-database", close=True)
        body = await exchange.body()
        if len(body) > LARGEST_BYTES:
            raise Refused(413, f"feedback has {len(body)} bytes; at most {LARGEST_BYTES} are taken")
        asked = read_json(body, _REQUEST, self.depth)
        about = self._find(asked.request_id, exchange.caller)
        said = {**msgspec.to_builtins(asked), "request_id": about.id}
        try:
            new = await self.sink.add(about, said)
        except Exception:
            self.results["failed"] += 1
            raise
        self.results["new" if new else "same"] += 1
        if new and isinstance(asked, RatingRequest) and about.lane.version == about.version:
            about.lane.rated(asked.score)
        await exchange.answer(orjson.dumps({"object": "feedback", "request_id": about.id, "kind": said["kind"]}))

    def _find(self, request_id: str, caller: str) -> Remembered:
        """Another caller's answer is as unknown as one that nobody got."""
        prefix = next((one for one in _PREFIXES if request_id.startswith(one)), "")
        found = self._answers.get(request_id.removeprefix(prefix))
        if found is None or found.caller != caller:
            self.results["unknown"] += 1
            said = f"no answer of this id to this caller is known; the last {self.most} answers are remembered"
            raise Refused(404, said, param="request_id", code="unknown_request")
        return found

    def begun(self, trip: Trip) -> None:
        if self.sink is not None and self.sink.wants(trip.id):
            trip.heard = []

    def ended(self, trip: Trip, caller: str, status: int) -> None:
        """Of every request; those that a version answered are remembered."""
        if self.sink is None or trip.lane is None or not trip.inferred or status >= 300:
            return
        about = Remembered(trip.id, caller, trip.lane, trip.lane.version)
        self._answers[trip.id] = about
        if len(self._answers) > self.most:
            self._answers.popitem(last=False)
        if trip.heard:
            prompts, answers = ([one[place] for one in trip.heard] for place in (0, 1))
            self.sink.sample(about, as_one_text(prompts), as_one_text(answers))

    def lines(self) -> list[str]:
        """Prometheus text."""
        if self.sink is None:
            return []
        found = []
        for name, said, counts in (
            ("feedback", "Feedback by what became of it", self.results),
            ("samples", "Answers whose texts were to be kept, by what became of them", self.sink.counts()),
        ):
            name = f"trireme_gateway_{name}_total"
            found += heading(name, "counter", said)
            found += [f'{name}{{result="{result}"}} {count}' for result, count in sorted(counts.items())]
        return found
