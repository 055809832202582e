"""Feedback at the gateway: taken for the caller's own answers, refused by name, and never in the way of an answer."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from online.doorway.sink import StoreSink
from online.feedback.store import FeedbackStore
from runtime.errors import InputError
from runtime.gateway.app import Doors
from runtime.gateway.feedback import LARGEST_BYTES
from runtime.gateway.keys import Keys
from tests.gateway.asking import JSON, FakeTriton, Got, ask, doors_of, get, post

KEYS = {name: {**JSON, "authorization": f"Bearer key-of-{name}"} for name in ("ann", "bob")}
release = threading.Event()  # of the hook that waits


def shout(text: str) -> str:
    return text.upper()


def wait(text: str) -> str:
    if text != "a text":  # the check at the start
        release.wait(20)
    return text


def fail(text: str) -> str:
    if text != "a text":
        raise RuntimeError(text)
    return text


def number(text: str) -> int:
    return len(text)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/feedback.db"


@pytest.fixture
def sink(url: str) -> Iterator[StoreSink]:
    made = StoreSink(url, 0.0, None, "m")
    yield made
    made.close()


def keyed(sink: StoreSink | None, triton: FakeTriton | None = None) -> Doors:
    hashes = {hashlib.sha256(f"key-of-{name}".encode()).digest(): name for name in KEYS}
    return doors_of(triton or FakeTriton(), keys=Keys(hashes), feedback=sink)


async def embed(doors: Doors, who: str = "ann") -> str:
    got = await ask(doors.http, "POST", "/v1/embeddings", b'{"model": "m", "input": "a question"}', KEYS[who])
    assert got.status == 200
    return got.headers["x-request-id"]


async def say(doors: Doors, who: str = "ann", **said: Any) -> Got:
    return await ask(doors.http, "POST", "/v1/feedback", json.dumps(said).encode(), KEYS[who])


def rows(url: str) -> list[dict[str, Any]]:
    store = FeedbackStore(url)
    try:
        return [json.loads(line) for line in store.export()]
    finally:
        store.close()


def test_each_kind_is_kept_once_for_the_answers_caller(sink: StoreSink, url: str) -> None:
    kinds: list[dict[str, Any]] = [
        {"kind": "rating", "score": 0.8}, {"kind": "correction", "text": "better"}, {"kind": "label", "label": "spam"},
        {"kind": "pair", "query": "a", "positive": "b"},
    ]  # fmt: skip

    async def work() -> None:
        doors = keyed(sink)
        own = await embed(doors)
        for said in kinds:
            first = await say(doors, request_id=own, **said)
            again = await say(doors, request_id=f"cmpl-{own}", **said)
            assert (first.status, first.json) == (200, again.json)
            assert first.json["request_id"] == own
        other = await say(doors, request_id=own, kind="rating", score=0.1)
        assert (other.status, other.json["error"]["code"]) == (409, "conflict")
        stranger = await say(doors, "bob", request_id=own, kind="label", label="x")
        nobody = await say(doors, request_id="ab" * 12, kind="label", label="x")
        assert (stranger.status, stranger.body) == (404, nobody.body), "whose it is cannot be told from the answer"
        page = (await ask(doors.http, "GET", "/metrics", headers=KEYS["ann"])).body.decode()
        assert 'trireme_gateway_feedback_total{result="new"} 4' in page
        assert 'trireme_gateway_feedback_total{result="same"} 4' in page
        (lane,) = doors.versions.traffic.lanes
        assert lane.scores[8] == sum(lane.scores) == 1, "a rating counts at the version that answered, once"

    asyncio.run(work())
    sink.close()
    found = rows(url)
    assert [(row["kind"], row["user"], row["version"], row["prompt"]) for row in found] == [
        (said["kind"], "ann", 3, None) for said in kinds
    ]


@pytest.mark.parametrize(
    ("said", "status", "why"),
    [
        ({"kind": "rating", "score": 2}, 400, "score"), ({"kind": "rating"}, 400, "score"),
        ({"kind": "praise", "text": "x"}, 400, "praise"), ({"kind": "label", "label": "x", "stars": 5}, 400, "stars"),
        ({"kind": "correction", "text": "x" * LARGEST_BYTES}, 413, "at most"),
        ({"kind": "correction", "text": "a\x00b"}, 400, "NUL"), ({"kind": "correction", "text": ""}, 400, "text"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_by_name(sink: StoreSink, said: dict[str, Any], status: int, why: str) -> None:
    async def work() -> Got:
        doors = keyed(sink)
        return await say(doors, request_id=await embed(doors), **said)

    got = asyncio.run(work())
    assert (got.status, why in got.json["error"]["message"]) == (status, True), got.body


def test_without_a_database_it_says_so() -> None:
    door = keyed(None).http
    got = post(door, "/v1/feedback", {"request_id": "x", "kind": "rating", "score": 1}, KEYS["ann"])
    assert got.status == 404
    assert "--feedback-database" in got.json["error"]["message"]
    assert get(door, "/v1/feedback", KEYS["ann"]).status == 405


def test_a_database_that_is_away_costs_feedback_and_no_answer(tmp_path: Path) -> None:
    place = tmp_path / "folder"
    place.write_text("in the way")
    sink = StoreSink(f"sqlite:///{place}/feedback.db", 1.0, None, "m")

    async def work() -> None:
        doors = keyed(sink)
        own = await embed(doors)
        got = await say(doors, request_id=own, kind="rating", score=1)
        assert (got.status, got.headers["retry-after"]) == (503, "1")
        place.unlink()
        sink._tried = float("-inf")  # the next try is due
        assert (await say(doors, request_id=own, kind="rating", score=1)).status == 200
        (place / "feedback.db").unlink()
        assert (await say(doors, request_id=await embed(doors), kind="rating", score=1)).status == 503

    asyncio.run(work())
    sink.close()


def test_a_slow_database_holds_up_no_answer(sink: StoreSink) -> None:
    """Feedback waits for its row; the loop serves on meanwhile."""

    async def work() -> None:
        doors = keyed(sink)
        own = await embed(doors)
        assert sink._store is not None
        with sink._store._database.transaction():  # a writer that takes its time
            waiting = asyncio.create_task(say(doors, request_id=own, kind="rating", score=1))
            await embed(doors)
            assert not waiting.done()
        assert (await waiting).status == 200

    asyncio.run(asyncio.wait_for(work(), 60))


def test_the_oldest_answers_are_forgotten(sink: StoreSink) -> None:
    async def work() -> None:
        doors = keyed(sink)
        doors.feedback.most = 2
        ids = [await embed(doors) for _ in range(3)]
        statuses = [(await say(doors, request_id=one, kind="rating", score=1)).status for one in ids]
        assert statuses == [404, 200, 200]

    asyncio.run(work())


def test_sampled_texts_are_redacted_and_kept(url: str) -> None:
    sink = StoreSink(url, 1.0, f"{__name__}:shout", "m")

    async def work() -> None:
        speaking = keyed(sink, FakeTriton(generates=True))
        asked = json.dumps({"model": "m", "prompt": "tell me"}).encode()
        got = await ask(speaking.http, "POST", "/v1/completions", asked, KEYS["ann"])
        assert (await say(speaking, request_id=got.json["id"], kind="rating", score=1)).status == 200
        embedding = keyed(sink)
        assert (await say(embedding, request_id=await embed(embedding), kind="rating", score=1)).status == 200

    asyncio.run(work())
    sink.close()
    assert sink.counts() == {"kept": 2, "dropped": 0, "failed": 0}
    texts = [(row["prompt"], row["answer"]) for row in rows(url)]
    assert texts == [("TELL ME", "ONE TWO THREE"), ("A QUESTION", "[[0.0,1.0]]")]


def test_samples_never_delay_an_answer(url: str) -> None:
    release.clear()
    sink = StoreSink(url, 1.0, f"{__name__}:wait", "m", waiting=4)

    async def work() -> None:
        doors = keyed(sink)
        while not sink.counts()["dropped"]:  # the hook holds the first, the queue what it may
            await embed(doors)

    asyncio.run(asyncio.wait_for(work(), 60))
    release.set()
    sink.close()
    assert sink.counts()["failed"] == 0


def test_a_hook_that_fails_keeps_nothing(url: str) -> None:
    sink = StoreSink(url, 1.0, f"{__name__}:fail", "m")
    asyncio.run(embed(keyed(sink)))
    sink.close()
    assert sink.counts()["failed"] == 1


@pytest.mark.parametrize(
    ("database", "share", "redact", "said"),
    [
        ("sqlite:///{}/f.db", 1.5, None, "sample-share"), ("sqlite:///{}/f.db", 0.0, "x:y", "sample-redact"),
        ("sqlite:///{}/f.db", 0.5, "no_such_module:y", "no_such_module"),
        ("sqlite:///{}/f.db", 0.5, f"{__name__}:number", "returns int"), ("sqlite://", 0.0, None, "without a file"),
        ("postgresql://me:secret@host/db", 0.0, None, "PGPASSFILE"),
    ],
)  # fmt: skip
def test_what_it_cannot_start_with_is_refused(
    tmp_path: Path, database: str, share: float, redact: str | None, said: str
) -> None:
    with pytest.raises(InputError, match=said) as refused:
        StoreSink(database.format(tmp_path), share, redact, "m")
    assert "secret" not in str(refused.value)
