"""Feedback from files, without a gateway: lines of JSON, each taken, or refused by its number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field, ValidationError

from online.feedback.errors import FeedbackRefused, Refusal
from online.feedback.samples import LARGEST_BYTES, Name, Sample, ServedRequest, Text, parse_sample
from online.feedback.store import FeedbackStore
from online.tasks.reading import LearntTask, refused_line
from runtime.record import Record

_WAITING = 500  # lines on their way to the disk: they share commits
_LONGEST_LINE = 4 * LARGEST_BYTES  # a sample, and the texts of its request
_TIMEOUT_S = 60.0


class _OfRequest(Record):
    """What a line may say of the request beside the feedback. `at` is what an export has: the row gets a time anew."""

    prompt: Text | None = None
    answer: Text | None = None
    model: Name | None = None
    version: int | None = Field(default=None, ge=1)
    at: float | None = None


@dataclass
class Added:
    """Rows that are new, and that were there; lines refused, by number, and why."""

    new: int = 0
    known: int = 0
    refused: dict[int, str] = field(default_factory=dict)


def add_lines(store: FeedbackStore, lines: Iterable[bytes], model: str, version: int, task: LearntTask) -> Added:
    """Each line holds a sample as the gateway takes it, or a bare text, `{"kind": "text", "text": ...}`. Where it names
    no request, one is made of its content, so that the same line is the same row. `model` and `version` are those of a
    line that names none; `task` is the model's, and what could never teach it is refused. Raises FeedbackUnavailable:
    earlier lines may be in the store, and are known next time."""
    added = Added()
    waiting: list[tuple[int, Future[int]]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            served, sample = _parsed(line, model, version, task)
            noted = store.note_served(served)
            waiting += [(number, noted), (-number, store.submit(sample))]
        except FeedbackRefused as error:
            added.refused[number] = str(error)
        if len(waiting) >= _WAITING:
            _settle(waiting, added)
    _settle(waiting, added)
    return added


def _settle(waiting: list[tuple[int, Future[int]]], added: Added) -> None:
    """A negative number: the sample of that line, after its request."""
    for number, future in waiting:
        try:
            new = future.result(_TIMEOUT_S)
        except FeedbackRefused as error:
            added.refused.setdefault(abs(number), str(error))
            continue
        if number < 0:
            added.new += new
            added.known += not new
    waiting.clear()


def _parsed(line: bytes, model: str, version: int, task: LearntTask) -> tuple[ServedRequest, Sample]:
    if len(line) > _LONGEST_LINE:
        raise FeedbackRefused(Refusal.TOO_LARGE, f"a line of {len(line)} bytes; at most {_LONGEST_LINE} are taken")
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise FeedbackRefused(Refusal.MALFORMED, "it is not JSON in UTF-8") from None
    if not isinstance(found, dict):
        raise FeedbackRefused(Refusal.MALFORMED, f"a JSON object is expected, not {type(found).__name__}")
    given = {key: found.pop(key) for key in _OfRequest.model_fields if key in found}
    try:
        about = _OfRequest.model_validate(given)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise FeedbackRefused(Refusal.MALFORMED, f"`{fault['loc'][0]}`: {fault['msg']}") from None
    if found.get("kind") == "text":
        found["kind"] = "correction"
    named = "request_id" in found
    if not named:
        found["request_id"] = f"file-{_digest({**given, **found})}"
    sample = parse_sample(json.dumps(found, ensure_ascii=False).encode())
    if (why := refused_line(task, sample.model_dump(), about.prompt, named)) is not None:
        raise FeedbackRefused(Refusal.UNKNOWN_KIND, why)
    served = ServedRequest(
        request_id=sample.request_id, model=about.model or model, version=about.version or version, user=sample.user,
        prompt=about.prompt, answer=about.answer,
    )  # fmt: skip
    return served, sample


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
