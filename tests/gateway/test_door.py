"""The door over a model server of a few lines: routes, guards, errors in the dialect's shape, OpenAI's requests."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import BadEnvironment
from runtime.gateway.bodies import require_shallow
from runtime.gateway.guards import Guards
from runtime.gateway.keys import Keys
from runtime.gateway.limits import DoorLimits
from runtime.gateway.refused import Refused, upstream_refusal
from runtime.gateway.trip import TRIP
from runtime.gateway.triton import Blob
from runtime.gateway.upstream import UpstreamGone
from runtime.settings import ChatSettings, GeneratorModelSettings, ServedModel
from runtime.token_rows import unpack_ids
from tests.gateway.asking import FakeTriton, Got, ask, door_of, get, post

TEXT = {"model": "m", "input": "a"}
PROMPT: dict[str, Any] = {"model": "m", "prompt": "a"}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def _error(got: Got) -> dict[str, Any]:
    return dict(got.json["error"])


def test_embeddings_as_numbers_and_as_base64() -> None:
    triton = FakeTriton()
    numbers = post(door_of(triton), "/v1/embeddings", {**TEXT, "input": ["a", "bb", "ccc"]}).json
    assert [item["embedding"] for item in numbers["data"]] == [[0.0, 1.0], [2.0, 3.0], [0.0, 1.0]]
    assert [item["index"] for item in numbers["data"]] == [0, 1, 2]
    assert numbers["usage"] == {"prompt_tokens": 12, "total_tokens": 12}
    assert [len(inputs[0].data) for inputs, *_ in triton.asked] == [5 + 6, 7], "batches of the model's size"
    coded = post(door_of(triton), "/v1/embeddings", {**TEXT, "encoding_format": "base64"}).json["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(coded), "<f4").tolist() == [0.0, 1.0]


@pytest.mark.parametrize(("given", "rows"), [([7, 300], [[7, 300]]), ([[7], [8, 9]], [[7], [8, 9]])])
def test_token_ids_reach_the_model_as_such(given: list[Any], rows: list[list[int]]) -> None:
    triton = FakeTriton(longest=1000)
    assert post(door_of(triton), "/v1/embeddings", {**TEXT, "input": given}).status == 200
    (((item,), *_),) = triton.asked
    assert [unpack_ids(row) for row in _rows_of(item, len(rows))] == rows


def _rows_of(blob: Blob, count: int) -> list[bytes]:
    found, data = [], blob.data
    for _ in range(count):
        end = 4 + int.from_bytes(data[:4], "little")
        found.append(bytes(data[4:end]))
        data = data[end:]
    return found


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("text[0] holds 70000, which is no token of this model", "70000"),
        ("text[0]: byte 0 is not valid UTF-8", "built"),
    ],
)
def test_who_sends_ids_of_another_model_learns_which_setting_does_it(said: str, shown: str) -> None:
    got = post(door_of(FakeTriton(error=Refused(400, said))), "/v1/embeddings", {**TEXT, "input": [[70000]]})
    assert got.status == 400
    assert shown in _error(got)["message"]
    assert "check_embedding_ctx_length=False" in _error(got)["message"]
    about_text = post(door_of(FakeTriton(error=Refused(400, said))), "/v1/embeddings", TEXT)
    assert "check_embedding_ctx_length" not in _error(about_text)["message"]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({**TEXT, "dimensions": 3}, 400, "dimensions"),
        ({**TEXT, "dimension": 3}, 400, "dimension"),
        ({**TEXT, "input": [1, "a"]}, 400, "input"),
        ({**TEXT, "input": [[1], "a"]}, 400, "input"),
        ({**TEXT, "input": [[1], 2]}, 400, "input"),
        ({**TEXT, "input": [-1]}, 400, "input[0]"),
        ({**TEXT, "input": [1 << 31]}, 400, "input[0]"),
        ({**TEXT, "input": [1.0]}, 400, "input[0]"),
        ({**TEXT, "input": [True]}, 400, "input[0]"),
        ({**TEXT, "input": [1, 2], "prompt_name": "query"}, 400, "prompt_name"),
        ({**TEXT, "input": []}, 400, "input"),
        ({**TEXT, "input": 5}, 400, "input"),
        ({**TEXT, "model": "other"}, 404, "model"),
        ({"input": "a"}, 400, None),
        (b"{", 400, None),
        (b"", 400, None),
        (b'{"model": "m", "input": "\xff"}', 400, None),
        (b"[" * 5000, 400, None),
    ],
)
def test_a_bad_embedding_request_is_told_what_is_wrong(body: Any, status: int, param: str | None) -> None:
    triton = FakeTriton()
    got = post(door_of(triton), "/v1/embeddings", body)
    assert got.status == status
    assert _error(got)["param"] == param
    assert not triton.asked


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 3), ("suffix", "x"), ("service_tier", "flex"), ("store", True), ("store", 0),
    ],
)  # fmt: skip
def test_what_is_not_built_is_refused_by_name(field: str, value: Any) -> None:
    got = post(door_of(FakeTriton(generates=True)), "/v1/completions", {**PROMPT, field: value})
    assert (got.status, _error(got)["param"], _error(got)["code"]) == (400, field, "unsupported_parameter")


def test_what_asks_for_nothing_is_taken() -> None:
    asks = {"n": 1, "best_of": 1, "logprobs": None, "echo": False, "logit_bias": {}, "suffix": None, "user": "u"}
    assert post(door_of(FakeTriton(generates=True)), "/v1/completions", {**PROMPT, **asks}).status == 200


def test_a_completion_and_its_parameters() -> None:
    triton = FakeTriton(generates=True, finish="stop")
    asks = {
        "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": -1, "stop": ["x", ""], "seed": -1,
        "presence_penalty": 1, "frequency_penalty": -1, "min_p": 0.1,
    }  # fmt: skip
    got = post(door_of(triton), "/v1/completions", {**PROMPT, **asks}).json
    assert got["object"] == "text_completion"
    assert got["choices"] == [{"index": 0, "finish_reason": "stop", "logprobs": None, "text": "one two three"}]
    assert got["usage"] == {
        "prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8, "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    assert triton.asked == [
        {
            "text_input": "a", "stream": True, "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "min_p": 0.1,
            "presence_penalty": 1.0, "frequency_penalty": -1.0, "random_seed": (1 << 64) - 1, "stop_words": ["x"],
        }
    ]  # fmt: skip


def test_the_defaults_are_openais() -> None:
    triton = FakeTriton(generates=True)
    post(door_of(triton), "/v1/completions", {**PROMPT, "prompt": [7, 8]})
    assert triton.asked == [{"input_ids": [7, 8], "stream": True, "max_tokens": 16, "temperature": 1.0}]


def test_several_prompts() -> None:
    got = post(door_of(FakeTriton(generates=True)), "/v1/completions", {**PROMPT, "prompt": ["a", "b"]}).json
    assert [choice["index"] for choice in got["choices"]] == [0, 1]
    assert got["usage"]["total_tokens"] == 16
    refused = post(door_of(FakeTriton(generates=True)), "/v1/completions", {**PROMPT, "prompt": ["a", 5]})
    assert refused.status == 400


def test_a_stream_of_a_completion() -> None:
    got = post(
        door_of(FakeTriton(generates=True)),
        "/v1/completions",
        {**PROMPT, "stream": True, "stream_options": {"include_usage": True}},
    )
    assert got.headers["content-type"].startswith("text/event-stream")
    *events, counted, end = got.events
    assert end == "[DONE]"
    assert [event["choices"][0]["text"] for event in events] == ["one", " two", " three", ""]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, None, "length"]
    assert {event["usage"] for event in events} == {None}
    assert (counted["choices"], counted["usage"]["total_tokens"]) == ([], 8)


def test_an_error_before_the_first_piece_has_its_status_and_one_later_is_an_event() -> None:
    full = upstream_refusal(400, "UNAVAILABLE: 4 requests wait already; try again later")
    early = post(
        door_of(FakeTriton(generates=True, words=(), error=full)), "/v1/completions", {**PROMPT, "stream": True}
    )
    assert (early.status, early.headers["retry-after"]) == (429, "1")
    late = post(
        door_of(FakeTriton(generates=True, error=UpstreamGone("x"))), "/v1/completions", {**PROMPT, "stream": True}
    )
    assert late.status == 200
    assert late.events[-2]["error"]["type"] == "server_error"
    assert late.events[-1] == "[DONE]"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_its_request(stream: bool, tmp_path: Path) -> None:
    triton, log = FakeTriton(generates=True, hang=True), tmp_path / "log"
    body = json.dumps({**PROMPT, "stream": stream}).encode()
    door = door_of(triton, log=log)

    async def leave() -> None:
        if stream:
            await ask(door, "POST", "/v1/completions", body, leave_after=2)
            return
        task = asyncio.ensure_future(ask(door, "POST", "/v1/completions", body))
        while not triton.asked:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    assert triton.left
    if stream:
        assert json.loads(log.read_text())["status"] == 499


def _chat_repository(folder: Path, template: str) -> Path:
    settings = GeneratorModelSettings(
        files={}, threads=1, executor="openvino", capacities=(64,), slots=1, max_length=64, end_ids=(),
        chat=ChatSettings(template=template, special_tokens={"bos_token": "<s>"}),
        served=ServedModel(ensemble="m", version=3, precision="fp32", model_digest="", spec_digest=""),
    )  # fmt: skip
    (folder / "m" / "3").mkdir(parents=True)
    settings.save(folder / "m" / "3")
    return folder


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


def test_a_chat_is_rendered_by_the_checkpoints_template_and_begins_once(tmp_path: Path) -> None:
    triton = FakeTriton(generates=True)
    door = door_of(triton, repository=_chat_repository(tmp_path, TEMPLATE))
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": parts}]
    got = post(door, "/v1/chat/completions", {**CHAT, "messages": messages, "max_completion_tokens": 4}).json
    assert got["choices"][0]["message"]["content"] == "one two three"
    assert triton.asked[0]["text_input"] == "<s>[system]be[user]ab>"
    assert triton.asked[0]["add_special_tokens"] is False
    events = post(door, "/v1/chat/completions", {**CHAT, "stream": True}).events
    assert [event["choices"][0]["delta"] for event in events[:-1]] == [
        {"role": "assistant", "content": ""}, {"content": "one"}, {"content": " two"}, {"content": " three"}, {},
    ]  # fmt: skip
    assert events[-2]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for a in range(99999) %}{{ messages[0].content * 100 }}{% endfor %}", "makes more text"),
        ("{{ messages.append(1) }}", "does not take these messages"),
        ("{{ ''.__class__.__mro__ }}", "does not take these messages"),
        ("{{ messages[7].content.x }}", "does not take these messages"),
    ],
)
def test_templates_are_held_in_a_sandbox(template: str, said: str, tmp_path: Path) -> None:
    door = door_of(FakeTriton(generates=True), repository=_chat_repository(tmp_path, template))
    got = post(door, "/v1/chat/completions", CHAT)
    assert got.status == 400
    assert said in _error(got)["message"]


def test_a_model_without_a_template_does_not_chat() -> None:
    got = post(door_of(FakeTriton(generates=True)), "/v1/chat/completions", CHAT)
    assert (got.status, _error(got)["code"]) == (400, "no_chat_template")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({**CHAT, "tools": [{}]}, "tools[0]"),
        ({**CHAT, "functions": [{}]}, "functions"),
        ({**CHAT, "chat_template": "{{ x }}"}, "chat_template"),
        ({**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({**CHAT, "messages": []}, "messages"),
        ({**CHAT, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({**CHAT, "stream_options": {}}, "stream_options"),
    ],
)
def test_what_a_chat_cannot_have(body: dict[str, Any], param: str, tmp_path: Path) -> None:
    got = post(
        door_of(FakeTriton(generates=True), repository=_chat_repository(tmp_path, TEMPLATE)),
        "/v1/chat/completions",
        body,
    )
    assert (got.status, _error(got)["param"]) == (400, param)


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
        ("POST", "/v2/trace/setting", 404), ("POST", "/v2/logging", 404), ("GET", "/v2/models/m/config", 404),
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
