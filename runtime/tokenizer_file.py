"""A `tokenizer.json`, opened as all of ours are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from runtime.errors import BadEnvironment


def open_tokenizer(file: Path, lower_case: bool = False) -> Any:
    """Of the `tokenizers` library. It cuts and pads nothing, whatever the file says. Raises BadEnvironment."""
    # A thread pool of its own would fight the executor for the cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer

    try:
        fast = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for an unreadable file
        raise BadEnvironment(f"{file} is not a tokenizer file: {error}") from error
    if lower_case:
        _lower(fast)
    fast.no_padding()
    fast.no_truncation()
    return fast


def _lower(fast: Any) -> None:
    """In front of the other normalisers, as sentence-transformers does; once, where the file does it already."""
    from tokenizers import normalizers

    own = fast.normalizer
    several = isinstance(own, normalizers.Sequence)
    parts = list(own) if several else [] if own is None else [own]
    if not any(isinstance(part, normalizers.Lowercase) for part in parts):
        fast.normalizer = normalizers.Sequence([normalizers.Lowercase(), *parts])
