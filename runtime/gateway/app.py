"""What is served: the one route table. Whatever does not stand in it is 404."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import orjson

from runtime.gateway.access_log import AccessLog, LineFile
from runtime.gateway.chat import ChatTemplates
from runtime.gateway.classifying import Classifying
from runtime.gateway.completions import Completions
from runtime.gateway.control import VersionControl, version_lines
from runtime.gateway.counters import DoorCounters
from runtime.gateway.door import Door, Witnesses
from runtime.gateway.embeddings import Embeddings
from runtime.gateway.exchange import Exchange
from runtime.gateway.feedback import Feedback, FeedbackSink
from runtime.gateway.generate import Generate
from runtime.gateway.grpc_door import GrpcDoor
from runtime.gateway.guards import Guards
from runtime.gateway.keys import Keys
from runtime.gateway.kserve import Kserve
from runtime.gateway.limits import DoorLimits
from runtime.gateway.mirror import Mirror
from runtime.gateway.openapi import OpenApi
from runtime.gateway.ranking import Ranking
from runtime.gateway.readiness import Readiness
from runtime.gateway.refused import Refused, require_model
from runtime.gateway.routes import Route, RouteTable
from runtime.gateway.spans import Spans
from runtime.gateway.tokenizing import Tokenizing
from runtime.gateway.tokens import ServedTokenizers
from runtime.gateway.triton import Triton
from runtime.gateway.upstream import UpstreamGone
from runtime.gateway.versions import Place, ServedVersions
from runtime.gateway.vllm_metrics import vllm_page

_TEXT = [(b"content-type", b"text/plain; charset=utf-8")]
_METRICS = [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")]


@dataclass(frozen=True)
class Own:
    """The endpoints about the gateway itself, and the models it has."""

    triton: ServedVersions
    readiness: Readiness
    witnesses: Witnesses
    guards: Guards
    began: int
    vllm_metrics: bool

    async def live(self, exchange: Exchange) -> None:
        await exchange.answer(b"ok\n", headers=_TEXT)

    async def ready(self, exchange: Exchange) -> None:
        if not await self.is_ready():
            raise Refused(503, "draining" if self.readiness.draining else "not ready")
        await exchange.answer(b"ok\n", headers=_TEXT)

    async def is_ready(self) -> bool:
        return self.readiness.reason is None and (self.readiness.supervised or await self._answers())

    async def _answers(self) -> bool:
        try:
            return await self.triton.main_ready()
        except UpstreamGone:
            return False

    async def metrics(self, exchange: Exchange) -> None:
        page = self.witnesses.counters.page(self.guards.bytes, self.readiness.draining)
        await self.triton.look()
        spans = self.witnesses.spans
        sent = [] if spans is None else spans.lines()
        page += "\n".join([*version_lines(self.triton), *self.witnesses.feedback.lines(), *sent, ""]).encode()
        try:
            behind = await self.triton.metrics_page()
            page += behind
            if self.vllm_metrics:
                page += vllm_page(behind.decode(errors="replace")).encode()
        except UpstreamGone:
            page += b"# the model's server does not answer\n"
        await exchange.answer(page, headers=_METRICS)

    async def models(self, exchange: Exchange) -> None:
        await exchange.answer(orjson.dumps({"object": "list", "data": [self._model()]}))

    async def model(self, exchange: Exchange) -> None:
        require_model(exchange.parts["name"], self.triton.model)
        await exchange.answer(orjson.dumps(self._model()))

    def _model(self) -> dict[str, str | int]:
        return {"id": self.triton.model, "object": "model", "created": self.began, "owned_by": "trireme"}


@dataclass(frozen=True)
class Doors:
    """Both sides of one gateway, with the same guards and counters."""

    http: Door
    grpc: GrpcDoor
    guards: Guards
    versions: ServedVersions
    feedback: Feedback
    files: tuple[LineFile, ...]


@dataclass(frozen=True)
class DoorFiles:
    """What the gateway is started with beside its limits. `repository`: of the main server's versions."""

    repository: Path | None = None
    access_log: Path | None = None
    mirror_log: Path | None = None
    control_secret: bytes | None = None
    vllm_metrics: bool = False
    feedback: FeedbackSink | None = None
    spans: Spans | None = None


def make_doors(
    triton: Triton, limits: DoorLimits, keys: Keys | None, readiness: Readiness, files: DoorFiles,
    connect: Callable[[Place], Triton],
) -> Doors:  # fmt: skip
    guards, log = Guards(limits, keys), AccessLog(files.access_log)
    mirror = Mirror(LineFile(files.mirror_log, mode=0o600), limits.answer_s)
    versions = ServedVersions(triton, files.repository, connect, mirror, opens=readiness.opens)
    feedback = Feedback(files.feedback, limits.depth)
    witnesses = Witnesses(DoorCounters(), log, feedback, files.spans)
    own = Own(versions, readiness, witnesses, guards, int(time.time()), files.vllm_metrics)
    tokenizers = ServedTokenizers(versions.repository, triton.model)
    generate = Generate(versions, tokenizers, limits)
    templates = ChatTemplates(versions.repository, triton.model, limits.rendered)
    table = _table(own, Completions(versions, templates, limits), generate, versions, tokenizers, limits)
    if files.control_secret is not None:
        control = VersionControl(versions, files.control_secret, limits)
        table += [("/control/versions", "GET", control.look, True), ("/control/versions", "PUT", control.set, True)]
    described = [(method, path, public or keys is None) for path, method, _, public in table]
    table.append(("/openapi.json", "GET", OpenApi(described), False))
    http = Door(RouteTable(table, guards), guards, witnesses, gone=versions.forget)
    grpc = GrpcDoor(versions, generate, guards, witnesses, own.is_ready)
    return Doors(http, grpc, guards, versions, feedback, (log, mirror.file))


def _table(
    own: Own, completions: Completions, generate: Generate, triton: Triton, tokenizers: ServedTokenizers,
    limits: DoorLimits,
) -> list[Route]:  # fmt: skip
    kserve, ranking = Kserve(triton, limits), Ranking(triton, limits)
    tokenizing, classify = Tokenizing(triton, tokenizers, limits), Classifying(triton, tokenizers, limits)
    return [
        ("/v1/embeddings", "POST", Embeddings(triton, limits), False),
        ("/v1/completions", "POST", completions.complete, False),
        ("/v1/chat/completions", "POST", completions.chat, False),
        ("/v2/models/{name}/infer", "POST", kserve.infer, False),
        ("/rerank", "POST", ranking.rerank, False),
        ("/v1/rerank", "POST", ranking.rerank_v1, False),
        ("/v2/rerank", "POST", ranking.rerank_v2, False),
        ("/v1/score", "POST", ranking.score, False),
        ("/score", "POST", ranking.score, False),
        ("/classify", "POST", classify, False),
        ("/predict", "POST", classify, False),
        ("/tokenize", "POST", tokenizing.tokenize, False),
        ("/detokenize", "POST", tokenizing.detokenize, False),
        ("/decode", "POST", tokenizing.detokenize, False),
        ("/v1/feedback", "POST", own.witnesses.feedback, False),
        ("/v1/models", "GET", own.models, False),
        ("/v1/models/{name}", "GET", own.model, False),
        ("/healthz", "GET", own.live, True),
        ("/readyz", "GET", own.ready, True),
        ("/metrics", "GET", own.metrics, False),
        ("/v2", "GET", kserve.server, False),
        ("/v2/", "GET", kserve.server, False),  # as KServe's own description has it
        ("/v2/health/live", "GET", own.live, True),
        ("/v2/health/ready", "GET", own.ready, True),
        *(
            (f"/v2/models/{{name}}{version}{end}", method, handler, False)
            for version in ("", "/versions/{version}")
            for end, method, handler in (
                ("", "GET", kserve.metadata), ("/ready", "GET", kserve.ready), ("/config", "GET", kserve.config),
                ("/infer", "POST", kserve.infer),
                ("/generate", "POST", generate.whole), ("/generate_stream", "POST", generate.stream),
            )
        ),
    ]  # fmt: skip
