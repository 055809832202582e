"""Rerank, score, classify: the shapes of TEI, Cohere, Jina and vLLM over a model server of a few lines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from runtime.gateway.tokens import ServedTokenizer
from tests.gateway.asking import FakeTriton, Got, door_of, post

PAIRS = ((0.0,), (2.0,), (-1000.0,))
TEXTS = ["a", "b", "c"]


def _reranker(**changes: Any) -> FakeTriton:
    return FakeTriton(pair=True, logits=PAIRS, **changes)


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def test_teis_shape() -> None:
    triton = _reranker()
    got = post(door_of(triton), "/rerank", {"query": "q", "texts": TEXTS, "return_text": True})
    assert [(one["index"], one["text"]) for one in got.json] == [(1, "b"), (0, "a"), (2, "c")]
    assert [one["score"] for one in got.json] == pytest.approx([_sigmoid(2), 0.5, 0.0])
    assert [item.data for item in triton.asked[0][0]] == [b"\x01\0\0\0q" * 2, b"\x01\0\0\0a\x01\0\0\0b"]
    raw = post(door_of(_reranker()), "/rerank", {"query": "q", "texts": TEXTS, "raw_scores": True})
    assert [one["score"] for one in raw.json] == [2.0, 0.0, -1000.0]


@pytest.mark.parametrize(("path", "shown"), [("/rerank", True), ("/v1/rerank", True), ("/v2/rerank", False)])
def test_the_shape_of_cohere_and_jina(path: str, shown: bool) -> None:
    ask = {"model": "m", "query": "q", "documents": ["a", {"text": "b"}, "c"], "top_n": 2}
    got = post(door_of(_reranker()), path, ask).json
    assert [one["index"] for one in got["results"]] == [1, 0]
    assert got["results"][0]["relevance_score"] == pytest.approx(_sigmoid(2))
    assert got["results"][0].get("document") == ({"text": "b"} if shown else None)
    assert got["usage"]["total_tokens"] == 12
    other = post(door_of(_reranker()), path, {**ask, "return_documents": not shown}).json
    assert ("document" in other["results"][0]) is not shown


def test_what_is_too_long_is_refused_or_told() -> None:
    long = ["fine", "x" * 11, "fine"]
    assert post(door_of(_reranker()), "/rerank", {"query": "q", "texts": long}).status == 413
    assert post(door_of(_reranker()), "/rerank", {"query": "q", "texts": long, "truncate": True}).status == 200
    got = post(door_of(_reranker()), "/v1/rerank", {"model": "m", "query": "q", "documents": long}).json
    assert "[1]" in got["meta"]["warnings"][0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"texts": []}, "send 1 to"),
        ({"texts": ["a", " "]}, "texts[1] is empty"), ({"query": ""}, "query[0] is empty"),
        ({"truncation_direction": "Left"}, "truncation_direction"), ({"documents": ["a"]}, "exactly one of"),
        ({"max_tokens_per_doc": 5}, "max_tokens_per_doc"), ({"texts": ["\ud800"]}, ""),
    ],
)  # fmt: skip
def test_what_a_rerank_does_not_take(changes: dict[str, Any], said: str) -> None:
    triton = _reranker()
    got = post(door_of(triton), "/rerank", {"query": "q", "texts": ["a"], **changes})
    assert got.status == 400
    assert said in got.json["error"]
    assert not triton.asked


def test_scores_of_one_against_many_and_of_an_embedder() -> None:
    got = post(door_of(_reranker()), "/v1/score", {"model": "m", "text_1": "q", "text_2": TEXTS}).json
    assert [one["score"] for one in got["data"]] == pytest.approx([0.5, _sigmoid(2), 0.0])
    unequal = {"model": "m", "text_1": ["p", "q"], "text_2": TEXTS}
    assert post(door_of(_reranker()), "/v1/score", unequal).status == 400
    triton = FakeTriton()  # gives [0, 1], then [2, 3]
    got = post(door_of(triton), "/v1/score", {"model": "m", "text_1": "q", "text_2": ["q", "b"]}).json
    assert [one["score"] for one in got["data"]] == pytest.approx([1.0, 3 / math.sqrt(13)])
    assert triton.asked[0][0][0].shape == (2, 1), "a text that stands there twice is embedded once"
    assert post(door_of(FakeTriton(generates=True)), "/rerank", {"query": "q", "texts": ["a"]}).status == 400


def _classify(monkeypatch: pytest.MonkeyPatch, body: dict[str, Any], multi_label: bool = False) -> Got:
    found = ServedTokenizer(None, 10, None, ("bad", "good"), multi_label)
    monkeypatch.setattr(ServedTokenizer, "load", lambda folder, generates: found)
    triton = FakeTriton(logits=((0.0, 1.0), (3.0, 0.0)))
    return post(door_of(triton, repository=Path("/nowhere")), "/classify", body)


def test_classes_have_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    one = _classify(monkeypatch, {"inputs": "a"}).json
    assert [item["label"] for item in one] == ["good", "bad"]
    assert sum(item["score"] for item in one) == pytest.approx(1.0)
    two = _classify(monkeypatch, {"inputs": [["a"], ["b"]]}).json
    assert [row[0]["label"] for row in two] == ["good", "bad"]
    raw = _classify(monkeypatch, {"inputs": ["a"], "raw_scores": True}).json
    assert raw == [{"label": "good", "score": 1.0}, {"label": "bad", "score": 0.0}]
    each = _classify(monkeypatch, {"inputs": "a"}, multi_label=True).json
    assert [item["score"] for item in each] == pytest.approx([_sigmoid(1), 0.5])
    assert "a list of texts is a pair" in _classify(monkeypatch, {"inputs": ["a", "b"]}).json["error"]
    got = _classify(monkeypatch, {"model": "m", "input": ["a", "b"]}).json
    assert [item["label"] for item in got["data"]] == ["good", "bad"]
    assert got["data"][0]["num_classes"] == 2


def test_without_the_files_nothing_is_made_up() -> None:
    assert post(door_of(FakeTriton(logits=((0.0, 1.0),))), "/classify", {"inputs": "a"}).status == 501
    assert post(door_of(FakeTriton()), "/tokenize", {"inputs": "a"}).status == 501
