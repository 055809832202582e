"""JSON of a schema: always whole and right where the output says that it stopped, beside whatever else runs."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from runtime.errors import BadRequest, Unavailable
from runtime.generation import guides
from runtime.generation.engine import GenerationEngine
from runtime.generation.executor.openvino import OpenVinoStepExecutor
from runtime.generation.guides import GuideMaker
from runtime.generation.request import SamplingParams, Update, coalesce
from tests import ROOT
from tests.generation.setup import VOCABULARY, accepts, engine_over, prompts, write_tokenizer

pytest_plugins = ("tests.generation.fixtures",)

END = 2
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
NUMBER = {"type": "integer", "minimum": 10, "maximum": 9999}
TREE = {"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 2}}, "$ref": "#/$defs/t"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokens") / "tokenizer.json")


@pytest.fixture(scope="module")
def maker(tokenizer: Path) -> GuideMaker:
    return GuideMaker(tokenizer, VOCABULARY, (END,), seconds=120)  # the machine may be busy


@pytest.fixture
def engine(decoder_graph: Path, tokenizer: Path) -> GenerationEngine:
    made = engine_over(OpenVinoStepExecutor(decoder_graph, (512,), 14, threads=1), (512,), 12, end_ids=(END,))
    made._decoder = Tokenizer.from_file(str(tokenizer))
    return made


def _run(engine: GenerationEngine, asked: list[tuple[SamplingParams, Any]], maker: GuideMaker) -> list[Update]:
    order = [
        engine.submit(prompt, params, guide=None if schema is None else maker.guide(json.dumps(schema)))
        for prompt, (params, schema) in zip(prompts(len(asked)), asked, strict=True)
    ]
    updates = []
    while engine.step():
        updates += engine.take_updates()
    joined = coalesce(updates)
    return [joined[number] for number in order]


def _mix() -> list[tuple[SamplingParams, Any]]:
    """Masked rows beside others, greedy and sampled, some cut. Random weights end strings seldom: a bias helps."""
    asked: list[tuple[SamplingParams, Any]] = []
    for seed in range(4):
        drawn = SamplingParams(max_tokens=60, temperature=1.0, seed=seed, logprobs=True, top_logprobs=2)
        asked += [(drawn, PERSON), (drawn, NUMBER), (drawn, None)]
    asked[5:5] = [(SamplingParams(max_tokens=60), TREE), (SamplingParams(max_tokens=5), PERSON)]
    return [*asked, (SamplingParams(max_tokens=30, temperature=1.0, repetition_penalty=1.3, seed=1), PERSON)]


def _valid(schema: Any, text: str) -> None:
    import jsonschema

    jsonschema.validate(json.loads(text), schema)


def test_it_is_valid_when_it_stopped_and_the_same_alone(engine: GenerationEngine, maker: GuideMaker) -> None:
    asked = _mix()
    updates = _run(engine, asked, maker)
    ends: dict[str, int] = {}
    for (_, schema), update in zip(asked, updates, strict=True):
        assert update.error is None
        if schema is not None:
            ends[str(update.finish)] = ends.get(str(update.finish), 0) + 1
            if update.finish == "stop":
                _valid(schema, update.text)
    assert set(ends) == {"stop", "length"}
    assert ends["stop"] >= 5
    engine.scheduler.check_integrity()
    for index, ((params, schema), update) in enumerate(zip(asked, updates, strict=True)):
        if index % 5:
            continue
        number = engine.submit(
            prompts(len(asked))[index], params, guide=None if schema is None else maker.guide(json.dumps(schema))
        )
        alone = []
        while engine.step():
            alone += engine.take_updates()
        again = coalesce(alone)[number]
        assert (again.tokens, again.text, again.finish) == (update.tokens, update.text, update.finish)


def test_blanks_are_those_of_json_dumps(engine: GenerationEngine, maker: GuideMaker) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": [True, None]}}, "required": ["a", "b"],
              "additionalProperties": False}  # fmt: skip
    update = _run(engine, [(SamplingParams(max_tokens=40), schema)], maker)[0]
    assert (update.text, update.finish) == (json.dumps({"a": 1, "b": [True, None]}), "stop")


def test_a_model_without_an_end_token_stops_all_the_same(decoder_graph: Path, tokenizer: Path) -> None:
    engine = engine_over(OpenVinoStepExecutor(decoder_graph, (512,), 3, threads=1), (512,), 1)
    engine._decoder = Tokenizer.from_file(str(tokenizer))
    update = _run(
        engine, [(SamplingParams(max_tokens=40), {"const": {"a": 1}})], GuideMaker(tokenizer, VOCABULARY, ())
    )[0]
    assert (update.text, update.finish) == ('{"a": 1}', "stop")


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"a": ' * 65 + "1" + "}" * 65, "nested deeper than 64"),
        ('{"a": ' * 9000 + "1" + "}" * 9000, "is not JSON|nested deeper"),
        (json.dumps({"enum": ["x" * 70_000]}), "at most 65536"),
        ('{"type": "objekt"}', "is not built here: Invalid type: objekt"),
        ('{"not": {"type": "string"}}', "is not built here: Unimplemented keys"),
        ('{"$ref": "file:///etc/passwd"}', "is not built here: Resource"),
        (r'{"type": "string", "pattern": "^\\cC$"}', r"regex parse error: \^\\cC\$ error: unrecognized escape"),
        ('{"x-guidance": {"lenient": true}, "type": "object"}', "x-guidance is not taken"),
        (json.dumps({"allOf": [{"anyOf": [{"properties": {f"k{i}{j}": {"type": "integer"}}} for i in range(8)]}
                               for j in range(8)]}), "is not built here: schema too large"),
    ],
)  # fmt: skip
def test_what_is_no_schema_or_too_much_of_one(maker: GuideMaker, schema: str, said: str) -> None:
    with pytest.raises(BadRequest, match=f"guided_decoding_guide.*({said})"):
        maker.guide(schema)


@pytest.mark.parametrize(
    "heavy",
    [
        {"anyOf": [{"type": "string", "pattern": f"^[a-z]{{{i},{i + 50}}}x{i}$"} for i in range(800)]},
        {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(2000)}},
    ],
)
def test_a_schema_that_costs_too_much_later_ends_its_request_alone(
    engine: GenerationEngine, maker: GuideMaker, heavy: dict[str, Any]
) -> None:
    """The limits are looked at with every token."""
    updates = _run(engine, [(SamplingParams(max_tokens=60), heavy), (SamplingParams(max_tokens=60), NUMBER)], maker)
    assert isinstance(updates[0].error, BadRequest)
    assert "costs too much" in str(updates[0].error)
    assert updates[1].error is None


@pytest.mark.parametrize(
    ("params", "name"),
    [
        (SamplingParams(stop=("x",)), "stop_words"),
        (SamplingParams(stop_token_ids=(9,)), "stop_token_ids"),
        (SamplingParams(min_tokens=3), "min_length"),
        (SamplingParams(forced=(5,)), "forced_ids"),
    ],
)
def test_what_would_cut_the_json_is_refused_by_name(
    engine: GenerationEngine, maker: GuideMaker, params: SamplingParams, name: str
) -> None:
    with pytest.raises(BadRequest, match=f"^{name} beside guided_decoding_guide"):
        engine.submit(prompts(1)[0], params, guide=maker.guide("{}"))
    engine.submit(prompts(1)[0], SamplingParams(stop_token_ids=(END,)), guide=maker.guide("{}"))


def test_a_tokenizer_whose_tokens_are_no_bytes(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BadRequest, match="does not say which bytes a token is"):
        GuideMaker(tmp_path / "tokenizer.json", 2, ()).guide("{}")


def test_compiling_has_a_time(tokenizer: Path) -> None:
    """A schema that holds the compiler up is given up, and others are told to come again until it is free."""
    free = threading.Event()

    class Slow(GuideMaker):
        def _compile(self, schema: str) -> Any:
            assert free.wait(30)
            return super()._compile(schema)

    maker = Slow(tokenizer, VOCABULARY, (END,), seconds=0.05)
    with pytest.raises(BadRequest, match=r"takes more than 0\.05 s to compile"):
        maker.guide("{}")
    with pytest.raises(Unavailable, match="another schema is being compiled"):
        maker.guide('{"type": "object"}')
    free.set()
    assert maker._last is not None
    maker._last.result(30)
    maker._seconds = 30.0
    logits = np.zeros(VOCABULARY, np.float32)
    maker.guide('{"type": "object"}').bar(logits)
    assert np.isfinite(logits).sum() == 1


def test_compiled_schemas_are_kept_within_bounds(maker: GuideMaker) -> None:
    for number in range(2 * guides._KEPT):
        maker.guide(json.dumps({"const": number}))
    assert len(maker._made) <= guides._KEPT
    first = maker._made[json.dumps({"const": 2 * guides._KEPT - 1})]
    copy = maker.guide(json.dumps({"const": 2 * guides._KEPT - 1}))
    assert copy is not first


def test_the_tokenizer_is_read_whatever_the_locale(tokenizer: Path) -> None:
    """Triton's stubs run in the C locale; byte-level tokens are written in characters beyond ASCII."""
    code = (
        "import sys; from pathlib import Path; from runtime.generation.guides import GuideMaker; "
        f"GuideMaker(Path(sys.argv[1]), {VOCABULARY}, (2,), 120).guide('{{}}')"
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(tokenizer)], env=plain, check=True, timeout=300)


# Schemas, JSON that they allow, and JSON that they do not, keyword by keyword.
KEYWORDS: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
    ({"type": "null"}, [None], [0, False]),
    ({"type": "boolean"}, [True, False], [1, "true"]),
    ({"type": ["integer", "null"]}, [3, -12, None], [1.5, "3"]),
    ({"type": "number"}, [1.25, -3, 1e-7], ["1"]),
    ({"type": "integer", "minimum": -3, "exclusiveMaximum": 12}, [-3, 0, 11], [-4, 12]),
    ({"type": "number", "minimum": 0.5, "maximum": 1.5}, [0.5, 1.25], [0.25, 2]),
    ({"type": "integer", "multipleOf": 7}, [0, 14], [13]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "a\u00e9\n"], ["a", "abcd"]),
    ({"type": "string", "pattern": "^[a-c]{2}[0-9]$"}, ["ab1"], ["ab", "xb1", "ab12"]),
    ({"type": "string", "format": "date"}, ["2026-01-31"], ["2026-1-31"]),
    ({"enum": ["a", 2, None, {"x": [1]}]}, ["a", 2, None, {"x": [1]}], ["b", {"x": [2]}]),
    ({"const": {"a": [True, "x"]}}, [{"a": [True, "x"]}], [{"a": [True]}]),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2}, [[1], [1, 2]], [[], [1, 2, 3]]),
    ({"type": "array", "prefixItems": [{"const": 1}, {"type": "string"}], "items": False}, [[1, "a"]],
     [[2, "a"], [1, "a", 2]]),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, [{}, {"a": 1, "b": 2}], [{"a": "b"}, [1]]),
    (PERSON, [{"name": "x", "age": 3}, {"name": "", "age": 150, "tags": ["a"]}],
     [{"name": "x"}, {"name": "x", "age": 151}]),
    ({"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 1}]}, [4, "a"], ["ab", None]),
    ({"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 6}]}, [5, 6], [4, 7]),
    (TREE, [[], [[], [[]]]], [[1], [[], [], []]]),
    ({"$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}, "additionalProperties": False}},
      "$ref": "#/$defs/n"}, [{}, {"next": {"next": {}}}], [{"next": 1}, {"x": 1}]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "valid", "invalid"), KEYWORDS)
def test_what_a_schema_allows_can_come_and_nothing_else(
    maker: GuideMaker, tokenizer: Path, schema: dict[str, Any], valid: list[Any], invalid: list[Any]
) -> None:
    """And whatever comes, by chance alone, is JSON of the schema."""
    fast, text = Tokenizer.from_file(str(tokenizer)), json.dumps(schema)
    for value in valid:
        _valid(schema, json.dumps(value))
        assert accepts(maker.guide(text), fast.encode(json.dumps(value, ensure_ascii=False)).ids, END), value
    for value in invalid:
        assert not accepts(maker.guide(text), fast.encode(json.dumps(value, ensure_ascii=False)).ids, END), value
    random = np.random.default_rng(0)
    for _ in range(5):
        guide, tokens = maker.guide(text), list[int]()
        for _ in range(200):
            logits = np.zeros(VOCABULARY, np.float32)
            guide.bar(logits)
            token = int(random.choice(np.flatnonzero(np.isfinite(logits))))
            if token == END:
                _valid(schema, fast.decode(tokens))
                break
            tokens.append(token)
            if guide.complete_with(token):
                _valid(schema, fast.decode(tokens))
                break
