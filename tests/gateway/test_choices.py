"""Choices, log-probabilities, echoes, answers of a form and calls of tools, before a generator of a few lines."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runtime.gateway.door import Door
from runtime.gateway.refused import Refused, upstream_refusal
from runtime.settings import ChatSettings, GeneratorModelSettings, ServedModel
from tests.gateway.asking import FakeTriton, Got, door_of, post

PROMPT: dict[str, Any] = {"model": "m", "prompt": "a cat"}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEMPLATE = (
    "{% for t in tools or [] %}<{{ t.function.name }}:{{ t.function.parameters | tojson }}>{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.arguments.city }}){% endfor %}{% endfor %}"
)


def _detail(token: int, data: bytes, logprob: float | None, *top: tuple[bytes, float], **more: Any) -> dict[str, Any]:
    likely = [{"id": 90 + place, "bytes": one.hex(), "logprob": value} for place, (one, value) in enumerate(top)]
    return {"id": token, "bytes": data.hex(), "logprob": logprob, "top": likely, **more}


# "a cat" behind a token that is no text, then the two halves of "é".
ASKED = [
    _detail(1, b"<s>", None, special=True),
    _detail(5, b" a", -1.0, (b" a", -1.0)),
    _detail(6, b" cat", -2.0, (b" dog", -0.5)),
]
OUTPUT = [_detail(7, b"\xc3", -0.25, (b"\xc3", -0.25)), _detail(8, b"\xa9", -0.75, (b"\xa9", -0.75))]


@dataclass
class Telling(FakeTriton):
    """As the generator: details where they are asked for. `texts`: what it writes instead, in pieces."""

    generates: bool = True
    texts: tuple[str, ...] = ("é",)
    finish: str = "length"

    async def generate(self, fields: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        self.asked.append(fields)
        if self.error is not None and len(self.asked) > 1:
            raise self.error
        if fields.get("return_prompt_log_probs"):
            for at in (0, 1):  # as it is read, chunk by chunk
                yield {"text_output": "", "prompt_details": json.dumps(ASKED[at * 2 : at * 2 + 2])}
        told = {"output_details": json.dumps(OUTPUT)} if fields.get("return_log_probs") else {}
        made = fields.get("max_tokens") != 0
        for text in self.texts if made else ():
            yield {"text_output": text, **told}
        told = {"output_details": "[]"} if told else {}
        counts = {"prompt_tokens": 3, "cached_tokens": 2, "completion_tokens": 2 * made}
        yield {"text_output": "", "finish_reason": self.finish, **told, **counts}


def save_repository(folder: Path, template: str) -> Path:
    settings = GeneratorModelSettings(
        files={}, threads=1, executor="openvino", capacities=(64,), slots=1, max_length=64, end_ids=(),
        chat=ChatSettings(template=template, special_tokens={}),
        served=ServedModel(ensemble="m", version=3, precision="fp32", model_digest="", spec_digest=""),
    )  # fmt: skip
    (folder / "m" / "3").mkdir(parents=True)
    settings.save(folder / "m" / "3")
    return folder


@pytest.fixture
def triton() -> Telling:
    return Telling()


@pytest.fixture
def door(triton: Telling, tmp_path: Path) -> Door:
    return door_of(triton, repository=save_repository(tmp_path, TEMPLATE))


def _complete(door: Door, **asks: Any) -> Got:
    return post(door, "/v1/completions", {**PROMPT, **asks})


def _chat(door: Door, **asks: Any) -> Got:
    return post(door, "/v1/chat/completions", {**CHAT, **asks})


OUT = {
    "tokens": ["bytes:\\xc3", "bytes:\\xa9"], "token_logprobs": [-0.25, -0.75],
    "top_logprobs": [{"bytes:\\xc3": -0.25}, {"bytes:\\xa9": -0.75}], "text_offset": [0, 0],
}  # fmt: skip


def test_log_probabilities_of_a_completion(door: Door, triton: Telling) -> None:
    choice = _complete(door, logprobs=1).json["choices"][0]
    assert (choice["text"], choice["logprobs"]) == ("é", OUT)
    assert (triton.asked[0]["return_log_probs"], triton.asked[0]["top_log_probs"]) == (True, 1)
    assert "return_prompt_log_probs" not in triton.asked[0]
    assert _complete(door).json["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("prompt", ["a cat", [1, 5, 6]])
def test_an_echo_as_lm_evaluation_harness_asks_for_it(door: Door, triton: Telling, prompt: Any) -> None:
    """It reads the prompt's own tokens, and whether each was the likeliest. A text lacks its first word's space."""
    got = _complete(door, prompt=prompt, logprobs=1, echo=True, max_tokens=1, temperature=0).json
    choice, lead = got["choices"][0], isinstance(prompt, list)
    assert choice["text"] == " " * lead + "a caté"
    told = choice["logprobs"]
    assert told["tokens"] == ["<s>", " a", " cat", *OUT["tokens"]]
    assert told["token_logprobs"] == [None, -1.0, -2.0, -0.25, -0.75]
    assert told["top_logprobs"][:3] == [None, {" a": -1.0}, {" dog": -0.5, " cat": -2.0}]
    assert told["text_offset"] == [0, 0, 1 + lead, 5 + lead, 5 + lead]
    assert triton.asked[0]["return_prompt_log_probs"] is True


def test_a_scored_prompt_is_followed_by_a_token(door: Door, triton: Telling) -> None:
    """lm-evaluation-harness takes the last one for it, also where the text would end at once."""
    for asks, least in (
        ({"echo": True, "logprobs": 1, "max_tokens": 1}, 1), ({"echo": True, "logprobs": 0, "min_tokens": 2}, 2),
        ({"echo": True, "logprobs": 1, "max_tokens": 0}, None), ({"echo": True}, None), ({"logprobs": 1}, None),
    ):  # fmt: skip
        triton.asked.clear()
        _complete(door, **asks)
        assert triton.asked[0].get("min_length") == least, asks


def test_an_echo_alone(door: Door, triton: Telling) -> None:
    assert _complete(door, echo=True).json["choices"][0]["text"] == "a caté"
    assert "return_prompt_log_probs" not in triton.asked[0], "its text is known"
    assert _complete(door, echo=True, prompt=[1, 5, 6]).json["choices"][0]["text"] == " a caté"
    scored = _complete(door, echo=True, max_tokens=0, logprobs=0).json
    assert scored["choices"][0]["text"] == "a cat"
    assert scored["choices"][0]["logprobs"]["token_logprobs"] == [None, -1.0, -2.0]
    assert scored["usage"]["completion_tokens"] == 0


def test_a_streamed_echo_is_the_whole_in_pieces(door: Door) -> None:
    whole = _complete(door, logprobs=2, echo=True, n=2).json["choices"]
    events = [event["choices"][0] for event in _complete(door, logprobs=2, echo=True, n=2, stream=True).events[:-1]]
    for index in (0, 1):
        own = [event for event in events if event["index"] == index]
        assert "".join(event["text"] for event in own) == whole[index]["text"]
        assert [event["finish_reason"] for event in own] == [None, "length"]
        for name, values in whole[index]["logprobs"].items():
            assert [value for event in own if event["logprobs"] for value in event["logprobs"][name]] == values


def test_several_choices_of_several_prompts(door: Door, triton: Telling) -> None:
    """Numbered prompt by prompt; each has a seed of its own, the first the one that was given; prompts count once."""
    got = _complete(door, prompt=["a", "b"], n=3, seed=7, stream=True, stream_options={"include_usage": True}).events
    *events, counted, _ = got
    assert sorted({event["choices"][0]["index"] for event in events}) == list(range(6))
    assert counted["usage"] == {
        "prompt_tokens": 6, "completion_tokens": 12, "total_tokens": 18, "prompt_tokens_details": {"cached_tokens": 4},
    }  # fmt: skip
    for text in ("a", "b"):
        seeds = [fields["random_seed"] for fields in triton.asked if fields["text_input"] == text]
        assert seeds[0] == 7
        assert len(set(seeds)) == 3
    again = [fields["random_seed"] for fields in triton.asked if fields["text_input"] == "a"]
    triton.asked.clear()
    _complete(door, prompt="a", n=3, seed=7)
    assert [fields["random_seed"] for fields in triton.asked] == again


def test_a_choice_that_fails_ends_the_answer(door: Door, triton: Telling) -> None:
    triton.error = Refused(429, "full")
    assert _complete(door, n=3).status == 429
    triton.asked.clear()
    streamed = _complete(door, n=3, stream=True).events
    assert streamed[-2]["error"]["message"] == "full"
    assert streamed[-1] == "[DONE]"


def test_log_probabilities_of_a_chat(door: Door) -> None:
    content = _chat(door, logprobs=True, top_logprobs=1).json["choices"][0]["logprobs"]["content"]
    assert content[0] == {
        "token": "bytes:\\xc3", "logprob": -0.25, "bytes": [0xC3],
        "top_logprobs": [{"token": "bytes:\\xc3", "logprob": -0.25, "bytes": [0xC3]}],
    }  # fmt: skip
    events = [event["choices"][0] for event in _chat(door, logprobs=True, top_logprobs=1, stream=True).events[:-1]]
    assert [event["delta"].get("content") for event in events] == ["", "é", None]
    assert [event["logprobs"] and event["logprobs"]["content"] for event in events] == [None, content, None]


def test_biases_are_the_generators_tensors(door: Door, triton: Telling) -> None:
    _complete(door, logit_bias={"5": -100, "12": 2.5})
    assert (triton.asked[0]["logit_bias_ids"], triton.asked[0]["logit_bias_values"]) == ([5, 12], [-100.0, 2.5])


@pytest.mark.parametrize(
    ("asks", "param"),
    [
        ({"n": 9}, "n"), ({"n": 0}, "n"), ({"logprobs": 21}, "logprobs"), ({"logprobs": True}, "logprobs"),
        ({"best_of": 2}, "best_of"), ({"n": 2, "best_of": 3}, "best_of"), ({"max_tokens": 0}, "max_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias[...]"),
    ],
)  # fmt: skip
def test_what_a_completion_cannot_have(door: Door, triton: Telling, asks: dict[str, Any], param: str) -> None:
    got = _complete(door, **asks)
    assert (got.status, got.json["error"]["param"]) == (400, param)
    assert not triton.asked


def test_an_answer_of_a_form(door: Door, triton: Telling) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    _chat(door, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}})
    _chat(door, response_format={"type": "json_object"})
    _chat(door, response_format={"type": "text"})
    kinds = [fields.get("guided_decoding_guide_type") for fields in triton.asked]
    assert kinds == ["json_schema", "json_schema", None]
    assert [json.loads(fields["guided_decoding_guide"]) for fields in triton.asked[:2]] == [schema, {"type": "object"}]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_schema_that_the_generator_refuses_is_named_as_it_came(door: Door, triton: Telling, streamed: bool) -> None:
    triton.asked.append({})
    triton.error = upstream_refusal(400, "INVALID_ARGUMENT: guided_decoding_guide: this schema is not built here: x")
    got = _chat(door, response_format={"type": "json_object"}, stream=streamed)
    assert (got.status, got.json["error"]["param"]) == (400, "response_format")
    assert got.json["error"]["message"] == "response_format: this schema is not built here: x"
    assert _chat(door, tools=TOOLS, tool_choice="required").json["error"]["param"] == "tools"


CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/c"}}, "$defs": {"c": {"type": "string"}}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "d", "parameters": CITY}},
    {"type": "function", "function": {"name": "stop", "strict": True}},
]


def test_a_call_of_a_tool(door: Door, triton: Telling) -> None:
    """The template shows all tools; a named one is the only one that can be called. References find their place."""
    triton.texts, triton.finish = ('{"name": "wea', 'ther", "argum', 'ents": {"city"', ': "Rome"}', "}"), "stop"
    choice = _chat(door, tools=TOOLS, tool_choice="required").json["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    call = choice["message"]["tool_calls"][0]
    assert (call["type"], call["function"]) == ("function", {"name": "weather", "arguments": '{"city": "Rome"}'})
    asked = triton.asked[0]
    assert asked["text_input"].startswith('<weather:{"type": "object"')
    assert "<stop:" in asked["text_input"]
    first, second = json.loads(asked["guided_decoding_guide"])["schema"]["anyOf"]
    assert first["properties"]["arguments"]["properties"]["city"] == {"$ref": "#/anyOf/0/properties/arguments/$defs/c"}
    assert second["properties"]["name"] == {"const": "stop"}
    _chat(door, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "stop"}})
    assert [
        item["properties"]["name"]["const"]
        for item in json.loads(triton.asked[1]["guided_decoding_guide"])["schema"]["anyOf"]
    ] == ["stop"]


def test_a_streamed_call_is_the_same(door: Door, triton: Telling) -> None:
    triton.texts, triton.finish = ('{"name": "stop", "arg', 'uments": {', "}}"), "stop"
    events = [
        event["choices"][0] for event in _chat(door, tools=TOOLS, tool_choice="required", stream=True).events[:-1]
    ]
    calls = [event["delta"]["tool_calls"][0] for event in events if "tool_calls" in event["delta"]]
    assert events[0]["delta"] == {"role": "assistant", "content": None}
    assert (calls[0]["function"], calls[0]["index"], calls[0]["type"]) == (
        {"name": "stop", "arguments": ""},
        0,
        "function",
    )
    assert "".join(call["function"]["arguments"] for call in calls) == "{}"
    assert (events[-1]["delta"], events[-1]["finish_reason"]) == ({}, "tool_calls")


def test_a_call_that_is_cut_says_so(door: Door, triton: Telling) -> None:
    triton.texts = ('{"name": "stop", "arguments": {"x": "}',)
    choice = _chat(door, tools=TOOLS, tool_choice="required").json["choices"][0]
    assert (choice["finish_reason"], choice["message"]["tool_calls"][0]["function"]["arguments"]) == (
        "length",
        '{"x": "}',
    )
    triton.texts = ('{"name": "st',)
    choice = _chat(door, tools=TOOLS, tool_choice="required").json["choices"][0]
    assert (choice["finish_reason"], "tool_calls" in choice["message"]) == ("length", False)


def test_tools_that_are_not_to_be_called_are_not_shown(door: Door, triton: Telling) -> None:
    assert _chat(door, tools=TOOLS, tool_choice="none").json["choices"][0]["message"]["content"] == "é"
    assert (triton.asked[0]["text_input"], "guided_decoding_guide" in triton.asked[0]) == ("[user]hi", False)


def test_a_call_and_its_result_go_back_into_the_template(door: Door, triton: Telling) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *CHAT["messages"], {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]  # fmt: skip
    assert _chat(door, messages=messages).status == 200
    assert triton.asked[0]["text_input"] == "[user]hi[assistant](Rome)[tool]sunny"


BIG = {"enum": ["x" * 70_000]}


@pytest.mark.parametrize(
    ("asks", "param"),
    [
        ({"tools": TOOLS}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": TOOLS * 2, "tool_choice": "required"}, "tools"),
        ({"tools": TOOLS, "tool_choice": "required", "logprobs": True}, "logprobs"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": TOOLS, "tool_choice": "required", "stop": "x"}, "stop"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 2}, "min_tokens"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": BIG}}}, "response_format"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
    ],
)
def test_what_a_chat_cannot_have(door: Door, triton: Telling, asks: dict[str, Any], param: str) -> None:
    got = _chat(door, **asks)
    assert (got.status, got.json["error"]["param"]) == (400, param)
    assert not triton.asked


def test_a_template_that_does_not_show_tools(triton: Telling, tmp_path: Path) -> None:
    door = door_of(triton, repository=save_repository(tmp_path, "{{ messages[0].content }}"))
    got = _chat(door, tools=TOOLS, tool_choice="required")
    assert (got.status, got.json["error"]["param"]) == (400, "tools")
    assert "does not show tools" in got.json["error"]["message"]


@pytest.mark.parametrize(
    ("said", "chat", "told", "param"),
    [
        ("text_input has 9 characters, too many", False, "prompt has 9 characters, too many", "prompt"),
        ("text_input has no tokens of this model", True, "messages has no tokens of this model", "messages"),
        ("input_ids holds 9; token ids are 0 to 8", False, "prompt holds 9; token ids are 0 to 8", "prompt"),
        ("the prompt has 9 tokens", True, "the prompt has 9 tokens", "messages"),
        ("max_tokens=9 and min_length=0 after 3", False, "max_tokens=9 and min_tokens=0 after 3", "max_tokens"),
        ("top_p is 9.0; expected 0 to 1", True, "top_p is 9.0; expected 0 to 1", "top_p"),
        ("guided_decoding_guide: no min_length here", True, "response_format: no min_length here", "response_format"),
        ("of another kind", False, "of another kind", None),
    ],
)  # fmt: skip
def test_what_the_model_refuses_has_the_names_of_the_request(
    door: Door, triton: Telling, said: str, chat: bool, told: str, param: str | None
) -> None:
    triton.asked.append({})
    triton.error = upstream_refusal(400, f"INVALID_ARGUMENT: {said}")
    error = (_chat(door) if chat else _complete(door)).json["error"]
    assert (error["message"], error["param"]) == (told, param)


def test_newer_words_of_chats_are_taken_where_they_ask_for_nothing(door: Door) -> None:
    taken = {"moderation": None, "safety_identifier": "ann", "prompt_cache_key": "k", "prompt_cache_options": {}}
    assert _chat(door, **taken, prompt_cache_retention="in_memory").status == 200
    for name, value in (("moderation", {"x": 1}), ("prompt_cache_retention", "24h")):
        assert _chat(door, **{name: value}).json["error"]["param"] == name
