"""Blows at a served model under load, and what became of every request (`make chaos`)."""
