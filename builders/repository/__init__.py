"""Graphs and engines -> a Triton model repository."""
