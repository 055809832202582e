"""Numbers of feedback are given once: SQLite would give that of a deleted newest row again, and who reads on from the
last number that it saw would pass over the row that got it."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":  # PostgreSQL's sequences never go back
        with op.batch_alter_table("feedback", recreate="always", table_kwargs={"sqlite_autoincrement": True}):
            pass


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        with op.batch_alter_table("feedback", recreate="always", table_kwargs={"sqlite_autoincrement": False}):
            pass
