"""SQLite in a file, or PostgreSQL: opened, brought to the newest tables, and its faults told in words."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from online.feedback.errors import FeedbackUnavailable
from runtime.errors import InputError, MachineError

MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_MS = 5000
_LOCK = 7_414_601  # of PostgreSQL's advisory locks: two processes that start together migrate in turn


class Database:
    """Owns the engine. SQLite runs in WAL with full sync: a commit that returned is on the disk."""

    def __init__(self, url: str) -> None:
        """Raises InputError for a URL that names no database we know, or one that a newer Trireme made; MachineError
        without its driver; FeedbackUnavailable when it does not answer."""
        self._url = _url(url)
        self.engine = _engine(self._url)
        self._file = Path(self._url.database).resolve() if self.is_sqlite and self._url.database else None
        try:
            self._migrate()
        except BaseException:
            self.close()
            raise
        self._inode = self._file.stat().st_ino if self._file else None

    @property
    def is_sqlite(self) -> bool:
        return self._url.get_backend_name() == "sqlite"

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One that writes. Raises FeedbackUnavailable, and nothing of it is there then; or, where the connection was
        lost in the moment of the commit, perhaps all of it."""
        with self._told(), self.engine.begin() as connection:
            yield connection
            self._require_file()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One state of the database throughout; in WAL it holds up no writer."""
        with self._told(), self.engine.connect().execution_options(reads_only=True) as connection:
            self._require_file()
            if not self.is_sqlite:
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            yield connection

    def forget_traces(self) -> None:
        """Deleted rows leave SQLite's log too. Their pages were zeroed by the delete (`secure_delete`)."""
        if self.is_sqlite:
            with self._told(), self.engine.connect() as connection:
                connection.connection.driver_connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # type: ignore[union-attr]

    def close(self) -> None:
        self.engine.dispose()

    def _require_file(self) -> None:
        """SQLite writes on into a file that was deleted, and every row would be lost when it is closed."""
        if self._file is None:
            return
        try:
            there = self._file.stat().st_ino == self._inode
        except OSError:
            there = False
        if not there:
            raise FeedbackUnavailable(
                f"the feedback database {self._file} was moved or deleted; restart with it in place"
            )

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            reason = " ".join(str(error.orig).split())
            raise FeedbackUnavailable(f"the feedback database cannot be used now: {reason}") from error

    def _migrate(self) -> None:
        config = migrations()
        with self._told(), self.engine.begin() as connection:
            if not self.is_sqlite:
                connection.execute(sqlalchemy.text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise InputError(
                    f"feedback database {self._url.render_as_string()}",
                    got=str(error),
                    expected="tables that this Trireme knows",
                    fix="use the Trireme that wrote it, or another database",
                ) from error


def migrations() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _url(text: str) -> URL:
    try:
        url = sqlalchemy.make_url(text)
    except ArgumentError:
        raise _bad_url("something that is no URL") from None  # it may hold a password
    if url.get_backend_name() == "sqlite":
        if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
            raise _bad_url("SQLite without a file")
        return url
    if url.get_backend_name() == "postgresql":
        return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url
    raise _bad_url(f"the database {url.get_backend_name()!r}")


def _bad_url(got: str) -> InputError:
    return InputError(
        "feedback database",
        got=got,
        expected="sqlite:////path/to/feedback.db or postgresql://user@host/database",
        fix="give such a URL",
    )


def _engine(url: URL) -> Engine:
    try:
        if url.get_backend_name() == "sqlite":
            return _sqlite(url)
        return sqlalchemy.create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": 5})
    except (ImportError, NoSuchModuleError) as error:
        raise MachineError(
            "driver of PostgreSQL",
            got=str(error),
            expected="the package psycopg",
            fix="install Trireme with the extra `postgres`, or psycopg[binary]",
        ) from error


def _sqlite(url: URL) -> Engine:
    assert url.database is not None  # `_url` took no other
    folder = Path(url.database).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Somebody's words: for the owner's eyes, and SQLite gives its log the same rights.
        os.close(os.open(url.database, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise FeedbackUnavailable(f"the feedback database {url.database} cannot be opened: {error.strerror}") from error
    engine = sqlalchemy.create_engine(url)
    event.listen(engine, "connect", _prepare)
    event.listen(engine, "begin", _begin)
    return engine


def _prepare(connection: Any, record: object) -> None:
    connection.isolation_level = None  # transactions are ours: Python's driver would begin too late
    for pragma in (
        f"busy_timeout = {_BUSY_MS}",  # first: what follows may meet another process
        "journal_mode = WAL",
        "synchronous = FULL",
        "secure_delete = ON",
    ):
        _patiently(connection, f"PRAGMA {pragma}")


def _patiently(connection: Any, statement: str) -> None:
    """SQLite does not wait for another process that makes the same database a WAL one just now: it says at once that it
    is locked."""
    end = time.monotonic() + _BUSY_MS / 1e3
    while True:
        try:
            connection.execute(statement).fetchall()
            return
        except sqlite3.OperationalError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.02)


def _begin(connection: Connection) -> None:
    """A writer takes its lock at once: one that read first may not become a writer when another wrote meanwhile."""
    reads = connection.get_execution_options().get("reads_only", False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
