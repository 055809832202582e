"""What a run saw: recordings of each moment, figures of them, and what the server counted itself."""
