"""The run: Locust as a process, its users, and what was asked for against what came."""
