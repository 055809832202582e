"""Calls of tools that the model chooses: the template's form of them, and what of an answer is text and what a call."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.gateway.call_forms import CallForm
from runtime.gateway.chat import ChatTemplate
from runtime.gateway.refused import Refused
from runtime.gateway.tools import CallText
from runtime.settings import ChatSettings
from tests.gateway.asking import Got, door_of, post
from tests.gateway.test_choices import CHAT, TOOLS, Telling, save_repository

# As Qwen, Hermes 2, Mistral and Llama 3 write them, cut to what matters here.
_SHOWN = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
_TALK = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.tool_calls %}@all@{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
_CALL = '{"name": "{{ c.function.name }}", "@key@": {{ c.function.arguments | tojson }}}'
_EACH = "{% for c in m.tool_calls %}@one@{% endfor %}"


def _template(one: str, key: str = "arguments") -> str:
    return _SHOWN + _TALK.replace("@all@", _EACH.replace("@one@", one.replace("@call@", _CALL.replace("@key@", key))))


QWEN = _template("\n<tool_call>\n@call@\n</tool_call>")
HERMES = _template(
    '<tool_call>\n{ "arguments": {{ c.function.arguments | tojson }}, "name": "{{ c.function.name }}"}\n</tool_call> '
)
MISTRAL = _template(
    "{% if c.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}[TOOL_CALLS] "
    '[{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}]'
)
LLAMA = _template("@call@", key="parameters")
FORMS = {
    QWEN: CallForm("<tool_call>\n", "\n</tool_call>"),
    HERMES: CallForm("<tool_call>\n", "\n</tool_call>"),
    MISTRAL: CallForm("[TOOL_CALLS] ", "", listed=True),
    LLAMA: CallForm(key="parameters"),
}
UNKNOWN = [
    _template("<tool_call>{{ c.function.name }}<arg_key>x</arg_key></tool_call>"),
    _template("<function={{ c.function.name }}>@call@</function>"),
    _template("[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}"),
    _SHOWN + "{{ messages[0].content }}",
    _SHOWN + "{% if messages | length > 1 %}{{ raise_exception('one message') }}{% endif %}{{ messages[0].content }}",
]


def _chat_template(text: str) -> ChatTemplate:
    return ChatTemplate(ChatSettings(template=text, special_tokens={}), 1 << 16)


@pytest.mark.parametrize("text", FORMS)
def test_the_form_of_calls_is_what_the_template_writes(text: str) -> None:
    assert _chat_template(text).call_form(chosen=True) == FORMS[text]


@pytest.mark.parametrize("text", UNKNOWN)
def test_a_form_that_is_not_known_is_refused(text: str) -> None:
    with pytest.raises(Refused, match="tool_choice auto: the model's chat template writes calls in a form"):
        _chat_template(text).call_form(chosen=True)


def _written(form: CallForm, calls: list[tuple[str, Any]]) -> str:
    """As a model that keeps to the guide writes them."""
    told = [json.dumps({"name": name, form.key: value}) for name, value in calls]
    if form.listed:
        return f"{form.begin}[{', '.join(told)}]"
    return "\n".join(f"{form.begin}{one}{form.end}" for one in told)


def _read(form: CallForm, pieces: list[str], must: bool = False) -> tuple[str, list[tuple[str, str]], bool]:
    """Text, calls, and whether the last call is whole."""
    reader = CallText(form, must=must)
    parts = [part for piece in pieces for part in reader.add(piece)] + reader.end()
    text = "".join(part.text for part in parts if part.kind == "text")
    calls: list[list[str]] = []
    for part in parts:
        if part.kind == "call":
            calls.append([part.text, ""])
        elif part.kind == "arguments":
            calls[-1][1] += part.text
    return text, [(name, value) for name, value in calls], bool(parts) and parts[-1].kind == "ended"


_VALUES = st.recursive(
    st.none() | st.integers() | st.text() | st.sampled_from(["}", '"}', "\\", '", "arguments": ', "</tool_call>", "]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_CALLS = st.lists(st.tuples(st.from_regex(r"[a-zA-Z0-9_.-]{1,9}", fullmatch=True), _VALUES), min_size=1, max_size=3)


@given(st.sampled_from(list(FORMS.values())), _CALLS, st.text(), st.lists(st.integers(0, 300), max_size=8))
def test_calls_are_read_however_they_are_cut(
    form: CallForm, calls: list[tuple[str, Any]], before: str, cuts: list[int]
) -> None:
    if not form.begin:
        calls, before = calls[:1], before[:0]
    if form.mark and form.mark in before:
        return
    whole = before + _written(form, calls)
    places = sorted({0, *(cut for cut in cuts if cut < len(whole)), len(whole)})
    pieces = [whole[one:other] for one, other in pairwise(places)]
    text, found, ended = _read(form, pieces)
    assert text == (before if before.strip() else "")
    assert [(name, json.loads(value)) for name, value in found] == calls
    assert ended


@given(st.sampled_from(list(FORMS.values())), st.text(alphabet="<tool_cal>[TOOL_CALLS] \n{x"), st.integers(1, 5))
def test_a_text_without_a_call_is_a_text(form: CallForm, text: str, size: int) -> None:
    if (form.mark and form.mark in text) or (not form.mark and text.lstrip().startswith("{")):
        return
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert _read(form, pieces) == (text, [], False)


def _ask(text: tuple[str, ...], template: str, folder: Path, finish: str = "stop", **asks: Any) -> tuple[Got, Telling]:
    triton = Telling(texts=text, finish=finish)
    door = door_of(triton, repository=save_repository(folder, template))
    return post(door, "/v1/chat/completions", {**CHAT, "tools": TOOLS, **asks}), triton


ROME = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
STOP = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize("choice", [{}, {"tool_choice": "auto"}])
def test_the_model_chooses_a_text(tmp_path: Path, choice: dict[str, Any]) -> None:
    got, triton = _ask(("It is ", "sunny <to"), QWEN, tmp_path, **choice)
    told = got.json["choices"][0]
    assert (told["message"]["content"], told["finish_reason"]) == ("It is sunny <to", "stop")
    assert "tool_calls" not in told["message"]
    asked = triton.asked[0]
    assert asked["guided_decoding_guide_type"] == "marked_json"
    guide = json.loads(asked["guided_decoding_guide"])
    assert (guide["begin"], guide["end"], guide["most"] > 1) == ("<tool_call>\n", "\n</tool_call>", True)
    assert guide["schema"]["anyOf"][0]["properties"]["arguments"]["properties"]["city"] == {
        "$ref": "#/anyOf/0/properties/arguments/$defs/c"
    }


def test_the_model_chooses_calls_behind_a_text(tmp_path: Path) -> None:
    got, _ = _ask(("Let me see.\n<tool", ROME[5:], "\n", STOP), QWEN, tmp_path)
    told = got.json["choices"][0]
    assert (told["message"]["content"], told["finish_reason"]) == ("Let me see.\n", "tool_calls")
    calls = told["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [
        {"name": "weather", "arguments": '{"city": "Rome"}'},
        {"name": "stop", "arguments": "{}"},
    ]
    assert len({call["id"] for call in calls}) == 2


def test_a_stream_has_texts_and_then_calls(tmp_path: Path) -> None:
    got, _ = _ask(("Let me", " see.\n<tool", ROME[5:30], ROME[30:], "\n", STOP), QWEN, tmp_path, stream=True)
    deltas = [event["choices"][0] for event in got.events[:-1]]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    kinds = [next(iter(one["delta"]), "end") for one in deltas[1:]]
    assert kinds == sorted(kinds, key=["content", "tool_calls", "end"].index)
    assert "".join(one["delta"].get("content") or "" for one in deltas) == "Let me see.\n"
    calls: dict[int, list[dict[str, Any]]] = {}
    for one in deltas:
        for call in one["delta"].get("tool_calls", ()):
            calls.setdefault(call["index"], []).append(call)
    for call, (name, arguments) in zip(calls.values(), [("weather", '{"city": "Rome"}'), ("stop", "{}")], strict=True):
        assert (call[0]["function"]["name"], call[0]["type"], "id" in call[0]) == (name, "function", True)
        assert "".join(part["function"]["arguments"] for part in call) == arguments
        assert not any("id" in part for part in call[1:])
    assert (deltas[-1]["finish_reason"], deltas[-1]["delta"]) == ("tool_calls", {})


def test_a_choice_that_is_cut_says_so(tmp_path: Path) -> None:
    got, _ = _ask((ROME[:50],), QWEN, tmp_path, finish="length")
    told = got.json["choices"][0]
    assert told["finish_reason"] == "length"
    assert told["message"]["tool_calls"][0]["function"]["arguments"] == ROME[:50].partition('"arguments": ')[2]


def test_other_forms_over_the_wire(tmp_path: Path) -> None:
    got, triton = _ask(('[TOOL_CALLS] [{"name": "stop", "arguments": {}}]',), MISTRAL, tmp_path / "mistral")
    assert got.json["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "stop"
    schema = json.loads(triton.asked[0]["guided_decoding_guide"])["schema"]
    assert schema["type"] == "array"
    reference = schema["items"]["anyOf"][0]["properties"]["arguments"]["properties"]["city"]["$ref"]
    assert reference == "#/items/anyOf/0/properties/arguments/$defs/c"
    got, triton = _ask(('{"name": "stop", "parameters": {}}',), LLAMA, tmp_path / "llama")
    assert got.json["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == "{}"
    assert json.loads(triton.asked[0]["guided_decoding_guide"])["begin"] == ""


def test_one_call_where_no_others_are_wanted(tmp_path: Path) -> None:
    _, triton = _ask(("x",), QWEN, tmp_path / "qwen", parallel_tool_calls=False)
    assert json.loads(triton.asked[0]["guided_decoding_guide"])["most"] == 1
    _, triton = _ask(("x",), MISTRAL, tmp_path / "mistral", parallel_tool_calls=False)
    assert json.loads(triton.asked[0]["guided_decoding_guide"])["schema"]["maxItems"] == 1


@pytest.mark.parametrize(
    ("asks", "param"),
    [
        ({"stop": "x"}, "stop"), ({"logprobs": True}, "logprobs"), ({"min_tokens": 2}, "min_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)  # fmt: skip
def test_what_a_choice_cannot_have(tmp_path: Path, asks: dict[str, Any], param: str) -> None:
    got, triton = _ask(("x",), QWEN, tmp_path, **asks)
    assert (got.status, got.json["error"]["param"], triton.asked) == (400, param, [])


def test_an_unknown_form_is_named_with_what_does_work(tmp_path: Path) -> None:
    got, triton = _ask(("x",), UNKNOWN[0], tmp_path)
    assert (got.status, got.json["error"]["param"], triton.asked) == (400, "tool_choice", [])
    assert "required" in got.json["error"]["message"]
    got, _ = _ask(('{"name": "stop", "arguments": {}}',), UNKNOWN[0], tmp_path / "must", tool_choice="required")
    assert got.json["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "stop"
