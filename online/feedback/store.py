"""The store: samples acknowledged once they are on the disk; forgotten by age or by user; exported as JSON lines."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from sqlalchemy import Connection, Table, delete, func, select, update

from online.feedback.database import Database
from online.feedback.errors import FeedbackFull, FeedbackRefused, FeedbackUnavailable, Refusal
from online.feedback.group_commit import LARGEST_BATCH, GroupCommit
from online.feedback.samples import Sample, SampleRow, ServedRequest, body_of, require_size, row_of, storable
from online.feedback.tables import FEEDBACK, SERVED, TOTALS
from runtime.errors import InputError

_PAGE = 500  # rows an export holds in memory
_DRIFT_S = 60.0  # by which the wall clock may leave the monotonic one before retention distrusts it

Outcome = int | Exception  # rows that are new (or gone)


@dataclass(frozen=True)
class StoreBounds:
    max_rows: int = 1_000_000  # feedback and served requests together
    max_bytes: int = 1 << 30  # of their text
    keep_s: float = 90 * 86_400.0


@dataclass(frozen=True)
class KeptTraffic:
    """Which served texts are kept: none, unless asked for. Requests are known by their ids in any case.

    `redact` sees each text that would be kept; what it returns is kept instead. Where it fails, nothing is.
    """

    share: float = 0.0
    redact: Callable[[str], str] = lambda text: text

    def keeps(self, request_id: str) -> bool:
        """The id decides, so that every process says the same of a request."""
        draw = int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8]) / 2**64
        return draw < self.share


@dataclass(frozen=True)
class _Deletion:
    user: str | None = None
    before: float | None = None


class FeedbackStore:
    """Safe for many threads, and for many processes on one database. One thread of its own commits."""

    def __init__(
        self,
        url: str,
        bounds: StoreBounds | None = None,
        traffic: KeptTraffic | None = None,
        *,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        waiting: int = 10_000,
        largest_batch: int = LARGEST_BATCH,
    ) -> None:
        """Raises what `Database` raises."""
        self._bounds, self._traffic = bounds or StoreBounds(), traffic or KeptTraffic()
        self._wall, self._monotonic = wall, monotonic
        self._opened = wall() - monotonic()
        self._database = Database(url)
        self._commits: GroupCommit[SampleRow | ServedRequest | _Deletion, int] = GroupCommit(
            self._commit, waiting=waiting, largest_batch=largest_batch
        )

    def close(self) -> None:
        self._commits.close()
        self._database.close()

    def add(self, sample: Sample, timeout_s: float = 10.0) -> bool:
        """True when the sample is new, False when the same was there; on the disk in both cases.

        Raises FeedbackRefused for a request that was not served, or that has other feedback of this kind;
        FeedbackFull, FeedbackUnavailable.
        """
        return bool(_wait(self.submit(sample), timeout_s))

    def submit(self, sample: Sample) -> Future[int]:
        """`add` for those who must not wait: the future has 1 or 0, or what `add` raises."""
        return self._commits.submit(row_of(sample))

    def note_served(self, served: ServedRequest) -> Future[int]:
        """Makes the request known; its texts are kept where `KeptTraffic` says so, redacted.

        Raises FeedbackRefused when the redaction fails, or for texts that are too large.
        """
        return self._commits.submit(self._redacted(served))

    def forget_user(self, user: str, timeout_s: float = 60.0) -> int:
        """Deletes every row of the user, what was submitted before this included. Returns how many."""
        gone = _wait(self._commits.submit(_Deletion(user=user)), timeout_s)
        self._database.forget_traces()
        return gone

    def expire(self, timeout_s: float = 60.0) -> int:
        """Deletes rows older than `StoreBounds.keep_s`; returns how many. Raises InputError when the clock jumped."""
        now = self._trusted_now()
        gone = _wait(self._commits.submit(_Deletion(before=now - self._bounds.keep_s)), timeout_s)
        self._database.forget_traces()
        return gone

    def export(self) -> Iterator[str]:
        """Each sample as a line of JSON, oldest first, with the request's texts where they are kept. One state of the
        database, whatever is written meanwhile."""
        return (json.dumps(fields, ensure_ascii=False) for _, fields in self.read())

    def read(self, after: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """The samples that came after the one of this number, as `export` gives them, with their numbers. Numbers grow
        in the order of commits, and no sample ever gets one below a number that was read."""
        columns = [*FEEDBACK.c, SERVED.c.model, SERVED.c.version, SERVED.c.prompt, SERVED.c.answer]
        joined = FEEDBACK.outerjoin(SERVED, FEEDBACK.c.request_id == SERVED.c.request_id)
        last = after
        with self._database.reading() as connection:
            while True:
                page = select(*columns).select_from(joined).where(FEEDBACK.c.id > last).order_by(FEEDBACK.c.id)
                found = connection.execute(page.limit(_PAGE)).mappings().all()
                yield from ((row["id"], _fields(row)) for row in found)
                if len(found) < _PAGE:
                    return
                last = found[-1]["id"]

    def size(self) -> tuple[int, int]:
        """Rows, and bytes of their text."""
        with self._database.reading() as connection:
            rows, size = connection.execute(select(TOTALS.c.rows, TOTALS.c.bytes)).one()
        return rows, size

    def _trusted_now(self) -> float:
        now = self._wall()
        with self._database.reading() as connection:
            newest = max(
                connection.execute(select(func.max(table.c.at))).scalar_one() or 0.0 for table in (FEEDBACK, SERVED)
            )
        moved = now - self._monotonic() - self._opened
        if abs(moved) > _DRIFT_S or newest > now + _DRIFT_S:
            got = f"{moved:+.0f} s since the store was opened; newest row {newest - now:+.0f} s from now"
            raise InputError(
                "clock", got=got, expected="one that does not jump: retention deletes by it", fix="set it, then restart"
            )
        return now

    def _redacted(self, served: ServedRequest) -> ServedRequest:
        if not self._traffic.keeps(served.request_id):
            return served.model_copy(update={"prompt": None, "answer": None})
        try:
            prompt, answer = (text and storable(self._traffic.redact(text)) for text in (served.prompt, served.answer))
            found = served.model_copy(update={"prompt": prompt, "answer": answer})
        except Exception as error:  # the hook is somebody else's code; nothing unredacted is kept
            raise FeedbackRefused(
                Refusal.NOT_REDACTED, f"the redaction hook failed with {type(error).__name__}; the texts were not kept"
            ) from error
        require_size(body_of(found))
        return found

    def _commit(self, batch: Sequence[SampleRow | ServedRequest | _Deletion]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        with self._database.transaction() as connection:
            # The lock on this row comes first on PostgreSQL, as BEGIN IMMEDIATE does on SQLite: writers take turns.
            rows, size = connection.execute(select(TOTALS.c.rows, TOTALS.c.bytes).with_for_update()).one()
            now = self._wall()
            room = _Room(self._bounds, rows, size)
            for kind, group in groupby(batch, key=_table_of):
                if kind is SERVED:
                    outcomes += _note(connection, list(group), now, room)  # type: ignore[arg-type]
                elif kind is FEEDBACK:
                    outcomes += _insert(connection, list(group), now, room)  # type: ignore[arg-type]
                else:
                    outcomes += [_delete(connection, item, room) for item in group]  # type: ignore[arg-type]
            if (room.rows, room.bytes) != (rows, size):
                connection.execute(update(TOTALS).values(rows=room.rows, bytes=room.bytes))
        return outcomes


@dataclass
class _Room:
    bounds: StoreBounds
    rows: int
    bytes: int

    def take(self, size: int) -> FeedbackFull | None:
        if self.rows + 1 > self.bounds.max_rows or self.bytes + size > self.bounds.max_bytes:
            return FeedbackFull(
                f"the feedback store is full: {self.rows} rows of at most {self.bounds.max_rows}, {self.bytes} bytes "
                f"of at most {self.bounds.max_bytes}; export and expire, or raise the bound"
            )
        self.rows, self.bytes = self.rows + 1, self.bytes + size
        return None


def _table_of(item: SampleRow | ServedRequest | _Deletion) -> Table | None:
    if isinstance(item, _Deletion):
        return None
    return SERVED if isinstance(item, ServedRequest) else FEEDBACK


def _note(connection: Connection, group: list[ServedRequest], now: float, room: _Room) -> list[Outcome]:
    """The first to come stays: a request id is served once."""
    ids = [item.request_id for item in group]
    known = set(connection.execute(select(SERVED.c.request_id).where(SERVED.c.request_id.in_(ids))).scalars())
    new: list[dict[str, Any]] = []
    outcomes: list[Outcome] = []
    for item in group:
        full = None if item.request_id in known else room.take(size := require_size(body_of(item)))
        outcomes.append(full or int(item.request_id not in known))
        if item.request_id not in known and full is None:
            known.add(item.request_id)
            new.append({**item.model_dump(), "at": now, "bytes": size})
    if new:
        connection.execute(SERVED.insert(), new)
    return outcomes


def _insert(connection: Connection, group: list[SampleRow], now: float, room: _Room) -> list[Outcome]:
    ids = {item.request_id for item in group}
    served = set(connection.execute(select(SERVED.c.request_id).where(SERVED.c.request_id.in_(ids))).scalars())
    columns = select(FEEDBACK.c.request_id, FEEDBACK.c.kind, FEEDBACK.c.digest)
    digests = {
        (key, kind): digest for key, kind, digest in connection.execute(columns.where(FEEDBACK.c.request_id.in_(ids)))
    }
    new: list[dict[str, Any]] = []
    outcomes: list[Outcome] = []
    for item in group:
        key = item.request_id, item.kind
        if key in digests:
            outcomes.append(0 if digests[key] == item.digest else _conflict(item))
        elif item.request_id not in served:
            outcomes.append(FeedbackRefused(Refusal.UNKNOWN_REQUEST, "no request of this id was served"))
        elif full := room.take(item.bytes):
            outcomes.append(full)
        else:
            digests[key] = item.digest
            new.append({**vars(item), "at": now})
            outcomes.append(1)
    if new:
        connection.execute(FEEDBACK.insert(), new)
    return outcomes


def _conflict(item: SampleRow) -> FeedbackRefused:
    return FeedbackRefused(Refusal.CONFLICT, f"this request has another {item.kind} already; the first one stays")


def _delete(connection: Connection, item: _Deletion, room: _Room) -> int:
    gone = 0
    for table in (FEEDBACK, SERVED):
        which = table.c.at < item.before if item.before is not None else table.c.user == item.user
        if item.user is not None and table is FEEDBACK:  # what was said, by whomever, of this user's requests
            theirs = select(SERVED.c.request_id).where(SERVED.c.user == item.user)
            which = which | table.c.request_id.in_(theirs)
        rows, size = connection.execute(
            select(func.count(), func.coalesce(func.sum(table.c.bytes), 0)).where(which)
        ).one()
        connection.execute(delete(table).where(which))
        room.rows, room.bytes, gone = room.rows - rows, room.bytes - int(size), gone + rows
    return gone


def _fields(row: Any) -> dict[str, Any]:
    names = ("request_id", "kind", "user", "at", "model", "version", "prompt", "answer")
    return {**{key: row[key] for key in names}, **json.loads(row["body"])}


def _wait(future: Future[int], timeout_s: float) -> int:
    try:
        return future.result(timeout_s)
    except TimeoutError:
        future.cancel()
        raise FeedbackUnavailable(f"the feedback database did not answer within {timeout_s:g} s") from None
