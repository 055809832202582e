"""Text that may become JSON behind a mark: no walk through what is allowed ends in anything else."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from runtime.errors import BadRequest
from runtime.generation.detokenizer import Detokenizer
from runtime.generation.engine import GenerationEngine
from runtime.generation.executor.openvino import OpenVinoStepExecutor
from runtime.generation.guides import Guide, GuideMaker
from runtime.generation.marked import MarkedJson
from runtime.generation.request import SamplingParams, coalesce
from tests.generation.setup import VOCABULARY, engine_over, prompts, write_tokenizer

pytest_plugins = ("tests.generation.fixtures",)

END = 2
MARKS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]")
CALL: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"enum": ["find", "stop"]}, "arguments": {"$ref": "#/$defs/a"}},
    "required": ["name", "arguments"],
    "additionalProperties": False,
    "$defs": {
        "a": {
            "type": "object",
            "properties": {"q": {"type": "string", "maxLength": 5}},
            "required": ["q"],
            "additionalProperties": False,
        }
    },
}
LIST = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 1, "maxItems": 3}
GUIDES: dict[str, dict[str, Any]] = {
    "between": {"begin": "<tool_call>\n", "end": "\n</tool_call>", "schema": CALL, "most": 3},
    "behind": {"begin": "[TOOL_CALLS] ", "end": "", "schema": LIST, "most": 1},
    "whole": {"begin": "", "end": "", "schema": CALL, "most": 1},
}


def _tokenizer(folder: Path, kind: str) -> Path:
    """The marks as bytes, as tokens with a text, or as tokens without one; beside them another token with a text."""
    file = write_tokenizer(folder / "tokenizer.json")
    fast = Tokenizer.from_file(str(file))
    fast.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    if kind == "shown":
        fast.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    if kind == "hidden":
        fast.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    fast.save(str(file))
    return file


@pytest.fixture(scope="module", params=["bytes", "shown", "hidden"])
def known(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, GuideMaker]:
    file = _tokenizer(tmp_path_factory.mktemp(request.param), request.param)
    fast = Tokenizer.from_file(str(file))
    return fast, GuideMaker(file, fast.get_vocab_size(), (END,), seconds=120)


def _walk(guide: Guide, fast: Tokenizer, wanted: str, random_: random.Random, most: int = 160) -> tuple[str, bool]:
    """Tokens of `wanted` where they are allowed, now and then another that is. The text, and whether it ended."""
    text = Detokenizer(fast, shown=guide.shown)
    found, ids = "", fast.encode(wanted, add_special_tokens=False).ids
    for _ in range(most):
        logits = np.zeros(fast.get_vocab_size(), np.float32)
        guide.bar(logits)
        allowed = np.flatnonzero(np.isfinite(logits))
        if not ids and END in allowed and random_.random() < 0.3:
            return found + text.flush(), True
        token = ids.pop(0) if ids and random_.random() < 0.97 else int(random_.choice(allowed))
        if token not in allowed:
            token, ids = int(random_.choice(allowed)), []
        if token == END:
            return found + text.flush(), True
        found += text.push(token)[0]
        if guide.complete_with(token):
            return found + text.flush(), True
    return found + text.flush(), False


def _require(name: str, guide: dict[str, Any], text: str) -> int:
    """That a text which ended is what the guide says. How many values of JSON it has."""
    begin, end, schema = guide["begin"], guide["end"], guide["schema"]
    if name == "whole":
        if not text.lstrip(" \t\r\n").startswith("{"):
            return 0
        jsonschema.validate(json.loads(text), schema)
        return 1
    _, mark, rest = text.partition(begin.rstrip())
    if not mark:
        return 0
    told = (mark + rest).split("\n" + begin) if guide["most"] > 1 else [mark + rest]
    for number, part in enumerate(told):
        # A token without a text may swallow the blank behind it.
        inner = part.removeprefix(begin.rstrip() if not number else "").strip().removesuffix(end.strip())
        jsonschema.validate(json.loads(inner), schema)
    assert len(told) <= guide["most"]
    return len(told)


@pytest.mark.parametrize("name", GUIDES)
def test_every_walk_ends_in_a_text_or_in_json(known: tuple[Tokenizer, GuideMaker], name: str) -> None:
    fast, maker = known
    guide = GUIDES[name]
    one = '{"name": "find", "arguments": {"q": "x"}}' if name != "behind" else "[1, 2]"
    whole = f"{guide['begin']}{one}{guide['end']}"
    before = "" if name == "whole" else "I see <tool, "
    wanted = ["It is sunny <", before + whole, "\n".join([whole] * 3), before + guide["begin"]]
    counts: set[int] = set()
    for seed in range(24):
        chance = random.Random(seed)
        text, ended = _walk(maker.guide(MarkedJson.read(json.dumps(guide))), fast, wanted[seed % 4], chance)
        if ended:
            counts.add(_require(name, guide, text))
    assert counts >= {0, 1}, "texts and JSON"
    assert name != "between" or max(counts) > 1


def test_the_exact_text_of_calls_is_allowed_and_ends(known: tuple[Tokenizer, GuideMaker]) -> None:
    fast, maker = known
    guide = maker.guide(MarkedJson.read(json.dumps({**GUIDES["between"], "most": 1})))
    text = 'So.<tool_call>\n{"name": "find", "arguments": {"q": "x"}}\n</tool_call>'
    shown = Detokenizer(fast, shown=guide.shown)
    told, ended = "", False
    for token in fast.encode(text, add_special_tokens=False).ids:
        assert not ended
        told += shown.push(token)[0]
        ended = guide.complete_with(token)
    assert ended
    assert (told + shown.flush()).replace("\n", "") == text.replace("\n", "")


def test_other_added_tokens_stay_allowed_in_texts(known: tuple[Tokenizer, GuideMaker]) -> None:
    """A model that thinks between tokens of its own may do so."""
    fast, maker = known
    for name in GUIDES:
        guide = maker.guide(MarkedJson.read(json.dumps(GUIDES[name])))
        for token in fast.encode("So<think>I", add_special_tokens=False).ids:
            logits = np.zeros(fast.get_vocab_size(), np.float32)
            guide.bar(logits)
            assert np.isfinite(logits[token]), (name, fast.id_to_token(token))
            guide.complete_with(token)


def test_rows_of_both_kinds_run_beside_others(decoder_graph: Path, tmp_path: Path) -> None:
    """A bias to the brace has the whole answer be JSON; without it the model writes what it would."""
    file = write_tokenizer(tmp_path / "tokenizer.json")
    fast = Tokenizer.from_file(str(file))
    maker = GuideMaker(file, VOCABULARY, (END,), seconds=120)
    engine: GenerationEngine = engine_over(
        OpenVinoStepExecutor(decoder_graph, (512,), 4, threads=1), (512,), 3, end_ids=(END,)
    )
    engine._decoder = fast
    brace = fast.token_to_id("{")
    asked = [
        (SamplingParams(max_tokens=20), None),
        (SamplingParams(max_tokens=80, temperature=1.0, seed=3, logit_bias=((brace, 100.0),)), "whole"),
        (SamplingParams(max_tokens=20), "between"),
    ]
    order = []
    for prompt, (params, name) in zip(prompts(3), asked, strict=True):
        guide = None if name is None else maker.guide(MarkedJson.read(json.dumps(GUIDES[name])))
        order.append(engine.submit(prompt, params, guide=guide))
    updates = []
    while engine.step():
        updates += engine.take_updates()
    joined = coalesce(updates)
    found = [joined[number] for number in order]
    assert all(update.error is None for update in found)
    assert (found[1].finish, _require("whole", GUIDES["whole"], found[1].text)) == ("stop", 1)
    assert found[2].text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"begin": None}, "begin is unknown, or not a text"), ({"most": 0}, "expected 1 to 16"),
        ({"most": True}, "most is unknown, or not a number"), ({"other": 1}, "other is unknown"),
        ({"begin": "x" * 65}, "at most 64 characters"), ({"begin": "  "}, "without a mark"),
        ({"begin": "", "most": 2}, "without a mark"), ({"schema": {"x-guidance": {}}}, "x-guidance is not taken"),
        ({"schema": {"type": "objekt"}}, "not built here"), ({"schema": {"not": {}}}, "not built here"),
    ],
)  # fmt: skip
def test_what_is_no_guide(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    maker = GuideMaker(write_tokenizer(tmp_path / "tokenizer.json"), VOCABULARY, (END,), seconds=120)
    with pytest.raises(BadRequest, match=f"guided_decoding_guide.*{said}"):
        maker.guide(MarkedJson.read(json.dumps({**GUIDES["between"], **changes})))
