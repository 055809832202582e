"""Online work: what runs inside the serving image. Never imports `builders`."""
