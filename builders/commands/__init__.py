"""The commands of `trireme`, by subject. Each parses, calls and prints; the work is elsewhere."""
