"""Benchmarks: commands that print ratios within one run, against a baseline that everyone knows."""
