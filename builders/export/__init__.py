"""Checkpoint -> OnnxGraph, one file a kind of model."""
