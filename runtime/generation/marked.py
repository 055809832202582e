"""Text that may become JSON of a schema where a mark stands: the grammar of it, in llguidance's own language.

This is how models write calls of tools: free text, and behind a mark that the model was trained on, JSON between that
mark and another. An empty mark stands at the beginning: the output is JSON where it begins with a brace, else text.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from runtime.errors import BadRequest

MOST_CALLS = 16
SCHEMA_BYTES = 64 << 10
_DEPTH = 64  # of nested JSON; llguidance recurses
_MARK_CHARACTERS = 64
_ANY = r"/(.|\n)*/"


class MarkToken(NamedTuple):
    """A token beside the vocabulary proper. `shows`: its text is part of the output's."""

    id: int
    text: str
    shows: bool


@dataclass(frozen=True)
class MarkedJson:
    """`begin` schema `end`, up to `most` times, behind a text that has no `begin` in it; or a text alone. `must`: the
    output begins with `begin`, and there is no text.

    Blanks at the end of `begin` and at the beginning of `end` are written as they stand, once the mark is there.
    """

    begin: str
    end: str
    schema: str
    most: int = 1
    must: bool = False

    @classmethod
    def read(cls, text: str) -> MarkedJson:
        """Of a JSON object with these keys, `schema` an object. Raises BadRequest that names the key at fault."""
        guide = plain_object(text)
        kinds = {"begin": str, "end": str, "schema": dict, "most": int, "must": bool}
        for name, value in guide.items():
            if name not in kinds or type(value) is not kinds[name]:
                raise BadRequest(f"guided_decoding_guide: {name[:40]} is unknown, or not {_named(kinds.get(name))}")
        if missing := [name for name in ("begin", "end", "schema") if name not in guide]:
            raise BadRequest(f"guided_decoding_guide has no {missing[0]}")
        found = cls(**{**guide, "schema": json.dumps(guide["schema"])})
        if max(len(found.begin), len(found.end)) > _MARK_CHARACTERS or "<[" in found.begin + found.end:
            raise BadRequest(f"guided_decoding_guide: a mark has at most {_MARK_CHARACTERS} characters, and no <[")
        if not 1 <= found.most <= MOST_CALLS:
            raise BadRequest(f"guided_decoding_guide: most is {found.most}; expected 1 to {MOST_CALLS}")
        if (found.begin and not found.begin.strip()) or (not found.begin and (found.most > 1 or found.end)):
            raise BadRequest("guided_decoding_guide: without a mark at its begin, there is JSON once, and no end")
        return found

    @property
    def mark(self) -> str:
        """What the text cannot hold, and what turns it into JSON."""
        return self.begin.rstrip()

    def grammar(self, form: Mapping[str, Any], added: Mapping[str, MarkToken]) -> str:
        """`form`: how the JSON is written; `added`: tokens by their text. Those that show may stand in the text."""
        inner = json.dumps({**json.loads(self.schema), "x-guidance": form})
        ids = sorted(token.id for token in added.values() if token.shows and token.text != self.mark)
        shown = f"<[{','.join(map(str, ids))}]>" if ids else ""
        lines = ["%llguidance {}"]
        if not self.mark:
            # Which of both it is, is known at the first character that is no blank.
            text = f"OTHER{f' ({shown} TEXT)*' if shown else ''} | "
            lines += [f"start: {'' if self.must else text}json", f"TEXT: {_ANY}"]
            lines += [rf"OTHER: {_ANY} & ~/[ \t\r\n]*\{{(.|\n)*/", f"json: %json {inner}"]
            return "\n".join(lines) + "\n"
        before = f"(TEXT {shown})* " if shown else ""
        blank = _literal(self.begin[len(self.mark) :])
        more = f" again{{0,{self.most - 1}}}" if self.most > 1 else ""
        lines += [f"start: head json{more}" if self.must else f"start: {before}(TEXT | head json{more})"]
        if self.must:
            lines += [f"head: {_spelled(self.mark, added)}"]
        elif self.mark in added:
            lines += [f"head: TEXT <[{added[self.mark].id}]>"]
        else:
            lines += [f"head[lazy]: {_ANY} {_literal(self.mark)}"]
        if more:
            lines += [f"again: {_literal(_BETWEEN)} {_spelled(self.mark, added)} json"]
        lines += [f"json: {blank} inner {_spelled(self.end, added)}", f"inner: %json {inner}"]
        return "\n".join([*lines, f"TEXT: {_ANY} & ~/(.|\\n)*{_escaped(self.mark)}(.|\\n)*/"]) + "\n"

    def hidden(self, added: Mapping[str, MarkToken]) -> dict[int, str]:
        """Marks that are tokens without a text of their own: readers of the output must see them."""
        return {
            token.id: token.text
            for token in added.values()
            if not token.shows and (token.text == self.mark or token.text in self.end)
        }


_BETWEEN = "\n"


def added_tokens(tokenizer: str, ends: Collection[int]) -> dict[str, MarkToken]:
    """Of a `tokenizer.json`, by their text; without those that end a text."""
    found = json.loads(tokenizer).get("added_tokens") or []
    tokens = [MarkToken(one["id"], one["content"], not one.get("special")) for one in found if one["id"] not in ends]
    return {token.text: token for token in tokens if token.text}


def plain_object(schema: str) -> dict[str, Any]:
    """Raises BadRequest for what is not a JSON object of a size and depth that are looked at."""
    size = len(schema.encode())
    if size > SCHEMA_BYTES:
        raise BadRequest(f"guided_decoding_guide has {size} bytes; at most {SCHEMA_BYTES} are taken")
    try:
        value = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"guided_decoding_guide is not JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise BadRequest("guided_decoding_guide is not a JSON object; send a schema")
    level: list[Any] = [value]
    for _ in range(_DEPTH):
        inside = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [one for items in inside for one in items]
    if level:
        raise BadRequest(f"guided_decoding_guide is nested deeper than {_DEPTH}")
    return value


def _spelled(text: str, added: Mapping[str, MarkToken]) -> str:
    """With tokens in place of their texts, where the text has any: such a text is that token to a model."""
    for token in sorted(added.values(), key=lambda one: -len(one.text)):
        if token.text in text:
            left, _, right = text.partition(token.text)
            return " ".join(part for part in (_spelled(left, added), f"<[{token.id}]>", _spelled(right, added)) if part)
    return _literal(text)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _escaped(text: str) -> str:
    """For a regular expression between slashes."""
    return "".join(character if character.isalnum() else f"\\x{{{ord(character):x}}}" for character in text)


def _named(kind: type | None) -> str:
    names = {str: "a text", int: "a number", bool: "true or false", dict: "a schema"}
    return names.get(kind or object, "one of begin, end, schema, most and must")
