"""What is taken: four kinds of feedback, and a request that was served."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from online.feedback.errors import FeedbackRefused, Refusal
from runtime.record import Record

LARGEST_BYTES = 64 * 1024  # of one sample as JSON, and of each text of a served request
_LONGEST_ID = 128


def storable(text: str) -> str:
    """The text itself. PostgreSQL takes no NUL, and no database half a surrogate pair: one such row would fail a whole
    commit. Raises ValueError."""
    if "\x00" in text:
        raise ValueError("holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no text") from None
    return text


Text = Annotated[str, AfterValidator(storable), Field(min_length=1)]
Name = Annotated[str, AfterValidator(storable), Field(min_length=1, max_length=_LONGEST_ID)]


class _Sample(Record):
    """About the answer to `request_id`. `user` is whoever may ask for the row to be deleted."""

    request_id: Name
    user: Name | None = None


class Rating(_Sample):
    kind: Literal["rating"] = "rating"
    score: float = Field(ge=0, le=1, allow_inf_nan=False)  # 1 is best; thumbs are 0 and 1


class Correction(_Sample):
    """What the answer should have been."""

    kind: Literal["correction"] = "correction"
    text: Text


class Label(_Sample):
    kind: Literal["label"] = "label"
    label: Name


class Pair(_Sample):
    """Two texts that belong together, and one that does not, for embeddings."""

    kind: Literal["pair"] = "pair"
    query: Text
    positive: Text
    negative: Text | None = None


Sample = Rating | Correction | Label | Pair
KINDS = ("rating", "correction", "label", "pair")
_ADAPTER: TypeAdapter[Sample] = TypeAdapter(Annotated[Sample, Field(discriminator="kind")])


class ServedRequest(Record):
    """A request that was answered. Feedback is taken for these only. The texts may be any; they are checked if kept."""

    request_id: Name
    model: Name
    version: int = Field(ge=1)
    user: Name | None = None
    prompt: str | None = None
    answer: str | None = None


def parse_sample(raw: bytes) -> Sample:
    """One sample from JSON. Raises FeedbackRefused."""
    if len(raw) > LARGEST_BYTES:
        raise FeedbackRefused(Refusal.TOO_LARGE, f"{len(raw)} bytes; at most {LARGEST_BYTES} are taken")
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        raise FeedbackRefused(Refusal.MALFORMED, "it is not JSON in UTF-8") from None
    if not isinstance(found, dict):
        raise FeedbackRefused(Refusal.MALFORMED, f"a JSON object is expected, not {type(found).__name__}")
    if found.get("kind") not in KINDS:
        raise FeedbackRefused(Refusal.UNKNOWN_KIND, f"`kind` must be one of {', '.join(KINDS)}")
    try:
        return _ADAPTER.validate_python(found)
    except ValidationError as error:
        raise FeedbackRefused(Refusal.MALFORMED, _faults(error)) from None


@dataclass(frozen=True)
class SampleRow:
    """A sample as the table has it. `digest` is of all that the caller said: the same sent twice has the same."""

    request_id: str
    kind: str
    user: str | None
    body: str
    bytes: int
    digest: str


def row_of(sample: Sample) -> SampleRow:
    """Raises FeedbackRefused for one that is too large, as it can be where it did not come through `parse_sample`."""
    body = body_of(sample)
    whole = json.dumps([sample.request_id, sample.kind, sample.user, body], ensure_ascii=False)
    digest = hashlib.sha256(whole.encode()).hexdigest()
    return SampleRow(sample.request_id, sample.kind, sample.user, body, require_size(body), digest)


def require_size(body: str) -> int:
    """Its bytes. Raises FeedbackRefused for too many."""
    size = len(body.encode())
    if size > LARGEST_BYTES:
        raise FeedbackRefused(Refusal.TOO_LARGE, f"{size} bytes; at most {LARGEST_BYTES} are taken")
    return size


def body_of(sample: Sample | ServedRequest) -> str:
    """Canonical JSON of what is not a column of its own: equal samples give equal text."""
    fields: dict[str, Any] = sample.model_dump(exclude={"request_id", "user", "kind"})
    return json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _faults(error: ValidationError) -> str:
    """Where and what, without the input: it is somebody's text."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(f"`{'.'.join(map(str, item['loc'][1:])) or item['loc'][0]}`: {item['msg']}" for item in found[:5])
