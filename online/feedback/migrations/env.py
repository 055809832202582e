"""Run by alembic for each command. The connection comes from `online.feedback.database`; offline, SQL is printed."""

from alembic import context

from online.feedback.tables import METADATA

_connection = context.config.attributes.get("connection")
if _connection is None:
    context.configure(
        url=context.config.get_main_option("sqlalchemy.url"), target_metadata=METADATA, literal_binds=True
    )
else:
    # SQLite's DDL is transactional too; alembic does not count on it, as Python's driver once ended transactions early.
    context.configure(connection=_connection, target_metadata=METADATA, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
