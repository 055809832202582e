"""Which of many texts answers a query: `/rerank` as TEI has it, and as Cohere, Jina and vLLM do; `/v1/score`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import orjson
from msgspec import Meta
from numpy.typing import NDArray

from runtime.gateway.batches import READ, encoded, require_texts, require_whole
from runtime.gateway.bodies import read_one_of
from runtime.gateway.exchange import Exchange
from runtime.gateway.limits import DoorLimits
from runtime.gateway.openai_requests import Name
from runtime.gateway.refused import Refused, require_model
from runtime.gateway.triton import Facts, Triton

_QUERY_TOO = ", or the query has"
Direction = Literal["Right", "right"]  # which end is cut; the models cut no other


class TeiRerank(msgspec.Struct, forbid_unknown_fields=True):
    query: str
    texts: list[str]
    raw_scores: bool = False
    return_text: bool = False
    truncate: bool | None = False
    truncation_direction: Direction = "Right"


class RankedDocument(msgspec.Struct, forbid_unknown_fields=True):
    text: str


class RerankRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Cohere's, Jina's and vLLM's. Theirs cut what is too long; the answer says which."""

    model: Name
    query: str
    documents: list[str | RankedDocument]
    top_n: Annotated[int, Meta(ge=1)] | None = None
    return_documents: bool | None = None


class ScoreRequest(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's: one text against one or several, or as many against as many."""

    model: Name
    text_1: str | list[str]
    text_2: str | list[str]
    encoding_format: Literal["float"] | None = None
    truncate: bool = False


class Scored(msgspec.Struct):
    """`scores` [texts]: of a reranker between 0 and 1 unless they are raw, of an embedder the cosine."""

    scores: NDArray[Any]
    tokens: int
    truncated: NDArray[Any]


class Ranking:
    """Routes name `rerank`, `rerank_v1`, `rerank_v2` and `score`."""

    def __init__(self, triton: Triton, limits: DoorLimits) -> None:
        self._triton, self._limits = triton, limits

    async def rerank(self, exchange: Exchange) -> None:
        body = await exchange.body()
        asked = read_one_of(body, {"texts": TeiRerank, "documents": RerankRequest}, self._limits.depth)
        if isinstance(asked, TeiRerank):
            await self._tei(exchange, asked)
        else:
            await self._documents(exchange, asked, with_documents=True)

    async def rerank_v1(self, exchange: Exchange) -> None:
        asked = read_one_of(await exchange.body(), {"documents": RerankRequest}, self._limits.depth)
        await self._documents(exchange, asked, with_documents=True)

    async def rerank_v2(self, exchange: Exchange) -> None:
        asked = read_one_of(await exchange.body(), {"documents": RerankRequest}, self._limits.depth)
        await self._documents(exchange, asked, with_documents=False)

    async def _tei(self, exchange: Exchange, asked: TeiRerank) -> None:
        require_texts(asked.texts, "texts", self._limits.items)
        found = await self._scored(exchange, [asked.query] * len(asked.texts), asked.texts, asked.raw_scores, "texts")
        if not asked.truncate:
            require_whole(found.truncated, "texts", _QUERY_TOO)
        ranks = [
            {"index": place, "score": float(found.scores[place])}
            | ({"text": asked.texts[place]} if asked.return_text else {})
            for place in _order(found.scores)
        ]
        await exchange.answer(orjson.dumps(ranks))

    async def _documents(self, exchange: Exchange, asked: RerankRequest, with_documents: bool) -> None:
        require_model(asked.model, self._triton.model)
        texts = [one if isinstance(one, str) else one.text for one in asked.documents]
        require_texts(texts, "documents", self._limits.items)
        found = await self._scored(exchange, [asked.query] * len(texts), texts, False, "documents")
        shown = with_documents if asked.return_documents is None else asked.return_documents
        results = [
            {"index": place, "relevance_score": float(found.scores[place])}
            | ({"document": {"text": texts[place]}} if shown else {})
            for place in _order(found.scores)[: asked.top_n]
        ]
        cut = [int(place) for place in np.flatnonzero(found.truncated)]
        warned = {"warnings": [f"the model read only the beginning of documents {cut}"]} if cut else {}
        told = {
            "id": f"rerank-{exchange.id}", "model": self._triton.model, "results": results,
            "usage": {"prompt_tokens": found.tokens, "total_tokens": found.tokens},
            "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}, **warned},
        }  # fmt: skip
        await exchange.answer(orjson.dumps(told))

    async def score(self, exchange: Exchange) -> None:
        asked = read_one_of(await exchange.body(), {"text_1": ScoreRequest}, self._limits.depth)
        require_model(asked.model, self._triton.model)
        left, right = ([given] if isinstance(given, str) else given for given in (asked.text_1, asked.text_2))
        require_texts(left, "text_1", self._limits.items)
        require_texts(right, "text_2", self._limits.items)
        if len(left) == 1:
            left = left * len(right)
        if len(left) != len(right):
            raise Refused(400, f"{len(left)} texts against {len(right)}: send one, or as many", param="text_1")
        found = await self._scored(exchange, left, right, False, "text_2")
        if not asked.truncate:
            require_whole(found.truncated, "text_2", _QUERY_TOO)
        data = [{"index": at, "object": "score", "score": float(one)} for at, one in enumerate(found.scores)]
        told = {
            "id": f"score-{exchange.id}", "object": "list", "created": int(time.time()), "model": self._triton.model,
            "data": data, "usage": {"prompt_tokens": found.tokens, "total_tokens": found.tokens},
        }  # fmt: skip
        await exchange.answer(orjson.dumps(told))

    async def _scored(
        self, exchange: Exchange, left: Sequence[str], right: Sequence[str], raw: bool, name: str
    ) -> Scored:
        """Of `left[i]` with `right[i]`."""
        require_texts(left[:1], "query", 1)
        facts = await self._triton.facts()
        if facts.embeds and facts.inputs == {"text"}:
            return await exchange.unless_gone(self._cosines(facts, left, right, exchange.id))
        if "logits" not in facts.outputs or "text_pair" not in facts.inputs:
            raise Refused(400, f"{self._triton.model} neither reranks nor embeds texts", param="model")
        return await exchange.unless_gone(self._logits(facts, left, right, exchange.id, raw))

    async def _logits(self, facts: Facts, left: Sequence[str], right: Sequence[str], id: str, raw: bool) -> Scored:
        columns = {"text": left, "text_pair": right}
        found = await encoded(self._triton, facts, columns, ("logits", *READ), id)
        logits = found["logits"]
        if logits.shape[1] != 1:
            raise Refused(400, f"the model gives {logits.shape[1]} numbers for a pair; a score is one", param="model")
        values = logits[:, 0].astype(np.float64)
        return Scored(values if raw else sigmoid(values), int(found["token_count"].sum()), found["truncated"].ravel())

    async def _cosines(self, facts: Facts, left: Sequence[str], right: Sequence[str], id: str) -> Scored:
        """Each text is embedded once, however often it stands there."""
        texts = list(dict.fromkeys((*left, *right)))
        found = await encoded(self._triton, facts, {"text": texts}, ("embedding", *READ), id)
        vectors = found["embedding"].astype(np.float64)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        place = {text: number for number, text in enumerate(texts)}
        first, second = ([place[text] for text in column] for column in (left, right))
        cut = found["truncated"].ravel()
        scores = (vectors[first] * vectors[second]).sum(axis=1)
        return Scored(scores, int(found["token_count"].sum()), cut[first] | cut[second])


def sigmoid(values: NDArray[Any]) -> NDArray[Any]:
    """Of any size: `exp` of a large number would be none."""
    small = np.exp(-np.abs(values))
    found: NDArray[Any] = np.where(values >= 0, 1 / (1 + small), small / (1 + small))
    return found


def _order(scores: NDArray[Any]) -> list[int]:
    """The best first; equal ones as they came."""
    return [int(place) for place in np.argsort(-scores, kind="stable")]
