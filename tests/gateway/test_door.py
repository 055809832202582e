"""The door over a model server of a few lines: routes, guards, errors in the dialect's shape, OpenAI's requests."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.gateway.refused import Refused, upstream_refusal
from runtime.gateway.triton import unpack_texts
from runtime.gateway.upstream import UpstreamGone
from runtime.settings import ChatSettings, GeneratorModelSettings, ServedModel
from runtime.token_rows import unpack_ids
from tests.gateway.asking import FakeTriton, Got, ask, door_of, post

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
    assert [unpack_ids(row) for row in unpack_texts(item.data, len(rows))] == rows


def test_a_text_that_the_model_would_cut_is_told_by_its_place_unless_it_may_be() -> None:
    given = {**TEXT, "input": ["a", "b", "c" * 11]}
    got = post(door_of(FakeTriton()), "/v1/embeddings", given)
    assert (got.status, _error(got)["param"]) == (413, "input")
    assert _error(got)["message"].startswith("input[2] has more tokens than the model takes; shorten it")
    assert post(door_of(FakeTriton()), "/v1/embeddings", {**given, "truncate": True}).status == 200


class _SecondBatch(FakeTriton):
    """Refuses the first text of the second batch, as a model would number it."""

    async def infer(self, *asked: Any) -> Any:
        found = await super().infer(*asked)
        if len(self.asked) == 2:
            raise upstream_refusal(400, "in ensemble 'm', text[0] is too strange")
        return found


@pytest.mark.parametrize("rows", [["a", "b", "c"], [[1], [2], [3]]])
def test_a_text_that_is_refused_has_its_place_in_the_request(rows: Any) -> None:
    got = _error(post(door_of(_SecondBatch()), "/v1/embeddings", {**TEXT, "input": rows}))
    assert (got["message"].partition(".")[0], got["param"]) == ("input[2] is too strange", "input")


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_text_is_refused_before_the_model_sees_it(text: str) -> None:
    triton = FakeTriton()
    got = _error(post(door_of(triton), "/v1/embeddings", {**TEXT, "input": ["fine", text]}))
    assert (got["param"], triton.asked) == ("input", [])
    assert got["message"].startswith("input[1] is empty")


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


def test_a_nucleus_of_nothing_is_the_likeliest_token() -> None:
    triton = FakeTriton(generates=True)
    assert post(door_of(triton), "/v1/completions", {**PROMPT, "top_p": 0}).status == 200
    assert 0 < triton.asked[0]["top_p"] < 1e-6


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
