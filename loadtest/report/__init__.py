"""What a run comes to: the report as a record, its judgement, its page and its text."""
