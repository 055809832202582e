"""Outputs that are JSON of a schema, or a text in which it may stand: which tokens may come next. On llguidance, which
is loaded when somebody asks.

A schema is compiled once, by a thread of its own and within a time, into a matcher that sequences copy. Between their
tokens stand the blanks that `json.dumps` writes, and no others: a model that is free to write blanks may never end.
What a schema may cost is bounded by llguidance's own limits, while it is compiled and at every token.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BadRequest, Unavailable
from runtime.generation.marked import MarkedJson, added_tokens, plain_object
from runtime.generation.request import SamplingParams

_KEPT = 32  # compiled schemas
_KEPT_BYTES = 512 << 10  # of their texts
_FORM: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False}
# Of the work at one token, some 5 ms at most on an old core, and of a schema as a whole, under half a second.
_LIMITS: Any = {
    "initial_lexer_fuel": 200_000, "step_lexer_fuel": 50_000, "step_max_items": 10_000, "max_lexer_states": 20_000,
    "max_grammar_size": 100_000, "verbose_errors": False,
}  # fmt: skip


class Guide:
    """Of one sequence. Not thread-safe: the sequence's alone."""

    def __init__(self, matcher: Any, vocabulary: int, shown: Mapping[int, str] = MappingProxyType({})) -> None:
        """`shown`: tokens without a text of their own, and the text that is to stand for them in the output."""
        self._matcher, self.shown = matcher, shown
        self._mask = np.zeros(-(-vocabulary // 32), np.int32)
        self._vocabulary = vocabulary

    def copy(self) -> Guide:
        return Guide(self._matcher.deep_copy(), self._vocabulary, self.shown)

    def bar(self, logits: NDArray[np.float32]) -> None:
        """Makes what may not come next impossible, in place; [vocabulary]. The end of the text may come where the
        JSON is whole. Raises BadRequest for a schema that costs too much here, or that no token of the model fits."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if self._matcher.is_error():
            raise _costly(self._matcher.get_error())
        allowed = np.unpackbits(self._mask.view(np.uint8), count=self._vocabulary, bitorder="little").view(np.bool_)
        if not allowed.any():
            raise BadRequest("guided_decoding_guide: no token of this model can go on with this schema")
        logits[~allowed] = -np.inf

    def complete_with(self, token: int) -> bool:
        """Takes the token; whether the JSON is whole now and nothing can be added. Raises BadRequest as `bar`."""
        if not self._matcher.consume_token(token):
            raise _costly(self._matcher.get_error())
        return bool(self._matcher.is_stopped())

    def require_alone(self, params: SamplingParams, end_ids: Sequence[int]) -> None:
        """Raises BadRequest for parameters that would end the JSON before it is whole, or go on behind it."""
        others = [token for token in params.stop_token_ids if token not in end_ids]
        asked = {
            "stop_words": params.stop, "stop_token_ids": others, "min_length": params.min_tokens,
            "forced_ids": params.forced,
        }  # fmt: skip
        for name, value in asked.items():
            if value:
                raise BadRequest(f"{name} beside guided_decoding_guide: the JSON would not be whole; leave it out")


class GuideMaker:
    """Compiles schemas for one model, each in so many seconds. Any thread may call it."""

    def __init__(self, tokenizer: Path, vocabulary: int, end_ids: Sequence[int], seconds: float = 10.0) -> None:
        self._seconds = seconds
        self._tokenizer, self._vocabulary, self._end_ids = tokenizer, vocabulary, list(end_ids)
        self._lock = threading.Lock()
        self._made: OrderedDict[str | MarkedJson, Guide] = OrderedDict()
        self._worker: ThreadPoolExecutor | None = None
        self._last: Future[Guide] | None = None
        self._known: Any = None

    def guide(self, schema: str | MarkedJson) -> Guide:
        """For one sequence. Raises BadRequest for what is no schema, or one that is not built or costs too much, and
        Unavailable while a schema is being compiled that has used its time up."""
        with self._lock:
            made = self._made.get(schema)
            if made is None:
                made = self._made[schema] = self._compiled(schema)
                while len(self._made) > _KEPT or (len(self._made) > 1 and sum(map(_size, self._made)) > _KEPT_BYTES):
                    self._made.popitem(last=False)
            self._made.move_to_end(schema)
            return made.copy()

    def _compiled(self, schema: str | MarkedJson) -> Guide:
        if "x-guidance" in plain_object(_text(schema)):
            raise BadRequest("guided_decoding_guide: x-guidance is not taken; leave it out")
        if self._last is not None and not self._last.done():
            raise Unavailable("another schema is being compiled; try again later")
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "guides")
        self._last = self._worker.submit(self._compile, schema)
        try:
            return self._last.result(self._seconds)
        except TimeoutError:
            said = f"guided_decoding_guide takes more than {self._seconds:g} s to compile; simplify it"
            raise BadRequest(said) from None

    def _compile(self, schema: str | MarkedJson) -> Guide:
        from llguidance import LLMatcher, LLParserLimits

        if self._known is None:
            self._known = self._tokens()
        shown: dict[int, str] = {}
        if isinstance(schema, str):
            try:
                grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_FORM)
            except ValueError as error:
                raise _refused(str(error)) from error
        else:
            added = added_tokens(self._tokenizer.read_text("utf-8"), self._end_ids)
            grammar, shown = schema.grammar(_FORM, added), schema.hidden(added)
        limits = LLParserLimits(**_LIMITS)
        matcher = LLMatcher(self._known, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        guide = Guide(matcher, self._vocabulary, shown)
        guide.bar(np.zeros(self._vocabulary, np.float32))  # the first token's cost is known now
        return guide

    def _tokens(self) -> Any:
        """Each token as bytes. Raises BadRequest for a tokenizer whose tokens are not such."""
        from llguidance import LLTokenizer

        ends = self._end_ids or None
        try:
            return LLTokenizer(
                self._tokenizer.read_text("utf-8"),
                n_vocab=self._vocabulary,
                eos_token=ends,
                slices=LLTokenizer.json_slices(),
            )
        except Exception as error:  # the library raises bare ones
            raise BadRequest(
                f"guided_decoding_guide: this model's tokenizer does not say which bytes a token is ({_brief(error)})"
            ) from error


def _text(schema: str | MarkedJson) -> str:
    return schema if isinstance(schema, str) else schema.schema


def _size(schema: str | MarkedJson) -> int:
    return len(_text(schema))


def _refused(said: str) -> BadRequest:
    return BadRequest(f"guided_decoding_guide: this schema is not built here: {_brief(said)}")


def _costly(said: str) -> BadRequest:
    return BadRequest(f"guided_decoding_guide: this schema costs too much; simplify it ({_brief(said)})")


def _brief(said: object) -> str:
    """On one line; of a regular expression, which one and why stand on lines of their own, about one of carets."""
    words = " ".join(line.strip() for line in str(said).splitlines() if line.strip(" ^"))
    return words[:200] or "no reason was given"
