"""Rank graphs against the whole: run together, compared node by node, fed at the limits of what they take."""
