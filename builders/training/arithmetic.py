"""In what numbers this machine trains, and torch set so that the same seed gives the same weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

from builders.store.processor import this_processor

Arithmetic = Literal["bfloat16", "float32"]


def arithmetic() -> Arithmetic:
    """bf16 is about three times as fast as fp32 where the processor multiplies it, and emulated where it does not."""
    flags = this_processor().flags
    return "bfloat16" if {"avx512_bf16", "amx_bf16"} & set(flags) else "float32"


@contextlib.contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """torch's global generator seeded and its algorithms deterministic for a while, then as they were."""
    import torch

    options: Any = torch.utils.deterministic  # its properties are on the module's class, where type checkers look past
    strict, filling = torch.are_deterministic_algorithms_enabled(), options.fill_uninitialized_memory
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        options.fill_uninitialized_memory = False  # a debugging aid that writes every tensor twice
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(strict)
            options.fill_uninitialized_memory = filling
