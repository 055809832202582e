"""How near a model that was changed still is to the one before, text by text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from builders.compress.importance import Forward
from builders.compress.texts import Batch
from runtime.proof.judging import cosines


def outputs(forward: Forward, batches: Sequence[Batch]) -> Any:
    """[texts, width]"""
    import torch

    with torch.no_grad():
        return torch.cat([forward(**batch) for batch in batches]).numpy()


def by_text(wanted: Any, found: Any) -> Any:
    """Cosines. Of a single score, whose cosine says nothing, one minus the difference over the spread."""
    if wanted.shape[1] > 1:
        return cosines(wanted, found, by_label=False)
    return 1 - np.abs(np.nan_to_num(found - wanted, nan=np.inf))[:, 0] / max(float(wanted.std()), 1e-12)
