"""Feedback from files: each line taken once, or refused by its number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from online.feedback.samples import Correction, Label, ServedRequest
from online.feedback.store import FeedbackStore, KeptTraffic
from online.loop.feedback_files import add_lines
from online.loop.gathered import gather
from online.tasks.reading import LearntTask
from tests.online.small import LANGUAGE

LINES = [
    b'{"kind": "text", "text": "a"}',
    b'{"kind": "correction", "prompt": "q ", "text": "b", "user": "u"}',
    b"no JSON",
    b'{"kind": "pair", "query": "x"}',
    b"",
    b'{"kind": "text", "text": "a"}',
    b'{"kind": "rating", "score": 1, "prompt": "p ", "answer": "z"}',
    b'{"kind": "text", "text": "a", "bogus": 1}',
    b'{"kind": "text", "text": "a\\u0000"}',
    b'{"kind": "text", "text": "a", "prompt": 3}',
    b'{"kind": "label", "label": "spam", "request_id": "known"}',
]


def test_lines_are_taken_once_or_refused_by_number_and_an_export_comes_back_as_it_was(tmp_path: Path) -> None:
    store = FeedbackStore(f"sqlite:///{tmp_path / 'feedback.db'}", traffic=KeptTraffic(share=1.0))
    added = add_lines(store, LINES, "m", 3, "generation")
    assert (added.new, added.known, sorted(added.refused)) == (3, 1, [3, 4, 8, 9, 10, 11])
    assert "bogus" in added.refused[8]
    assert added.refused[11].endswith(
        "a label says nothing to a language model, which learns from correction, pair, rating"
    )
    store.note_served(ServedRequest(request_id="known", model="m", version=3))
    store.add(Label(request_id="known", label="spam"))  # as the gateway takes it, for whatever model
    found = gather(store.read(), 0, 0.8, LANGUAGE)
    assert [item.passages[0] for item in found.documents] == ["a", "q b", "p z"]
    assert (list(found.unread.values()), found.fed_to) == ([1], 4)
    again = add_lines(store, [line.encode() for line in store.export()], "m", 3, "generation")
    assert (again.new, again.known, list(again.refused)) == (0, 3, [4])
    store.close()


def test_a_number_is_given_once_so_that_reading_on_passes_over_nothing(tmp_path: Path) -> None:
    store = FeedbackStore(f"sqlite:///{tmp_path / 'feedback.db'}")
    for key in ("one", "two", "three"):
        store.note_served(ServedRequest(request_id=key, model="m", version=1, user="u" if key != "one" else None))
        store.add(Correction(request_id=key, text=key))
    last = max(number for number, _ in store.read())
    store.forget_user("u")
    store.note_served(ServedRequest(request_id="four", model="m", version=1))
    store.add(Correction(request_id="four", text="four"))
    assert [fields["text"] for _, fields in store.read(last)] == ["four"]
    store.close()


@pytest.mark.parametrize(
    ("task", "line", "why"),
    [
        ("embedding", {"kind": "correction", "text": "b"}, "a correction says nothing to an embedding model"),
        ("embedding", {"kind": "text", "text": "b"}, "a correction says nothing to an embedding model"),
        ("embedding", {"kind": "label", "label": "b", "prompt": "a"}, "a label says nothing to an embedding model"),
        ("classification", {"kind": "pair", "query": "a", "positive": "b"}, "a pair says nothing to a classifier"),
        ("classification", {"kind": "label", "label": "spam"}, "the text that it is of, as `prompt`"),
        ("classification", {"kind": "rating", "score": 1}, "a rating says nothing to a classifier"),
        ("embedding", {"kind": "pair", "query": "a", "positive": "b"}, None),
        ("classification", {"kind": "label", "label": "spam", "prompt": "a"}, None),
        ("classification", {"kind": "label", "label": "spam", "request_id": "served"}, None),
    ],
)
def test_what_could_never_teach_a_task_is_refused_by_name(
    tmp_path: Path, task: LearntTask, line: dict[str, object], why: str | None
) -> None:
    store = FeedbackStore(f"sqlite:///{tmp_path / 'feedback.db'}", traffic=KeptTraffic(share=1.0))
    added = add_lines(store, [json.dumps(line).encode()], "m", 1, task)
    store.close()
    assert (added.new == 1) == (why is None)
    assert why is None or why in added.refused[1]
