"""`/openapi.json` says what is there, and what is taken."""

from __future__ import annotations

import hashlib
from typing import Any

import jsonschema
import pytest

from runtime.gateway.keys import Keys
from tests.gateway.asking import FakeTriton, door_of, get, post

DOOR = door_of(FakeTriton(generates=True))
PAGE = get(DOOR, "/openapi.json").json
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def _fits(path: str, body: Any) -> bool:
    schema = PAGE["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return jsonschema.Draft202012Validator({**schema, "components": PAGE["components"]}).is_valid(body)


def test_every_path_is_there_and_takes_its_methods() -> None:
    for path, methods in PAGE["paths"].items():
        asked = path.replace("{name}", "m").replace("{version}", "3")
        for method in methods:
            assert get(DOOR, asked, method=method.upper()).status not in (404, 405) or "feedback" in path, path
        assert get(DOOR, asked, method="PATCH").status == 405


def test_which_paths_want_a_key() -> None:
    """Without keys, none."""
    key = "a" * 20
    door = door_of(FakeTriton(), keys=Keys({hashlib.sha256(key.encode()).digest(): "ann"}))
    keyed = get(door, "/openapi.json", {"authorization": f"Bearer {key}"}).json
    assert _open(keyed) == {"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"}
    assert _open(PAGE) == set(PAGE["paths"])


def _open(page: Any) -> set[str]:
    return {path for path, methods in page["paths"].items() if not next(iter(methods.values()))["security"]}


@pytest.mark.parametrize(
    ("path", "body", "fits"),
    [
        ("/v1/chat/completions", CHAT, True),
        ("/v1/chat/completions", {**CHAT, "store": False, "functions": []}, True),
        ("/v1/chat/completions", {**CHAT, "store": True}, False),
        ("/v1/chat/completions", {**CHAT, "temperature": 3}, False),
        ("/v1/chat/completions", {**CHAT, "other": 1}, False),
        ("/v1/completions", {"model": "m", "prompt": [1, 2]}, True),
        ("/v1/embeddings", {"model": "m", "input": {}}, False),
        ("/rerank", {"query": "q", "texts": ["a"]}, True),
        ("/rerank", {"model": "m", "query": "q", "documents": ["a"]}, True),
        ("/rerank", {"query": "q"}, False),
    ],
)
def test_what_the_page_refuses_is_refused(path: str, body: Any, fits: bool) -> None:
    assert _fits(path, body) == fits
    if not fits:
        assert post(DOOR, path, body).status == 400
