"""What is served: the one route table. Whatever does not stand in it is 404."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import orjson

from runtime.gateway.access_log import AccessLog
from runtime.gateway.chat import ChatTemplates
from runtime.gateway.completions import Completions
from runtime.gateway.counters import DoorCounters
from runtime.gateway.door import Door, Handler, route
from runtime.gateway.embeddings import Embeddings, require_model
from runtime.gateway.exchange import Exchange
from runtime.gateway.guards import Guards
from runtime.gateway.keys import Keys
from runtime.gateway.kserve import Kserve
from runtime.gateway.limits import DoorLimits
from runtime.gateway.readiness import Readiness
from runtime.gateway.refused import Refused
from runtime.gateway.triton import Triton
from runtime.gateway.upstream import UpstreamGone

_TEXT = [(b"content-type", b"text/plain; charset=utf-8")]
_METRICS = [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")]


@dataclass(frozen=True)
class Own:
    """The endpoints about the gateway itself, and the models it has."""

    triton: Triton
    readiness: Readiness
    counters: DoorCounters
    guards: Guards
    began: int

    async def live(self, exchange: Exchange) -> None:
        await exchange.answer(b"ok\n", headers=_TEXT)

    async def ready(self, exchange: Exchange) -> None:
        reason = self.readiness.reason
        if reason is None and not self.readiness.supervised and not await self._answers():
            reason = "the model's server does not answer"
        if reason is not None:
            raise Refused(503, "draining" if self.readiness.draining else "not ready")
        await exchange.answer(b"ok\n", headers=_TEXT)

    async def _answers(self) -> bool:
        try:
            return await self.triton.ready()
        except UpstreamGone:
            return False

    async def metrics(self, exchange: Exchange) -> None:
        page = self.counters.page(self.guards.bytes, self.readiness.draining)
        try:
            page += await self.triton.metrics_page()
        except UpstreamGone:
            page += b"# the model's server does not answer\n"
        await exchange.answer(page, headers=_METRICS)

    async def models(self, exchange: Exchange) -> None:
        await exchange.answer(orjson.dumps({"object": "list", "data": [self._model()]}))

    async def model(self, exchange: Exchange) -> None:
        require_model(exchange.scope["path_params"]["name"], self.triton.model)
        await exchange.answer(orjson.dumps(self._model()))

    def _model(self) -> dict[str, str | int]:
        return {"id": self.triton.model, "object": "model", "created": self.began, "owned_by": "trireme"}


def make_door(
    triton: Triton, limits: DoorLimits, keys: Keys | None, repository: Path | None, readiness: Readiness, log: AccessLog
) -> Door:
    guards, counters = Guards(limits, keys), DoorCounters()
    own = Own(triton, readiness, counters, guards, int(time.time()))
    completions = Completions(triton, ChatTemplates(repository, triton.model, limits.rendered), limits)
    kserve = Kserve(triton, limits)
    table: list[tuple[str, str, Handler, bool]] = [
        ("/v1/embeddings", "POST", Embeddings(triton, limits), False),  # tried from the top: what is asked most
        ("/v1/completions", "POST", completions.complete, False),
        ("/v1/chat/completions", "POST", completions.chat, False),
        ("/v2/models/{name}/infer", "POST", kserve.infer, False),
        ("/v1/models", "GET", own.models, False),
        ("/v1/models/{name}", "GET", own.model, False),
        ("/healthz", "GET", own.live, True),
        ("/readyz", "GET", own.ready, True),
        ("/metrics", "GET", own.metrics, False),
        ("/v2", "GET", kserve.server, False),
        ("/v2/health/live", "GET", own.live, True),
        ("/v2/health/ready", "GET", own.ready, True),
        *(
            (f"/v2/models/{{name}}{version}{end}", method, handler, False)
            for version in ("", "/versions/{version}")
            for end, method, handler in (
                ("", "GET", kserve.metadata), ("/ready", "GET", kserve.ready), ("/infer", "POST", kserve.infer),
            )
        ),
    ]  # fmt: skip
    routes = [route(path, method, handler, guards, public) for path, method, handler, public in table]
    return Door(routes, guards, counters, log, gone=triton.forget)
