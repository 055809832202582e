"""Load tests of a served model: Locust drives it, a report says what was seen. Never imports `builders`."""
