"""Feedback from files: each line taken once, or refused by its number."""

from __future__ import annotations

from pathlib import Path

from online.feedback.samples import Correction, ServedRequest
from online.feedback.store import FeedbackStore, KeptTraffic
from online.loop.feedback_files import add_lines
from online.loop.texts import gather

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
    added = add_lines(store, LINES, "m", 3)
    assert (added.new, added.known, sorted(added.refused)) == (4, 1, [3, 4, 8, 9, 10])
    assert "bogus" in added.refused[8]
    found = gather(store.read(), 0, min_rating=0.8)
    assert [item.passages[0] for item in found.documents] == ["a", "q b", "p z"]
    assert (found.unread, found.fed_to) == (1, 4)
    again = add_lines(store, [line.encode() for line in store.export()], "m", 3)
    assert (again.new, again.known, again.refused) == (0, 4, {})
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
