"""`/openapi.json`: the paths and the bodies that they take, written from the types that read them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec
import orjson

from runtime.gateway.chat_requests import ChatRequest
from runtime.gateway.classifying import ClassifyRequest, TeiClassify
from runtime.gateway.exchange import Exchange
from runtime.gateway.feedback import CorrectionRequest, LabelRequest, PairRequest, RatingRequest
from runtime.gateway.kserve import InferRequest
from runtime.gateway.openai_requests import NOTHING, Closed, CompletionRequest, EmbeddingRequest
from runtime.gateway.ranking import RerankRequest, ScoreRequest, TeiRerank
from runtime.gateway.tokenizing import DetokenizeRequest, TeiDecode, TeiTokenize, TokenizeRequest

_REFERENCE = "#/components/schemas/{name}"
_FEEDBACK = (RatingRequest, CorrectionRequest, LabelRequest, PairRequest)
# What a path takes: one of these. Of `generate` and of versions it is any object: inputs by the model's own names.
_BODIES: dict[str, tuple[Any, ...]] = {
    "/v1/embeddings": (EmbeddingRequest,), "/v1/completions": (CompletionRequest,),
    "/v1/chat/completions": (ChatRequest,), "/rerank": (TeiRerank, RerankRequest), "/v1/rerank": (RerankRequest,),
    "/v2/rerank": (RerankRequest,), "/v1/score": (ScoreRequest,), "/score": (ScoreRequest,),
    "/classify": (TeiClassify, ClassifyRequest), "/predict": (TeiClassify, ClassifyRequest),
    "/tokenize": (TeiTokenize, TokenizeRequest), "/detokenize": (TeiDecode, DetokenizeRequest),
    "/decode": (TeiDecode, DetokenizeRequest), "/v1/feedback": _FEEDBACK,
}  # fmt: skip
_ERRORS = {
    "400": "The request makes no sense, or asks for what is not built; the error names the field.",
    "401": "No key, or one that is not known.", "404": "No such model, version or answer.",
    "413": "The body or a text is too large.", "415": "The body is encoded, or of another type.",
    "429": "Too many requests, or the queue is full.", "500": "The model failed.", "503": "Not ready.",
    "504": "The answer took too long.",
}  # fmt: skip
_TEXTS = ("/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready")
_STREAMS = ("/v1/completions", "/v1/chat/completions")


class OpenApi:
    """`table`: method, path and whether it is open to anybody, of every route. The page is made once."""

    def __init__(self, table: Sequence[tuple[str, str, bool]]) -> None:
        kinds = [kind for found in _BODIES.values() for kind in found]
        _, components = msgspec.json.schema_components([*kinds, InferRequest], ref_template=_REFERENCE)
        for kind in kinds:
            if issubclass(kind, Closed):
                _tell_nothings(components[kind.__name__]["properties"])
        paths: dict[str, dict[str, Any]] = {}
        for method, path, public in table:
            paths.setdefault(path, {})[method.lower()] = _operation(method, path, public)
        self._page = orjson.dumps(
            {
                "openapi": "3.1.0",
                "info": {"title": "Trireme's gateway", "version": "1"},
                "paths": paths,
                "components": {
                    "schemas": {**components, "Error": {"type": "object", "required": ["error"]}},
                    "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
                },
            }
        )

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.answer(self._page)


def _tell_nothings(properties: dict[str, Any]) -> None:
    """What is not built may come with the values that ask for nothing."""
    for name, values in NOTHING.items():
        if name in properties:
            properties[name] = {"enum": [*values, None], "default": None}


def _operation(method: str, path: str, public: bool) -> dict[str, Any]:
    kind = "text/plain" if path in _TEXTS else "application/json"
    answers: dict[str, Any] = {kind: {}}
    if path in _STREAMS or path.endswith("generate_stream"):
        answers["text/event-stream"] = {}
    if path.endswith("/infer"):
        answers["application/octet-stream"] = {}
    error = {"application/json": {"schema": {"$ref": _REFERENCE.format(name="Error")}}}
    given: dict[str, Any] = {
        "responses": {
            "200": {"description": "The answer.", "content": answers},
            **{status: {"description": said, "content": error} for status, said in _ERRORS.items()},
        },
        "security": [] if public else [{"key": []}],
    }
    names = re.findall(r"\{(\w+)\}", path)
    if names:
        given["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in names
        ]
    if method in ("POST", "PUT"):
        given["requestBody"] = {"required": True, "content": {"application/json": {"schema": _body(path)}}}
    return given


def _body(path: str) -> dict[str, Any]:
    if path.endswith("/infer"):
        return {"$ref": _REFERENCE.format(name=InferRequest.__name__)}
    references = [{"$ref": _REFERENCE.format(name=kind.__name__)} for kind in _BODIES.get(path, ())]
    if not references:
        return {"type": "object"}
    return references[0] if len(references) == 1 else {"oneOf": references}
