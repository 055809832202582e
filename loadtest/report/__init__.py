"""What is told of it: the report as a record, its judgement, its page and its text."""
