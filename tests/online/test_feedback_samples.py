"""What is refused, by name, and that nothing of the text is in the message."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from online.feedback.errors import FeedbackRefused, Refusal
from online.feedback.samples import KINDS, LARGEST_BYTES, Correction, Label, Pair, Rating, parse_sample, row_of

GOOD = [
    Rating(request_id="a", score=1),
    Correction(request_id="a", text="better", user="u"),
    Label(request_id="a", label="spam"),
    Pair(request_id="a", query="q", positive="p", negative="n"),
    Pair(request_id="a", query="q", positive="p"),
]


@pytest.mark.parametrize("sample", GOOD, ids=lambda sample: sample.kind)
def test_every_kind_is_taken(sample: Rating) -> None:
    assert parse_sample(sample.model_dump_json().encode()) == sample
    assert set(KINDS) == {item.kind for item in GOOD}


@pytest.mark.parametrize(
    ("raw", "reason", "says"),
    [
        (b"{", Refusal.MALFORMED, "JSON"),
        (b"\xff\xfe", Refusal.MALFORMED, "JSON"),
        (b"[" * 50_000, Refusal.MALFORMED, "JSON"),
        (b"[]", Refusal.MALFORMED, "object"),
        (b'{"kind": "stars", "request_id": "a"}', Refusal.UNKNOWN_KIND, "rating, correction"),
        (b'{"kind": ["rating"], "request_id": "a"}', Refusal.UNKNOWN_KIND, "rating, correction"),
        (b'{"kind": "rating", "request_id": "a"}', Refusal.MALFORMED, "score"),
        (b'{"kind": "rating", "request_id": "a", "score": 7}', Refusal.MALFORMED, "score"),
        (b'{"kind": "rating", "request_id": "a", "score": NaN}', Refusal.MALFORMED, "score"),
        (b'{"kind": "rating", "request_id": "", "score": 1}', Refusal.MALFORMED, "request_id"),
        (b'{"kind": "rating", "request_id": "a", "score": 1, "secret": 1}', Refusal.MALFORMED, "secret"),
        (b'{"kind": "correction", "request_id": "a", "text": "secret\\u0000"}', Refusal.MALFORMED, "NUL"),
        (b'{"kind": "correction", "request_id": "a", "text": "secret\\ud800"}', Refusal.MALFORMED, "surrogate"),
        (b'{"kind": "correction", "request_id": "a", "text": "' + b"x" * LARGEST_BYTES, Refusal.TOO_LARGE, "at most"),
    ],
)
def test_a_refusal_has_a_name(raw: bytes, reason: Refusal, says: str) -> None:
    with pytest.raises(FeedbackRefused, match=says) as caught:
        parse_sample(raw)
    assert caught.value.reason is reason
    assert "secret\x00" not in str(caught.value)


_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
)


@given(st.binary() | _json.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_do_worse_than_be_refused(raw: bytes) -> None:
    with pytest.raises(FeedbackRefused):
        parse_sample(raw)


def test_equal_feedback_has_one_digest() -> None:
    first = parse_sample(b'{"kind": "rating", "request_id": "a", "score": 1}')
    assert row_of(first).digest == row_of(parse_sample(b'{"score": 1.0, "request_id": "a", "kind": "rating"}')).digest
    assert len({row_of(item).digest for item in GOOD}) == len(GOOD)
