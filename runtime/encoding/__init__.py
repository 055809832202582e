"""Texts to vectors: tokens, parts of a batch, and the executor that computes each part."""
