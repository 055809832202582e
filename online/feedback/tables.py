"""What lies in the database. A change here needs a migration beside it, which a test compares."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, Index, Integer, MetaData, String, Table, Text

METADATA = MetaData()
_KEY = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by INTEGER alone

SERVED = Table(
    "served",
    METADATA,
    Column("request_id", String(128), primary_key=True),
    Column("model", String(128), nullable=False),
    Column("version", Integer, nullable=False),
    Column("user", String(128)),
    Column("at", Float, nullable=False),  # seconds since 1970
    Column("bytes", Integer, nullable=False),
    Column("prompt", Text),
    Column("answer", Text),
    Index("served_at", "at"),
    Index("served_user", "user"),
)
FEEDBACK = Table(
    "feedback",
    METADATA,
    Column("id", _KEY, primary_key=True, autoincrement=True),
    Column("request_id", String(128), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("user", String(128)),
    Column("at", Float, nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("body", Text, nullable=False),
    Index("feedback_request_kind", "request_id", "kind", unique=True),
    Index("feedback_at", "at"),
    Index("feedback_user", "user"),
    sqlite_autoincrement=True,  # a number is given once, as PostgreSQL does
)
# One row, changed in the transaction that changes the rows it counts: a bound needs no count of millions.
TOTALS = Table(
    "totals",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("rows", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
)
