"""How long to wait before something that failed is tried again."""

from __future__ import annotations


def pause_s(failures: int, first_s: float, longest_s: float = float("inf")) -> float:
    """After the first failure `first_s`, then twice as long each time; 0 after none."""
    return min(first_s * 2.0 ** min(failures - 1, 64), longest_s) if failures else 0.0  # no float holds 2 ** 1024
