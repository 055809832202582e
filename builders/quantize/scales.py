"""Scales that the graph's own type can hold: rounded to it, and never zero."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Type = np.dtype[Any] | type[np.floating[Any]]
FACTORS = (1e-4, 1e4)  # of smoothing: they and their inverses are normal numbers of fp16
_LEAST = 1e-10  # inverses of products of two scales stay finite in fp32


def representable(scales: Any, dtype: Type) -> Floats:
    """The values that `scales` have in `dtype`, at least its smallest normal number.

    A channel of zeros would get scale 0 in fp16, which TensorRT refuses; subnormal ones have few digits, and some
    hardware flushes them to zero. Integers are to be rounded with these, not with the scales before.
    """
    held: Floats = np.maximum(scales, max(float(np.finfo(dtype).tiny), _LEAST)).astype(dtype).astype(np.float32)
    return held
