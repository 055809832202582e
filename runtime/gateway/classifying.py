"""`/classify` (and `/predict`): what a text is, in TEI's shape and in vLLM's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray

from runtime.gateway.batches import READ, encoded, require_texts, require_whole
from runtime.gateway.bodies import read_one_of
from runtime.gateway.exchange import Exchange
from runtime.gateway.limits import DoorLimits
from runtime.gateway.openai_requests import Name
from runtime.gateway.ranking import Direction, sigmoid
from runtime.gateway.refused import Refused, require_model
from runtime.gateway.tokens import ServedTokenizer, ServedTokenizers
from runtime.gateway.triton import Triton


class TeiClassify(msgspec.Struct, forbid_unknown_fields=True):
    """A text, or lists of one text each. TEI takes a list of two texts for a pair."""

    inputs: str | list[str | list[str]]
    raw_scores: bool = False
    truncate: bool | None = False
    truncation_direction: Direction = "Right"


class ClassifyRequest(msgspec.Struct, forbid_unknown_fields=True):
    model: Name
    input: str | list[str]
    truncate: bool = False


class Classifying:
    def __init__(self, triton: Triton, tokenizers: ServedTokenizers, limits: DoorLimits) -> None:
        self._triton, self._tokenizers, self._limits = triton, tokenizers, limits

    async def __call__(self, exchange: Exchange) -> None:
        kinds = {"inputs": TeiClassify, "input": ClassifyRequest}
        asked = read_one_of(await exchange.body(), kinds, self._limits.depth)
        if isinstance(asked, TeiClassify):
            await self._tei(exchange, asked)
        else:
            await self._vllm(exchange, asked)

    async def _tei(self, exchange: Exchange, asked: TeiClassify) -> None:
        texts = _texts(asked.inputs)
        logits, model, _ = await self._logits(exchange, texts, "inputs", bool(asked.truncate))
        scores = logits if asked.raw_scores else _probabilities(logits, model)
        names = _names(model, logits.shape[1])
        rows = [
            [{"label": names[place], "score": float(row[place])} for place in np.argsort(-row, kind="stable")]
            for row in scores
        ]
        batch = isinstance(asked.inputs, list) and isinstance(asked.inputs[0], list)
        await exchange.answer(orjson.dumps(rows if batch else rows[0]))

    async def _vllm(self, exchange: Exchange, asked: ClassifyRequest) -> None:
        require_model(asked.model, self._triton.model)
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        logits, model, tokens = await self._logits(exchange, texts, "input", asked.truncate)
        names = _names(model, logits.shape[1])
        data = [
            {"index": at, "label": names[int(row.argmax())], "probs": row.tolist(), "num_classes": len(row)}
            for at, row in enumerate(_probabilities(logits, model))
        ]
        told = {
            "id": f"classify-{exchange.id}", "object": "list", "created": int(time.time()),
            "model": self._triton.model, "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }  # fmt: skip
        await exchange.answer(orjson.dumps(told))

    async def _logits(
        self, exchange: Exchange, texts: Sequence[str], name: str, truncate: bool
    ) -> tuple[NDArray[Any], ServedTokenizer, int]:
        """[texts, labels], what these mean, and how many tokens there were."""
        require_texts(texts, name, self._limits.items)
        facts = await self._triton.facts()
        if "logits" not in facts.outputs or facts.inputs != {"text"}:
            raise Refused(400, f"{self._triton.model} does not classify texts", param="model")
        model = await self._tokenizers.of(facts)
        work = encoded(self._triton, facts, {"text": texts}, ("logits", *READ), exchange.id)
        found = await exchange.unless_gone(work)
        if not truncate:
            require_whole(found["truncated"].ravel(), name, f", which are {model.max_length}")
        return found["logits"].astype(np.float64), model, int(found["token_count"].sum())


def _texts(inputs: str | list[str | list[str]]) -> list[str]:
    if isinstance(inputs, str):
        return [inputs]
    if inputs and all(isinstance(one, list) and len(one) == 1 for one in inputs):
        return [one[0] for one in inputs]
    if len(inputs) == 1 and isinstance(inputs[0], str):
        return [inputs[0]]
    said = "inputs: a list of texts is a pair, which the model does not take; send [[text], [text]] for several"
    raise Refused(400, said, param="inputs")


def _probabilities(logits: NDArray[Any], model: ServedTokenizer) -> NDArray[Any]:
    if model.multi_label or logits.shape[1] == 1:
        return sigmoid(logits)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: NDArray[Any] = powers / powers.sum(axis=1, keepdims=True)
    return found


def _names(model: ServedTokenizer, count: int) -> list[str]:
    """A model that was built before labels were kept has the names that transformers gives where there are none."""
    return list(model.labels) if len(model.labels) == count else [f"LABEL_{place}" for place in range(count)]
