"""Rank graphs against the whole: run together, compared node by node, and fed at the edges of what they take."""
