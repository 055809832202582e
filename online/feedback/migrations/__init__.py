"""How a database of feedback gets its tables, step by step, by alembic."""
