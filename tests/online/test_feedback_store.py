"""The store as its callers see it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from online.feedback.database import Database
from online.feedback.errors import FeedbackFull, FeedbackRefused, FeedbackUnavailable, Refusal
from online.feedback.group_commit import GroupCommit
from online.feedback.samples import Correction, Label, Rating, Sample, ServedRequest
from online.feedback.store import FeedbackStore, KeptTraffic, StoreBounds
from online.feedback.tables import METADATA
from runtime.errors import InputError, MachineError
from tests import ROOT

Open = Callable[..., FeedbackStore]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'feedback.db'}"


@pytest.fixture
def opened(url: str) -> Iterator[Open]:
    stores: list[FeedbackStore] = []

    def make(bounds: StoreBounds | None = None, traffic: KeptTraffic | None = None, **seams: object) -> FeedbackStore:
        stores.append(FeedbackStore(url, bounds, traffic, **seams))  # type: ignore[arg-type]
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def serve(store: FeedbackStore, *ids: str, user: str | None = None) -> None:
    for key in ids:
        store.note_served(
            ServedRequest(request_id=key, model="m", version=3, user=user, prompt=f"ask {key}", answer="so")
        ).result(30)


def lines(store: FeedbackStore) -> list[dict[str, object]]:
    return [json.loads(line) for line in store.export()]


def test_feedback_is_taken_once_however_often_it_is_sent(opened: Open) -> None:
    store = opened()
    serve(store, "a")
    assert store.add(Rating(request_id="a", score=1))
    assert not store.add(Rating(request_id="a", score=1))
    assert store.add(Correction(request_id="a", text="better"))
    with pytest.raises(FeedbackRefused) as caught:
        store.add(Rating(request_id="a", score=0))
    assert caught.value.reason is Refusal.CONFLICT
    assert [(row["kind"], row.get("score"), row["version"]) for row in lines(store)] == [
        ("rating", 1, 3),
        ("correction", None, 3),
    ]


def test_feedback_for_a_request_that_nobody_served_is_refused(opened: Open) -> None:
    store = opened()
    with pytest.raises(FeedbackRefused) as caught:
        store.add(Rating(request_id="never", score=1))
    assert caught.value.reason is Refusal.UNKNOWN_REQUEST
    assert store.size() == (0, 0)


def test_one_bad_sample_does_not_harm_those_in_its_commit(opened: Open) -> None:
    """All wait behind the same lock, so that they go in one commit."""
    store = opened()
    serve(store, "a", "b", "c")
    samples: list[Sample] = [
        Rating(request_id="a", score=1),
        Rating(request_id="never", score=1),
        Rating(request_id="a", score=1),
        Rating(request_id="a", score=0),
        Label(request_id="b", label="x"),
    ]
    with store._database.transaction():
        futures = [store.submit(sample) for sample in samples]
    outcomes = [future.exception(30) or future.result() for future in futures]
    assert [item.reason if isinstance(item, FeedbackRefused) else item for item in outcomes] == [
        1,
        Refusal.UNKNOWN_REQUEST,
        0,
        Refusal.CONFLICT,
        1,
    ]


def test_texts_are_kept_when_asked_for_and_redacted(opened: Open) -> None:
    silent, speaking = opened(), opened(traffic=KeptTraffic(share=1, redact=lambda text: text.replace("ask", "***")))
    serve(silent, "a")
    serve(speaking, "b")
    for key in "ab":
        silent.add(Rating(request_id=key, score=1))
    assert [(row["prompt"], row["answer"]) for row in lines(silent)] == [(None, None), ("*** b", "so")]


def test_a_share_of_the_traffic_is_that_share() -> None:
    kept = sum(KeptTraffic(share=0.1).keeps(str(number)) for number in range(10_000))
    assert 850 < kept < 1150


@pytest.mark.parametrize("hook", [lambda text: 1 / 0, lambda text: b"bytes", lambda text: "\x00" * 0 + "x\ud800"])
def test_where_redaction_fails_nothing_is_kept(opened: Open, hook: Callable[[str], str]) -> None:
    store = opened(traffic=KeptTraffic(share=1, redact=hook))
    with pytest.raises(FeedbackRefused) as caught:
        serve(store, "a")
    assert caught.value.reason is Refusal.NOT_REDACTED
    assert store.size() == (0, 0)


def test_a_full_store_says_so_and_keeps_what_it_has(opened: Open) -> None:
    store = opened(StoreBounds(max_rows=3))
    serve(store, "a", "b")
    assert store.add(Rating(request_id="a", score=1))
    with pytest.raises(FeedbackFull, match="3 rows of at most 3"):
        store.add(Rating(request_id="b", score=1))
    assert not store.add(Rating(request_id="a", score=1))  # needs no room
    narrow = opened(StoreBounds(max_bytes=store.size()[1] + 10))
    with pytest.raises(FeedbackFull, match="bytes"):
        narrow.add(Correction(request_id="b", text="x" * 100))


def test_oversized_samples_are_refused_even_past_the_parser(opened: Open) -> None:
    with pytest.raises(FeedbackRefused) as caught:
        opened().add(Correction(request_id="a", text="x" * 70_000))
    assert caught.value.reason is Refusal.TOO_LARGE


def test_a_user_is_forgotten_to_the_last_byte(opened: Open, tmp_path: Path) -> None:
    store = opened(traffic=KeptTraffic(share=1))
    serve(store, "a", user="ann")
    serve(store, "b", user="bob")
    store.add(Correction(request_id="a", text="by nobody, of hers: xyzzy"))
    store.add(Correction(request_id="b", text="hers, of his: plugh", user="ann"))
    store.add(Rating(request_id="b", score=1, user="bob"))
    assert store.forget_user("ann") == 3
    assert [row["user"] for row in lines(store)] == ["bob"]
    assert store.forget_user("ann") == 0
    left = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert not any(word in left for word in (b"xyzzy", b"plugh", b"ask a", b"ann"))
    assert b"ask b" in left
    assert store.size()[0] == 2


def test_retention_deletes_what_is_old(opened: Open) -> None:
    now = [1000.0]
    store = opened(StoreBounds(keep_s=100), wall=lambda: now[0], monotonic=lambda: now[0])
    serve(store, "a")
    now[0] = 1090
    serve(store, "b")
    now[0] = 1120
    assert store.expire() == 1
    assert store.size()[0] == 1


@pytest.mark.parametrize("jump", [1e6, -500.0])
def test_a_clock_that_jumps_deletes_nothing(opened: Open, jump: float) -> None:
    wall = [1000.0]
    store = opened(StoreBounds(keep_s=100), wall=lambda: wall[0], monotonic=lambda: 5.0)
    serve(store, "a")
    wall[0] += jump
    with pytest.raises(InputError, match="clock"):
        store.expire()
    wall[0] -= jump
    assert store.expire() == 0
    assert store.size()[0] == 1


def test_rows_of_the_future_tell_of_a_clock_that_went_back(opened: Open) -> None:
    """After a restart the monotonic clock knows nothing."""
    serve(opened(wall=lambda: 1e9), "a")
    with pytest.raises(InputError, match="newest row"):
        opened(wall=lambda: 1e6, monotonic=lambda: 0.0).expire()


def test_an_export_is_one_state_while_others_write(opened: Open) -> None:
    store = opened()
    ids = [f"r{number}" for number in range(1200)]
    for future in [store.note_served(ServedRequest(request_id=key, model="m", version=1)) for key in ids]:
        future.result(30)
    for future in [store.submit(Rating(request_id=key, score=1)) for key in ids[:1100]]:
        future.result(30)
    reading = store.export()
    first = json.loads(next(reading))
    store.add(Rating(request_id=ids[1150], score=1))
    assert first["request_id"] == "r0"
    assert [json.loads(line)["request_id"] for line in reading] == ids[1:1100]


def test_many_threads_of_two_stores_write_at_once(opened: Open) -> None:
    """As two processes would: each store has a connection and a thread of its own. Both are asked for the same rows."""
    stores = [opened(), opened()]
    serve(stores[0], *(f"r{number}" for number in range(40)))

    def write(number: int) -> bool:
        return stores[number % 2].add(Rating(request_id=f"r{number // 4}", score=0.5))

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(write, range(160))) == 40
    assert stores[0].size()[0] == 80


def test_callers_share_a_commit() -> None:
    """While the first is being committed, the others gather, and go together."""
    batches: list[list[int]] = []
    go, first = threading.Event(), threading.Event()

    def commit(items: list[int]) -> list[int]:
        batches.append(list(items))
        first.set()
        assert go.wait(30)
        return items

    group: GroupCommit[int, int] = GroupCommit(commit, waiting=3)  # type: ignore[arg-type]
    futures = [group.submit(0)]
    assert first.wait(30)
    futures += [group.submit(number) for number in (1, 2, 3)]
    with pytest.raises(FeedbackUnavailable, match="3 samples wait"):
        group.submit(4)
    go.set()
    group.close()
    assert [future.result(30) for future in futures] == [0, 1, 2, 3]
    assert batches == [[0], [1, 2, 3]]
    with pytest.raises(FeedbackUnavailable, match="closed"):
        group.submit(5)


def test_a_database_that_is_deleted_under_us_acknowledges_nothing(opened: Open, tmp_path: Path) -> None:
    """SQLite itself would write on, into a file without a name."""
    store = opened()
    serve(store, "a")
    kept = tmp_path / "kept.db"
    (tmp_path / "feedback.db").rename(kept)
    for _ in range(2):
        with pytest.raises(FeedbackUnavailable, match="moved or deleted"):
            store.add(Rating(request_id="a", score=1))
    kept.rename(tmp_path / "feedback.db")
    assert store.add(Rating(request_id="a", score=1))


def test_a_locked_database_is_told_in_words(opened: Open, url: str) -> None:
    store = opened()
    serve(store, "a")
    with sqlalchemy.create_engine(url).connect() as other:
        other.connection.driver_connection.execute("BEGIN EXCLUSIVE")  # type: ignore[union-attr]
        with pytest.raises(FeedbackUnavailable, match="locked"):
            store.add(Rating(request_id="a", score=1), timeout_s=60)
        other.connection.driver_connection.execute("ROLLBACK")  # type: ignore[union-attr]
    assert store.add(Rating(request_id="a", score=1))


FILL = """
import resource, sys
from online.feedback.errors import FeedbackUnavailable
from online.feedback.samples import Correction, ServedRequest
from online.feedback.store import FeedbackStore
store = FeedbackStore(sys.argv[1])
for future in [store.note_served(ServedRequest(request_id=f"r{n}", model="m", version=1)) for n in range(100)]:
    future.result()
if sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
taken = []
try:
    for number in range(99):
        store.add(Correction(request_id=f"r{number}", text="x" * 10_000))
        taken.append(f"r{number}")
except FeedbackUnavailable as error:
    print(error)
if sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    store.add(Correction(request_id="r99", text="there is room again"))
    taken.append("r99")
print(*taken)
"""


def test_a_disk_that_takes_no_more_fails_by_name_and_heals(url: str, opened: Open) -> None:
    """The kernel refuses writes beyond 256 KiB of a file, then takes them again."""
    found = subprocess.run(
        [sys.executable, "-c", FILL, url, str(256 << 10)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=ROOT,
    ).stdout.splitlines()
    assert "cannot be used now: " in found[0]  # an I/O error, or a full disk where a part of the write fitted
    assert [row["request_id"] for row in lines(opened())] == found[1].split()


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0,
    reason="no user namespaces here: a small disk cannot be mounted",
)
def test_a_full_disk_fails_by_name(tmp_path: Path) -> None:
    mount = f'mount -t tmpfs -o size=512k small "{tmp_path}"'
    shell = f'{mount} && "$0" -c "$1" "sqlite:///{tmp_path}/f.db" && cp "{tmp_path}"/f.db* "$2"'
    copy = tmp_path.with_name(f"{tmp_path.name}-copy")
    copy.mkdir()
    found = subprocess.run(
        ["unshare", "-rm", "sh", "-c", shell, sys.executable, FILL, copy],
        capture_output=True, text=True, timeout=120, check=True, cwd=ROOT,
    ).stdout.splitlines()  # fmt: skip
    assert "database or disk is full" in found[0]
    store = FeedbackStore(f"sqlite:///{copy / 'f.db'}")
    assert [row["request_id"] for row in lines(store)] == found[1].split() != []
    store.close()


def test_the_migrations_make_the_tables_that_the_code_knows(url: str) -> None:
    database = Database(url)
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
    database.close()


def test_a_database_of_a_newer_trireme_is_refused(url: str) -> None:
    database = Database(url)
    with database.transaction() as connection:
        connection.execute(sqlalchemy.text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    with pytest.raises(InputError, match="9999"):
        Database(url)


def test_two_that_open_a_new_database_at_once_both_succeed(url: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        for database in pool.map(lambda _: Database(url), range(2)):
            database.close()


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("sqlite://", "without a file"),
        ("sqlite:///:memory:", "without a file"),
        ("mysql://root:secret@h/d", "'mysql'"),
        ("no url, secret", "no URL"),
    ],
)
def test_urls_of_no_use_are_refused(bad: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        FeedbackStore(bad)
    assert "secret" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FeedbackUnavailable, match="cannot be opened"):
        FeedbackStore(f"sqlite:///{tmp_path}/file/feedback.db")


def test_others_may_not_read_the_file(opened: Open, tmp_path: Path) -> None:
    serve(opened(), "a")
    assert {
        file.name: oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir() if "feedback" in file.name
    } == dict.fromkeys(("feedback.db", "feedback.db-wal", "feedback.db-shm"), "0o600")


def test_postgresql_without_its_driver_says_what_to_install() -> None:
    try:
        import psycopg  # type: ignore[import-not-found]  # noqa: F401

        pytest.skip("psycopg is here")
    except ImportError:
        pass
    with pytest.raises(MachineError, match="psycopg"):
        FeedbackStore("postgresql://user@localhost/feedback")
