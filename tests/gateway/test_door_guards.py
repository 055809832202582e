"""Who may come through the door and how much: keys, rates, bodies, routes, errors without paths, logs without texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import BadEnvironment
from runtime.gateway.bodies import require_shallow
from runtime.gateway.guards import Guards
from runtime.gateway.keys import Keys
from runtime.gateway.limits import DoorLimits
from runtime.gateway.readiness import Readiness
from runtime.gateway.refused import Refused, upstream_refusal
from runtime.gateway.trip import TRIP
from runtime.gateway.upstream import UpstreamGone
from tests.gateway.asking import FakeTriton, Got, door_of, doors_of, get, post

TEXT = {"model": "m", "input": "a"}
PROMPT: dict[str, Any] = {"model": "m", "prompt": "a"}


def _error(got: Got) -> dict[str, Any]:
    return dict(got.json["error"])


def _keys(tmp_path: Path, text: str) -> Keys:
    file = tmp_path / "keys"
    file.write_text(text)
    return Keys.load(file)


def _line(name: str, key: str) -> str:
    return f"{name}:{hashlib.sha256(key.encode()).hexdigest()}\n"


def test_keys_are_asked_for_before_anything_is_read(tmp_path: Path) -> None:
    triton, log = FakeTriton(), tmp_path / "log"
    door = door_of(triton, keys=_keys(tmp_path, "# ours\n" + _line("a", "s3cret") + _line("b", "other")), log=log)
    for header in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic s3cret"},
        {"authorization": "Bearer "},
    ):
        got = post(door, "/v1/embeddings", TEXT, header)
        assert (got.status, got.headers["www-authenticate"]) == (401, "Bearer")
        assert got.headers["connection"] == "close"
    assert not triton.asked
    assert post(door, "/v1/embeddings", TEXT, {"authorization": "Bearer s3cret"}).status == 200
    assert get(door, "/metrics").status == 401
    assert [get(door, path).status for path in ("/healthz", "/readyz", "/v2/health/live")] == [200, 200, 200]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["caller"] for line in lines if line["status"] == 200][:1] == ["a"]
    assert "s3cret" not in log.read_text()


@pytest.mark.parametrize("text", ["", "a:xyz\n", "a b\n", _line("a", "k") * 2, _line("a", "k") + _line("b", "k")])
def test_a_bad_file_of_keys_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(BadEnvironment, match="--api-keys-file"):
        _keys(tmp_path, text)


def test_rates_and_requests_at_once_are_each_callers_own() -> None:
    now = [0.0]
    guards = Guards(DoorLimits(rate_per_key=2.0, requests_per_key=2), None, clock=lambda: now[0])
    for _ in range(2):
        with guards.admitted("a"):
            pass
    with pytest.raises(Refused, match="2 requests a second") as caught, guards.admitted("a"):
        pass
    assert caught.value.status == 429
    with guards.admitted("b"), guards.admitted("b"):
        now[0] = 10.0
        with pytest.raises(Refused, match="2 requests of this caller"), guards.admitted("b"):
            pass
        with guards.admitted("a"):
            pass
    assert not guards.running


def test_bodies_are_bounded_alone_and_together() -> None:
    door = door_of(FakeTriton(), DoorLimits(body_bytes=100, bytes_in_flight=150))
    assert post(door, "/v1/embeddings", {**TEXT, "input": "x" * 200}).status == 413
    chunked = {"transfer-encoding": "chunked"}
    assert post(door, "/v1/embeddings", {**TEXT, "input": "x" * 200}, chunked).status == 413
    small = door_of(FakeTriton(), DoorLimits(body_bytes=100, bytes_in_flight=10))
    assert [post(small, "/v1/embeddings", TEXT).status for _ in range(2)] == [429, 429]
    assert post(door, "/v1/embeddings", TEXT).status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "application/json; charset=utf-8"}, 200),
        ({"content-encoding": "identity"}, 200),
        ({"content-encoding": "gzip"}, 415),
        ({"content-encoding": "deflate"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "multipart/form-data"}, 415),
    ],
)
def test_only_plain_json_is_read(headers: dict[str, str], status: int) -> None:
    assert post(door_of(FakeTriton()), "/v1/embeddings", TEXT, headers).status == status


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404), ("GET", "/v1", 404), ("GET", "/v1/embeddings/", 404), ("GET", "/docs", 404),
        ("POST", "/v2/repository/index", 404), ("GET", "/v2/systemsharedmemory/status", 404),
        ("POST", "/v2/trace/setting", 404), ("POST", "/v2/logging", 404), ("GET", "/v2/models/m/stats", 404),
        ("GET", "/v2/models/m/generate", 405), ("POST", "/v2/repository/models/m/unload", 404),
        ("GET", "/v1/embeddings", 405), ("DELETE", "/v1/models", 405), ("GET", "/v1/models/other", 404),
        ("GET", "/v2/models/other", 404), ("GET", "/v2/models/m/versions/9", 404), ("GET", "/v2/models/m-encoder", 404),
    ],
)  # fmt: skip
def test_what_stands_in_no_route_is_not_there(method: str, path: str, status: int) -> None:
    got = get(door_of(FakeTriton()), path, method=method)
    assert got.status == status
    assert "error" in got.json
    assert len(got.headers["x-request-id"]) == 24


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UpstreamGone("refused"), 503),
        (upstream_refusal(503, "[request id: abc] Exceeds maximum queue size"), 429),
        (upstream_refusal(400, "DEADLINE_EXCEEDED: the deadline has passed"), 504),
        (upstream_refusal(503, "Request timeout expired"), 504),
        (upstream_refusal(400, "INTERNAL: /home/x/model.py line 3"), 500),
        (upstream_refusal(500, "stack at /opt/x.py"), 500),
        (upstream_refusal(500, "Failed to process the request(s), message: Stub process 'm_0_0' is not healthy."), 503),
        (upstream_refusal(400, "[request id: abc] text[1] is empty"), 400),
        (ZeroDivisionError("/secret/path.py"), 500),
        (TimeoutError(), 504),
    ],
)
def test_errors_of_the_model_are_statuses_without_paths(error: Exception, status: int) -> None:
    triton = FakeTriton(error=error)
    got = post(door_of(triton), "/v1/embeddings", TEXT)
    assert got.status == status
    assert "/" not in _error(got)["message"]
    assert "abc" not in _error(got)["message"]
    assert ("retry-after" in got.headers) == (status in (429, 503))
    assert triton.forgotten == isinstance(error, UpstreamGone)


def test_a_server_that_is_not_proven_is_asked_nothing() -> None:
    """It may answer before its proof is run; what does not serve just now for other reasons is asked all the same."""
    triton, readiness = FakeTriton(), Readiness(supervised=True)
    door = doors_of(triton, readiness=readiness).http
    for word, status in (
        ("", 503), ("closed: restarting: Triton was killed", 503), ("ready", 200), ("no inference succeeded", 200),
        ("draining", 200), ("closed: its numbers are wrong", 503),
    ):  # fmt: skip
        if word:
            readiness.told(word)
        asked = len(triton.asked)
        got = post(door, "/v1/embeddings", TEXT)
        assert got.status == status, word
        assert ("retry-after" in got.headers) == (status == 503)
        assert (len(triton.asked) > asked) == (status == 200)
        assert get(door, "/readyz").status == (200 if word == "ready" else 503)


def test_the_log_and_the_metrics_hold_no_prompt(tmp_path: Path) -> None:
    door = door_of(FakeTriton(), log=tmp_path / "log")
    post(door, "/v1/embeddings?key=hidden", {**TEXT, "input": "tell nobody"})
    get(door, "/v1/tell-nobody")
    page = get(door, "/metrics").body.decode()
    written = (tmp_path / "log").read_text()
    assert 'trireme_gateway_requests_total{route="/v1/embeddings"' in page or "other" in page
    assert "nv_inference_count 1" in page
    for text in (page, written):
        assert "nobody" not in text
        assert "hidden" not in text


@given(
    st.recursive(
        st.integers() | st.text() | st.booleans(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_whatever_python_writes_is_shallow_enough_by_its_true_depth(value: Any) -> None:
    def depth(item: Any) -> int:
        inside = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        return isinstance(item, dict | list) + max(map(depth, inside), default=0)

    body = json.dumps(value).encode()
    require_shallow(body, depth(value))
    if depth(value):
        with pytest.raises(Refused):
            require_shallow(body, depth(value) - 1)


class _Salted(FakeTriton):
    async def generate(self, fields: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        self.asked.append(TRIP.get().salt)
        yield {"text_output": "", "finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 1}


def test_prompts_are_salted_by_whose_key_it_is() -> None:
    """And without keys not at all: a proxy's clients have one address or many, and are nobody in particular."""
    hashes = {hashlib.sha256(name.encode()).digest(): name for name in ("ann", "bob")}
    triton = _Salted(generates=True)
    door = door_of(triton, keys=Keys(hashes))
    for name in ("ann", "bob", "ann"):
        assert post(door, "/v1/completions", PROMPT, {"authorization": f"Bearer {name}"}).status == 200
    assert post(door_of(triton), "/v1/completions", PROMPT).status == 200
    assert triton.asked == ["ann", "bob", "ann", ""]
    salted = {"text_input": "a", "cache_salt": "ann"}
    assert post(door_of(triton), "/v2/models/m/generate", salted).status == 400, "nobody salts but the gateway"
