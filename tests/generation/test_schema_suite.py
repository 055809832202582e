"""The JSON Schema Test Suite, draft 2020-12: what it calls valid can come, what it calls invalid cannot, and a schema
that is not built is refused by name.

`json_schema_suite/cases.jsonl` has a line for each schema of the keywords that answers are asked for with, as the
source distribution of jsonschema 4.26.0 carries them, without `$schema`; the licence lies beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer

from runtime.errors import BadRequest
from runtime.gateway.refused import as_refused
from runtime.generation.guides import GuideMaker
from tests import ROOT
from tests.generation.setup import VOCABULARY, accepts, write_tokenizer

CASES = Path(__file__).with_name("json_schema_suite") / "cases.jsonl"
END = 2
METASCHEMA = "https://json-schema.org/draft/2020-12/schema"  # its own keys are named

_DATE_TIME = "optional/format/date-time: validation of date-time strings: "
_TIME = "optional/format/time: validation of time strings: "
_ECMA = "optional/ecmascript-regex: ECMA 262 "
# Valid values that never come, by why; each as file: schema: value.
NEVER_COME = {
    "keys come in the order in which the schema names them": {
        "allOf: allOf: allOf", "allOf: allOf with base schema: valid",
        "const: const with object: same object with different property order is valid",
    },
    "a number is written in one way": {
        "const: const with 0 does not match other zero-like types: float zero is valid",
        "const: const with 1 does not match true: float one is valid",
        "const: const with -2.0 matches integer and float types: float -2.0 is valid",
        "const: float and integers are equal up to 64-bit representation limits: float is valid",
        "enum: enum with 0 does not match false: float zero is valid",
        "enum: enum with [0] does not match [false]: [0.0] is valid",
        "enum: enum with 1 does not match true: float one is valid",
        "enum: enum with [1] does not match [true]: [1.0] is valid",
        "type: integer type matches integers: a float with zero fractional part is an integer",
    },
    "a format is kept, where the suite has it for a note": {
        f"format: {name} format: invalid {name} string is only an annotation by default"
        for name in (
            "email", "ipv4", "ipv6", "hostname", "date", "date-time", "time", "uri", "uuid", "duration",
        )
    },
    "rare forms of a format": {
        *(
            f"optional/format/email: validation of e-mail addresses: {name}"
            for name in (
                "a quoted string with a space in the local part is valid",
                "a quoted string with a double dot in the local part is valid",
                "a quoted string with a @ in the local part is valid",
                "an IPv6-address-literal after the @ is valid",
            )
        ),
        *(
            f"optional/format/ipv6: validation of IPv6 addresses: {name}"
            for name in (
                "mixed format with the ipv4 section as decimal octets", "a long valid ipv6",
                "mixed format with double colons between the sections",
                "mixed format with leading double colons (ipv4-mapped ipv6 address)",
            )
        ),
    },
    "U+FEFF is no white space": {
        f"{_ECMA}\\s matches whitespace: zero-width whitespace matches",
    },
}  # fmt: skip
# Invalid values that can come all the same: what a regular expression does not know of a calendar.
MAY_COME = {
    "29 February of any year": {
        "optional/format/date: validation of date strings: a invalid date string with 29 days in February (normal)",
        "optional/format/date: validation of date strings: 2021 is not a leap year",
    },
    "a leap second at any minute": {
        *(
            f"{_DATE_TIME}an invalid date-time with leap second on a wrong {unit}, UTC" for unit in ("hour", "minute")
        ),
        *(
            f"{_TIME}invalid leap second, {zone} (wrong {unit})"
            for zone in ("Zulu", "zero time-offset", "positive time-offset", "negative time-offset")
            for unit in ("hour", "minute")
        ),
        *(f"{_TIME}an invalid time string with invalid leap second (wrong {unit})" for unit in ("hour", "minute")),
    },
    "U+FEFF is no white space": {
        f"{_ECMA}\\S matches everything but whitespace: zero-width whitespace does not match",
    },
}  # fmt: skip


@dataclass
class Found:
    """Schemas and values by what became of them."""

    built: list[dict[str, Any]] = field(default_factory=list)
    refused: list[tuple[dict[str, Any], BadRequest]] = field(default_factory=list)
    right: int = 0
    never_come: set[str] = field(default_factory=set)
    may_come: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> GuideMaker:
    file = write_tokenizer(tmp_path_factory.mktemp("tokens") / "tokenizer.json")
    return GuideMaker(file, VOCABULARY, (END,), seconds=120)  # the machine may be busy


@pytest.fixture(scope="module")
def found(maker: GuideMaker) -> Found:
    told, fast = Found(), Tokenizer.from_file(str(maker._tokenizer))
    for line in CASES.read_text("utf-8").splitlines():
        group = json.loads(line)
        schema = json.dumps(group["schema"])
        try:
            maker.guide(schema)
        except BadRequest as error:
            told.refused.append((group, error))
            continue
        told.built.append(group)
        for case in group["tests"]:
            text = json.dumps(case["data"], ensure_ascii=False)
            comes = accepts(maker.guide(schema), fast.encode(text).ids, END)
            name = f"{group['file']}: {group['description']}: {case['description']}"
            if comes is case["valid"]:
                told.right += 1
            else:
                (told.may_come if comes else told.never_come).add(name)
    return told


def test_values_come_as_the_suite_says_but_for_those_named(found: Found) -> None:
    assert found.never_come == set().union(*NEVER_COME.values())
    assert found.may_come == set().union(*MAY_COME.values())


def test_what_is_not_built_is_refused_with_what_it_asked_for(found: Found) -> None:
    for group, error in found.refused:
        said = str(error)
        assert as_refused(error).status == 400
        assert said.startswith("guided_decoding_guide")
        named = [word for word in _words(group["schema"]) if word in said]
        known = named or "Unsatisfiable" in said or "is not a JSON object" in said
        assert known or METASCHEMA in group["schema"].values(), (group["description"], said)


def _words(schema: Any) -> Iterator[str]:
    """Keys, and texts that are values."""
    if isinstance(schema, dict):
        for name, value in schema.items():
            yield name
            yield from _words(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _words(value)
    elif isinstance(schema, str) and schema:
        yield schema


def test_whatever_comes_by_chance_is_json_of_its_schema(found: Found, maker: GuideMaker) -> None:
    """Where it comes to an end: strings of random bytes seldom do. Python's regular expressions are not ECMA's."""
    random, whole, fast = np.random.default_rng(0), 0, Tokenizer.from_file(str(maker._tokenizer))
    for group in found.built:
        if "regex" in group["file"]:
            continue
        guide, tokens = maker.guide(json.dumps(group["schema"])), list[int]()
        while len(tokens) < 40:
            logits = np.zeros(VOCABULARY, np.float32)
            guide.bar(logits)
            allowed = np.flatnonzero(np.isfinite(logits))
            token = END if END in allowed else int(random.choice(allowed))
            ended = guide.complete_with(token)
            tokens += [token] if token != END else []
            if token == END or ended:
                whole += 1
                checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
                jsonschema.Draft202012Validator(group["schema"], format_checker=checker).validate(
                    json.loads(fast.decode(tokens))
                )
                break
    assert whole > len(found.built) / 2


def test_the_page_has_these_counts(found: Found) -> None:
    schemas, values = len(found.built) + len(found.refused), found.right + len(found.never_come) + len(found.may_come)
    said = (
        f"Of its {schemas} schemas {len(found.built)} are built and {len(found.refused)} refused by name; of the "
        f"{values:,} values of those that are built, {found.right:,} come as the suite says, {len(found.never_come)} "
        f"valid ones never come, and {len(found.may_come)} invalid ones may"
    )
    page = " ".join((ROOT / "docs" / "gateway.md").read_text("utf-8").split())
    assert said in page, said
