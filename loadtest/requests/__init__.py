"""What is sent and what must come back: texts, prompts, connections, and the check of each answer."""
